package debimage

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"coffer/test/dockersave"
)

// NVFlareVersion is what NVFlare installs, and what a test's own Python has to
// have, too.
const NVFlareVersion = "2.9.0"

// NVFlare makes dir/nvflare.tar.gz, or keeps the one that is there: Debian's
// python3 with nvflare from PyPI and the entry point of NVFlare's deployment
// guide. python is a program with pip. It takes about two minutes.
func NVFlare(ctx context.Context, python, dir string) (archive string, err error) {
	wheels := filepath.Join(dir, "wheels")
	defer os.RemoveAll(wheels)
	archive = filepath.Join(dir, "nvflare.tar.gz")
	if _, err := os.Stat(archive); err == nil {
		return archive, nil
	}
	version, err := suitePython(ctx)
	if err != nil {
		return "", err
	}
	// Fetched outside of the root: no proxy or CA of this machine gets into it.
	cmd := exec.CommandContext(ctx, python, "-m", "pip", "download", "-q", "-d", wheels, "--only-binary=:all:", "--python-version", version,
		"nvflare=="+NVFlareVersion, "filelock", "pip") // filelock: SNPAuthorizer imports it, nvflare does not ask for it
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("pip download: %w\n%s", err, out)
	}
	hooks := []string{
		"copy-in " + wheels + " /",
		`chroot "$1" sh -c 'python3 $(ls /wheels/pip-*.whl)/pip install -q --no-index --find-links /wheels --no-compile --break-system-packages --root-user-action ignore nvflare filelock'`,
		// Byte code that stays valid whatever an archive does to times.
		`chroot "$1" sh -c 'find /usr -name __pycache__ -type d -prune -exec rm -rf {} +; python3 -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3* /usr/local/lib/python3* >/dev/null || true'`,
		`rm -rf "$1"/wheels "$1"/root/.cache`,
	}
	return build(ctx, archive, hooks, func(lower []byte) (*dockersave.Image, error) {
		upper, err := dockersave.Layer(dockersave.Entry{Name: "local/"}, dockersave.Entry{Name: "local/custom/"}, dockersave.Entry{Name: "opt/"}, dockersave.Entry{Name: "opt/certs/"})
		return &dockersave.Image{Tag: "nvflare-site:1", Entrypoint: []string{"/user_config/nvflare/startup/sub_start.sh", "--verify"}, Layers: [][]byte{lower, upper}}, err
	})
}

// suitePython is the version of the python3 that this machine's suite has, as X.Y.
func suitePython(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-cache", "show", "--no-all-versions", "python3").Output()
	if err != nil {
		return "", fmt.Errorf("apt-cache show python3: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		if v, ok := strings.CutPrefix(line, "Version: "); ok {
			parts := strings.SplitN(v, ".", 3)
			if len(parts) == 3 {
				return parts[0] + "." + parts[1], nil
			}
		}
	}
	return "", fmt.Errorf("apt-cache shows no version of python3")
}
