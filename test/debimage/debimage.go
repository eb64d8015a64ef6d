// Package debimage makes a real image without a Docker daemon: a Debian minbase
// root with python3 as one layer, a small web server as the other, saved as
// `docker save | gzip` does.
package debimage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"coffer/test/dockersave"
)

// Port is where the image's server listens.
const Port = 8080

// Server answers each request with what stands in /user_config/web/message.txt.
const server = `import http.server, pathlib, sys

message = pathlib.Path("/user_config/web/message.txt").read_bytes()
print("python", sys.version.split()[0], "read", message.decode().strip(), flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(message)))
        self.end_headers()
        self.wfile.write(message)
    def log_message(self, *args):
        print("request", self.path, flush=True)

http.server.HTTPServer(("0.0.0.0", %d), Handler).serve_forever()
`

// Build makes the archive dir/debian-python.tar.gz, or keeps the one that is
// there. It takes about half a minute and needs mmdebstrap.
func Build(ctx context.Context, dir string) (archive string, err error) {
	return build(ctx, filepath.Join(dir, "debian-python.tar.gz"), nil, func(lower []byte) (*dockersave.Image, error) {
		upper, err := dockersave.Layer(dockersave.Entry{Name: "srv/"},
			dockersave.Entry{Name: "srv/server.py", Body: fmt.Appendf(nil, server, Port)},
			dockersave.Entry{Name: "etc/.wh.motd", Body: []byte{}})
		return &dockersave.Image{Tag: "debian-python:1", Entrypoint: []string{"/usr/bin/python3", "/srv/server.py"}, Layers: [][]byte{lower, upper}}, err
	})
}

// build makes an archive of a minbase root with python3, unless it is there.
// hooks are mmdebstrap's customize hooks; image adds what is not Debian's.
func build(ctx context.Context, archive string, hooks []string, image func(lower []byte) (*dockersave.Image, error)) (string, error) {
	if _, err := os.Stat(archive); err == nil {
		return archive, nil
	}
	if err := os.MkdirAll(filepath.Dir(archive), 0o755); err != nil {
		return "", err
	}
	suite, mirror, err := MachineSuite(ctx)
	if err != nil {
		return "", err
	}
	root := archive + ".root.tar"
	defer os.Remove(root)
	args := []string{"--quiet", "--variant=minbase", "--include=python3,ca-certificates", `--aptopt=Acquire::Languages "none"`}
	for _, p := range []string{"doc", "man", "locale"} {
		args = append(args, "--dpkgopt=path-exclude=/usr/share/"+p+"/*")
	}
	for _, h := range hooks {
		args = append(args, "--customize-hook="+h)
	}
	args = append(args, suite, root, fmt.Sprintf("deb %s %s main", mirror, suite))
	if out, err := exec.CommandContext(ctx, "mmdebstrap", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("mmdebstrap: %w\n%s", err, out)
	}
	lower, err := os.ReadFile(root)
	if err != nil {
		return "", err
	}
	im, err := image(lower)
	if err != nil {
		return "", err
	}
	tmp := archive + ".tmp"
	if err := im.SaveLegacy(tmp); err != nil {
		return "", err
	}
	return archive, os.Rename(tmp, archive)
}

// MachineSuite finds this machine's own Debian suite and where it comes from.
func MachineSuite(ctx context.Context) (suite, mirror string, err error) {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(string(release)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			suite = strings.Trim(v, `"`)
		}
	}
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Codename: "+suite).Output()
	if err != nil {
		return "", "", fmt.Errorf("apt-get indextargets: %w", err)
	}
	mirror, _, _ = strings.Cut(string(out), "\n")
	if suite == "" || mirror == "" {
		return "", "", errors.New("this machine's apt sources name no suite of their own; run apt-get update")
	}
	return suite, mirror, nil
}
