package kbs

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestResourcePaths(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		g := r.guest("sample")
		g.attested()
		outside := filepath.Join(r.dir, repositoryDir, "..", "outside")
		for _, p := range []string{"a/b", "a/b/c/d", ".a/b/c", "a/b/.c", "a/../c", "../../token.key", "a//c", "/a/b", "a/b/", "a/b/c/", "", "..%2f..%2fx/b/c",
			"a/b/c%20d", "a/b/c%00", "a/b/%2e%2e", "%2e%2e/b/c", "a/b/c%0a", "a/b/ü", "a/b/" + strings.Repeat("x", 300), "nvflare%2Fsite/rootfs", "a/b/c%2500"} {
			a := g.get(p)
			if a.status != 401 || a.errType() != "PluginInternalError" && !(d == DialectT && a.errType() == "PolicyEngine") {
				t.Errorf("GET %q: %d %s", p, a.status, a.body)
			}
			switch {
			case a.errType() == "PolicyEngine":
				r.reason("illegal character")
			case !strings.Contains(p, "xxx"): // too long a name is the file system's word
				r.reason("is not <repository>/<type>/<tag>")
			}
			if a := r.asAdmin("POST", "/kbs/v0/resource/"+p, []byte("x")); a.status != 401 || a.errType() != "PluginInternalError" {
				t.Errorf("POST %q: %d %s", p, a.status, a.body)
			}
			if !strings.Contains(p, "xxx") {
				r.reason("is not <repository>/<type>/<tag>")
			}
		}
		if _, err := os.Lstat(outside); err == nil {
			t.Error("a file stands outside of the repository")
		}
		if a := g.get("keys/root/nothere"); a.errType() != "PluginInternalError" {
			t.Errorf("missing resource: %d %s", a.status, a.body)
		}
		r.reason("no such file")
		if a := g.get("keys/root/on%65?x=1"); a.status != 200 {
			t.Errorf("escaped letter and query: %d %s", a.status, a.body)
		}
		// A symbolic link out of the folder is not followed.
		if err := os.MkdirAll(filepath.Join(r.dir, repositoryDir, "l", "l"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/etc/hostname", filepath.Join(r.dir, repositoryDir, "l", "l", "l")); err != nil {
			t.Fatal(err)
		}
		if a := g.get("l/l/l"); a.errType() != "PluginInternalError" {
			t.Errorf("link out of the folder: %d %s", a.status, a.body)
		}
	})
}

func TestResourceStore(t *testing.T) {
	dialects(t, func(t *testing.T, d Dialect) {
		r := ready(t, d)
		g := r.guest("sample")
		g.attested()
		for name, data := range map[string]string{"empty": "", "binary": "\x00\xff\xfe", "newline": "x\n", "big": strings.Repeat("A", maxBody)} {
			a := r.mustAdmin("POST", "/kbs/v0/resource/a/b/"+name, []byte(data))
			if ct := a.header.Get("Content-Type"); ct != "text/xml" || len(a.body) != 0 {
				t.Errorf("POST: type %q, body %q", ct, a.body)
			}
			if a := g.get("a/b/" + name); a.status != 200 || decrypt(t, a.body, g.key) != data {
				t.Errorf("%s: %d", name, a.status)
			}
		}
		r.mustAdmin("POST", "/kbs/v0/resource/a/b/empty", []byte("two"))
		if got := decrypt(t, g.get("a/b/empty").body, g.key); got != "two" {
			t.Errorf("overwritten: %q", got)
		}
		err := filepath.Walk(r.dir, func(p string, fi os.FileInfo, err error) error {
			want := os.FileMode(0o600)
			if fi.IsDir() {
				want = 0o700
			}
			if fi.Mode().Perm() != want || strings.Contains(fi.Name(), ".new") {
				t.Errorf("%s has mode %v", p, fi.Mode())
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		a := r.asAdmin("DELETE", "/kbs/v0/resource/"+keyPath, nil)
		if d == DialectT {
			if a.status != 405 || a.header.Get("Allow") != "GET, POST" {
				t.Errorf("DELETE at T: %d %v", a.status, a.header)
			}
			return
		}
		if a.status != 200 || g.get(keyPath).errType() != "PluginInternalError" {
			t.Errorf("DELETE: %d %s", a.status, a.body)
		}
		if a := r.asAdmin("DELETE", "/kbs/v0/resource/"+keyPath, nil); a.errType() != "PluginInternalError" {
			t.Errorf("DELETE again: %d %s", a.status, a.body)
		}
	})
}

// TestConcurrentWrites: of writes at the same time one wins whole, and reference
// values lose none.
func TestConcurrentWrites(t *testing.T) {
	r := ready(t, DialectT)
	g := r.guest("sample")
	g.attested()
	const writers, rounds = 8, 5
	text := func(writer int) string { return strings.Repeat(fmt.Sprint(writer), 10000) }
	rego := func(writer int) string { return allowAll + "# " + text(writer) + "\n" }
	whole := func(what, got string, of func(int) string) {
		for writer := range writers {
			if got == of(writer) {
				return
			}
		}
		t.Errorf("%s is none of what was written: %.80q", what, got)
	}
	r.setPolicy(rego(0))
	r.mustAdmin("POST", "/kbs/v0/resource/a/b/c", []byte(text(0)))
	admin := r.adminHeader()
	var wg sync.WaitGroup
	for writer := range writers {
		wg.Go(func() {
			for round := range rounds {
				for path, body := range map[string][]byte{
					"resource/a/b/c":  []byte(text(writer)),
					"resource-policy": policyBody(rego(writer)),
					"reference-value": []byte(`{"version":"0.1.0","type":"sample","payload":"` +
						base64.StdEncoding.EncodeToString(fmt.Appendf(nil, `{"of-%d-%d":true}`, writer, round)) + `"}`),
				} {
					if a := r.do("POST", "/kbs/v0/"+path, body, "Authorization", admin); a.status != 200 {
						t.Errorf("%s: %d %s", path, a.status, a.body)
					}
				}
				a := g.get("a/b/c")
				if a.status != 200 {
					t.Errorf("read among writes: %d %s", a.status, a.body)
					continue
				}
				whole("the resource", decrypt(t, a.body, g.key), text)
			}
		})
	}
	wg.Wait()
	policy, err := b64.DecodeString(string(r.mustAdmin("GET", "/kbs/v0/resource-policy", nil).body))
	if err != nil {
		t.Fatal(err)
	}
	whole("the policy", string(policy), rego)
	var values map[string]any
	if err := json.Unmarshal(r.mustAdmin("GET", "/kbs/v0/reference-value", nil).body, &values); err != nil || len(values) != writers*rounds {
		t.Errorf("%d reference values, %v; want %d", len(values), err, writers*rounds)
	}
}

// TestFilesArePrivate: what the server writes, nobody else can read.
func TestFilesArePrivate(t *testing.T) {
	r := ready(t, DialectT)
	err := filepath.Walk(r.dir, func(path string, fi os.FileInfo, err error) error {
		if err == nil && fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, fi.Mode().Perm())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
