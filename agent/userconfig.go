package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"coffer/internal/guestconfig"
)

// userConfig decides what the workload will see as /user_config. The host can
// rewrite that drive at any time, so what is pinned of it is copied into memory,
// compared on the way, and read from there ever after.
func (a *agent) userConfig(ctx context.Context) error {
	pinned, drive := a.cfg.UserConfig, a.Paths.UserConfig
	if pinned.Integrity == guestconfig.IntegrityOff {
		a.log.Printf("user_config integrity=off")
		a.configSource = drive
		return nil
	}
	verified := filepath.Join(a.configDir(), "verified")
	if err := os.MkdirAll(a.configDir(), 0o700); err != nil {
		return err
	}
	all := pinned.Integrity == guestconfig.IntegrityPinned
	if err := pinned.Files.Copy(ctx, drive, verified, all); err != nil {
		return fmt.Errorf("user_config (integrity %s): %w", pinned.Integrity, err)
	}
	a.log.Printf("user_config integrity=%s entries=%d digest=%s", pinned.Integrity, len(pinned.Files), pinned.Files.Digest())
	if all {
		a.configSource = verified
		within(unmountTime, func() { _ = a.Detach(drive) }) // nothing reads it any more
		return nil
	}
	// The verified files lie over those of the drive.
	a.configSource = a.mergedConfig()
	if err := os.Mkdir(a.configSource, 0o755); err != nil {
		return err
	}
	return a.Overlay(a.configSource, verified, drive)
}

func (a *agent) configDir() string    { return filepath.Join(a.Paths.Run, "coffer", "user_config") }
func (a *agent) mergedConfig() string { return filepath.Join(a.configDir(), "merged") }
