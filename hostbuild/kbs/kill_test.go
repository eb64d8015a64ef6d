package kbs

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"coffer/kbsclient"
)

const serveDirEnv = "COFFER_TEST_KBS_DIR"

// TestMain is the server when a test started it as such.
func TestMain(m *testing.M) {
	if dir := os.Getenv(serveDirEnv); dir != "" {
		if err := serveForTest(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func serveForTest(dir string) error {
	server, err := New(Options{Dir: dir, Dialect: DialectT, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr())
	return server.Serve(context.Background(), ln)
}

// server starts this test binary as a server of dir.
func startServer(t *testing.T, dir string) (cmd *exec.Cmd, addr string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command(exe)
	cmd.Env = append(os.Environ(), serveDirEnv+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		cmd.Process.Kill()
		t.Fatalf("the server did not start: %v", err)
	}
	return cmd, strings.TrimSpace(line)
}

// numbered is a value that shows whether it is whole: its number, and a body
// that follows from it.
func numbered(n int) []byte {
	sum := sha256.Sum256(fmt.Append(nil, n))
	return fmt.Appendf(nil, "%d %s", n, strings.Repeat(hex.EncodeToString(sum[:]), 1+n%400))
}

func numberOf(t *testing.T, b []byte) int {
	t.Helper()
	var n int
	if _, err := fmt.Sscan(string(b), &n); err != nil || string(b) != string(numbered(n)) {
		t.Fatalf("a torn value of %d bytes", len(b))
	}
	return n
}

// TestKill kills the server with SIGKILL at random moments while it stores
// resources, policies and reference values: what it acknowledged is there
// afterwards, and nothing is torn.
func TestKill(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "kbs")
	if err := Init(dir, Options{Hosts: []string{"127.0.0.1"}}); err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(filepath.Join(dir, caCertFile))
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := os.ReadFile(filepath.Join(dir, adminKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	key, err := kbsclient.ParseAdminKey(keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	const writers = 4
	var tried, acked [writers]int // the last number of each
	for range 8 {
		cmd, addr := startServer(t, dir)
		var acks atomic.Int32
		killAt := int32(mathrand.N(60))
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				admin, err := kbsclient.NewAdmin(kbsclient.Config{URL: "https://" + addr, RootCAs: ca, CallTimeout: 3 * time.Second}, key)
				if err != nil {
					t.Error(err)
					return
				}
				for {
					tried[w]++
					n := tried[w]
					switch w {
					case 0:
						err = admin.SetResourcePolicy(t.Context(), append([]byte("package policy\ndefault allow := false\n# "), numbered(n)...))
					case 1:
						err = admin.SetReferenceValue(t.Context(), "n", string(numbered(n)))
					default:
						err = admin.SetResource(t.Context(), fmt.Sprintf("keys/root/%d", w), numbered(n))
					}
					if errors.Is(err, kbsclient.ErrUnreachable) || errors.Is(err, kbsclient.ErrTLS) { // killed
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
					acked[w] = n
					if acks.Add(1) == killAt {
						cmd.Process.Kill() // SIGKILL
					}
				}
			})
		}
		if killAt == 0 {
			cmd.Process.Kill()
		}
		wg.Wait()
		cmd.Process.Kill()
		cmd.Wait()

		st, err := openStore(dir)
		if err != nil {
			t.Fatal(err)
		}
		for w := range writers {
			var b []byte
			switch w {
			case 0:
				b, err = st.policy()
				_, text, ok := strings.Cut(string(b), "# ")
				if b = []byte(text); !ok || strings.HasPrefix(text, "Resource policy") { // of Init
					b = nil
				}
			case 1:
				var refs map[string]any
				refs, err = st.references()
				if list, ok := refs["n"].(string); ok {
					b = []byte(list)
				}
			default:
				b, err = st.resource(fmt.Sprintf("keys/root/%d", w))
				if errors.Is(err, os.ErrNotExist) {
					b, err = nil, nil
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			got := 0
			if b != nil {
				got = numberOf(t, b)
			}
			if got < acked[w] || got > tried[w] {
				t.Fatalf("writer %d: %d is stored, %d was acknowledged, %d tried", w, got, acked[w], tried[w])
			}
		}
	}
	t.Logf("acknowledged: %v of %v", acked, tried)
	for w, n := range acked {
		if n == 0 {
			t.Errorf("writer %d got nothing acknowledged: the test shows nothing", w)
		}
	}

	// What was half written stays until the next start an hour later.
	half := filepath.Join(dir, repositoryDir, "keys/root", newPrefix+"X")
	if err := os.WriteFile(half, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, age := range []time.Duration{0, 2 * sweepAge} {
		if err := os.Chtimes(half, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
		if _, err := openStore(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(half); (err == nil) != (age == 0) {
			t.Errorf("a half-written file of age %v: %v", age, err)
		}
	}

	// The folder still serves.
	cmd, addr := startServer(t, dir)
	defer cmd.Wait()
	defer cmd.Process.Kill()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	c := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}, Timeout: 30 * time.Second}
	resp, err := c.Get("https://" + addr + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("healthz: %d", resp.StatusCode)
	}
}
