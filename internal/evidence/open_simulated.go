//go:build simulated

package evidence

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"coffer/internal/guestconfig"
	"coffer/internal/simport"
)

// Platform is the one platform that this build gives evidence of.
const Platform = guestconfig.PlatformSimulated

// Open returns the source of the platform. This build knows the simulated one only.
func Open(platform, tee string) (Source, error) {
	if platform != Platform || tee != TEESNP && tee != TEESample {
		return nil, fmt.Errorf("%w %q with tee %q: it is for platform %q", ErrPlatform, platform, tee, Platform)
	}
	p := port{sys: "/sys/class/virtio-ports", dev: "/dev"}
	return newSource(tee, true, p.report), nil
}

// port asks the simulated platform. The port is opened for each request: what a
// request that was given up has left in it goes away with the close.
type port struct{ sys, dev string }

func (p port) report(ctx context.Context, reportData [64]byte, vmpl int) ([]byte, []byte, error) {
	path, err := p.find(ctx)
	if err != nil {
		return nil, nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if d, ok := ctx.Deadline(); ok {
		if err := f.SetDeadline(d); err != nil && !errors.Is(err, os.ErrNoDeadline) {
			return nil, nil, err
		}
	}
	return simport.Request(f, reportData, vmpl)
}

// portPatience is how long the kernel may take to announce the port.
const portPatience = 5 * time.Second

// find waits for the port and returns its device.
func (p port) find(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, portPatience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		names, err := filepath.Glob(filepath.Join(p.sys, "vport*", "name"))
		if err != nil {
			return "", err
		}
		for _, n := range names {
			if b, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(b)) == simport.PortName {
				return filepath.Join(p.dev, filepath.Base(filepath.Dir(n))), nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", fmt.Errorf("%w: no virtio port %s; is the simulated platform running? %w", ErrNoDevice, simport.PortName, ctx.Err())
		}
	}
}
