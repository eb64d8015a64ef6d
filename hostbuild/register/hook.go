package register

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"coffer/hostbuild/settings"
)

const (
	hookName = "set-policy.sh"
	hookTime = 2 * time.Minute
	hookText = 2000 // bytes of its output that an error shows
)

// hook is the program of a policy folder that uploads the master copy, as the
// deployment guide has it.
type hook struct {
	path string
	env  []string
}

// findHook looks for the hook of the settings' policy folder. One that anybody
// may write, or put another in the place of, is refused: who can change it decides
// which keys are released.
func findHook(s *settings.Settings) (*hook, error) {
	path := filepath.Join(s.PolicyDir, hookName)
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("policy_dir: %w", err)
	case !fi.Mode().IsRegular() || fi.Mode().Perm()&0o111 == 0:
		return nil, nil // kept for reference, not a hook
	}
	dir, err := os.Stat(s.PolicyDir)
	if err != nil {
		return nil, fmt.Errorf("policy_dir: %w", err)
	}
	name := ""
	switch {
	case fi.Mode()&0o002 != 0:
		name = path
	case dir.Mode()&0o002 != 0 && dir.Mode()&fs.ModeSticky == 0:
		name = s.PolicyDir
	}
	if name != "" {
		return nil, fmt.Errorf("%s can be written by everybody, so %s is not run: chmod o-w", name, hookName)
	}
	return &hook{path: path, env: []string{
		"KBS_URL=" + s.KBSURL, "KBS_CA=" + s.KBSCA, "KBS_ADMIN_KEY=" + s.AdminKey, "POLICY_FILE=" + filepath.Join(s.PolicyDir, "policy.rego"),
	}}, nil
}

// run runs the hook in its folder, without arguments. Its environment is this
// program's and names of files and of the KBS, no secret. It is a session of its own,
// which ends as a whole at the time limit, and so has no terminal to ask at.
func (h *hook) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, hookTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.path)
	cmd.Dir = filepath.Dir(h.path)
	cmd.Env = append(os.Environ(), h.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	var out bytes.Buffer // of a failure its end tells why
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w; it may have uploaded before: `hostbuild policy apply` uploads the master copy as it stands", ctx.Err(), err)
		}
		text := strings.TrimSpace(out.String())
		if len(text) > hookText {
			text = "..." + text[len(text)-hookText:]
		}
		return fmt.Errorf("%s: %w\n%s", h.path, err, text)
	}
	return nil
}
