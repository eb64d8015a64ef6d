// Package e2e boots a real image: a Debian root with python3 whose program reads
// /user_config and answers HTTP through a port of the host.
package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"coffer/internal/testenv"
	"coffer/test/debimage"
	"coffer/test/harness"
)

func TestDebianPython(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	testenv.LookTool(t, "mmdebstrap")
	testenv.LookTool(t, "qemu-system-x86_64")
	env := &harness.Env{Bin: filepath.Join(root, "bin"), Base: filepath.Join(root, "build/base/simulated"), Dir: t.TempDir(), Log: os.Stderr}
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	archive, err := debimage.Build(ctx, filepath.Join(root, "build/images"))
	if err != nil {
		t.Fatal(err)
	}
	kbs, err := env.StartKBS(ctx, "kbs")
	if err != nil {
		t.Fatal(err)
	}
	defer kbs.Stop()
	settings, err := kbs.Settings()
	if err != nil {
		t.Fatal(err)
	}

	config := filepath.Join(env.Dir, "config")
	if err := os.Mkdir(config, 0o755); err != nil {
		t.Fatal(err)
	}
	const message = "read from user_config, served from a confidential VM\n"
	if err := os.WriteFile(filepath.Join(config, "message.txt"), []byte(message), 0o600); err != nil {
		t.Fatal(err)
	}
	yaml := filepath.Join(env.Dir, "CONFIG.yaml")
	if err := os.WriteFile(yaml, fmt.Appendf(nil, "role: server\nroot_drive_size: 4\ndocker_archive: %s\nuser_config:\n  web: %s\nallowed_ports: [%d]\ncc_attestation:\n  check_frequency: 30\n",
		archive, config, debimage.Port), 0o644); err != nil {
		t.Fatal(err)
	}
	b, err := env.Build(ctx, settings, yaml)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Unpack(ctx, filepath.Join(env.Dir, "site")); err != nil {
		t.Fatal(err)
	}
	port, err := harness.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	vm, err := b.Boot("--forward", fmt.Sprintf("127.0.0.1:%d:%d", port, debimage.Port))
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Kill()
	if _, err := vm.Expect(ctx, `workload: python 3\.\d+\.\d+ read `+strings.TrimSpace(message)); err != nil {
		t.Fatal(err)
	}
	body, err := get(ctx, fmt.Sprintf("http://127.0.0.1:%d/hello", port))
	if err != nil {
		t.Fatal(err)
	}
	if body != message {
		t.Errorf("the server answers %q", body)
	}
	if _, err := vm.Expect(ctx, `workload: request /hello`); err != nil {
		t.Error(err)
	}
}

// get asks until the server listens: it prints its line just before it does.
func get(ctx context.Context, url string) (string, error) {
	client := &http.Client{Timeout: 20 * time.Second}
	for {
		resp, err := client.Get(url)
		if err == nil {
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			return string(b), err
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
