package treedigest

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"coffer/internal/testenv"
)

func write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o600), os.Chmod(name, mode)); err != nil {
		t.Fatal(err)
	}
}

// kit makes a folder and its tree as the guest sees it: below "kit".
func kit(t *testing.T) (drive string, tree Tree) {
	t.Helper()
	drive = t.TempDir()
	write(t, drive+"/kit/startup/start.sh", "#!/bin/sh\n", 0o755)
	write(t, drive+"/kit/startup/server.key", "secret", 0o600)
	write(t, drive+"/kit/local/empty", "", 0o644)
	if err := errors.Join(os.Mkdir(drive+"/kit/transfer", 0o755), os.Chmod(drive+"/kit/local", 0o555), os.Symlink("startup/start.sh", drive+"/kit/start"),
		os.Mkdir(drive+"/lost+found", 0o700)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(drive+"/kit/local", 0o755) })
	tree, err := Scan(map[string]string{"kit": drive + "/kit"})
	if err != nil {
		t.Fatal(err)
	}
	return drive, tree
}

func copyDir(t *testing.T) string {
	dst := filepath.Join(t.TempDir(), "copy")
	t.Cleanup(func() { os.Chmod(dst+"/kit/local", 0o755) })
	return dst
}

func TestCopyIsTheSame(t *testing.T) {
	drive, tree := kit(t)
	var paths []string
	for _, e := range tree {
		paths = append(paths, e.Path)
	}
	if got := strings.Join(paths, " "); got != "kit kit/local kit/local/empty kit/start kit/startup kit/startup/server.key kit/startup/start.sh kit/transfer" {
		t.Errorf("tree lists %s", got)
	}
	raw, err := json.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	var back Tree
	if err := json.Unmarshal(raw, &back); err != nil || back.Validate() != nil || back.Digest() != tree.Digest() {
		t.Fatalf("the list does not survive JSON: %v, %v\n%s", err, back.Validate(), raw)
	}
	dst := copyDir(t)
	if err := back.Copy(t.Context(), drive, dst, true); err != nil {
		t.Fatal(err)
	}
	again, err := Scan(map[string]string{"kit": dst + "/kit"})
	if err != nil || again.Digest() != tree.Digest() {
		t.Errorf("the copy is another: %v\n%v\n%v", err, again, tree)
	}
}

func TestDifferencesAreNamed(t *testing.T) {
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	for _, tc := range []struct {
		name   string
		change func(drive string)
		want   string
		loose  bool // also a difference where only files are pinned
	}{
		{"byte changed", func(d string) { write(t, d+"/kit/startup/server.key", "Secret", 0o600) }, `"kit/startup/server.key" was changed: SHA-256 is `, true},
		{"longer", func(d string) { write(t, d+"/kit/startup/server.key", "secret!", 0o600) }, `"kit/startup/server.key" has more than its 6 bytes`, true},
		{"shorter", func(d string) { write(t, d+"/kit/startup/server.key", "s", 0o600) }, `"kit/startup/server.key" has 1 bytes, and had 6`, true},
		{"file removed", func(d string) { must(os.Remove(d + "/kit/startup/server.key")) }, `"kit/startup/server.key" was removed`, true},
		{"folder removed", func(d string) { must(os.RemoveAll(d + "/kit/startup")) }, `"kit/startup" was removed`, true},
		{"file mode", func(d string) { must(os.Chmod(d+"/kit/startup/start.sh", 0o644)) }, `"kit/startup/start.sh" has mode 0644, and had 0755`, true},
		{"file becomes a link", func(d string) {
			must(os.Remove(d + "/kit/startup/server.key"))
			must(os.Symlink("start.sh", d+"/kit/startup/server.key"))
		}, `"kit/startup/server.key" is no longer a file`, true},
		{"file becomes a pipe", func(d string) {
			must(os.Remove(d + "/kit/startup/start.sh"))
			must(syscall.Mkfifo(d+"/kit/startup/start.sh", 0o755))
		}, `"kit/startup/start.sh" is no longer a file`, true},
		{"folder becomes a link out of the drive", func(d string) {
			must(os.Rename(d+"/kit/startup", d+"-startup"))
			must(os.Symlink(d+"-startup", d+"/kit/startup"))
		}, `"kit/startup" is no longer a folder`, true},
		{"link", func(d string) { must(os.Remove(d + "/kit/start")); must(os.Symlink("/vault/x", d+"/kit/start")) }, `"kit/start" leads to "/vault/x", and led to "startup/start.sh"`, false},
		{"file added", func(d string) { write(t, d+"/kit/startup/x", "", 0o644) }, `"kit/startup/x" was added`, false},
		{"folder added", func(d string) { must(os.Mkdir(d+"/kit/transfer/x", 0o755)) }, `"kit/transfer/x" was added`, false},
		{"added beside", func(d string) { write(t, d+"/other", "", 0o644) }, `"other" was added`, false},
		{"folder mode", func(d string) { must(os.Chmod(d+"/kit/startup", 0o777)) }, `"kit/startup" has mode 0777, and had 0755`, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			drive, tree := kit(t)
			files, err := Scan(map[string]string{"kit": drive + "/kit"}, "kit/startup/server.key", "kit/startup/start.sh")
			if err != nil || len(files) != 4 {
				t.Fatalf("%v, %v", files, err)
			}
			tc.change(drive)
			var d *Difference
			if err := tree.Copy(t.Context(), drive, copyDir(t), true); !errors.As(err, &d) || !strings.HasPrefix(err.Error(), tc.want) {
				t.Errorf("pinned: %v, want %s", err, tc.want)
			}
			err = files.Copy(t.Context(), drive, copyDir(t), false)
			if tc.loose && (!errors.As(err, &d) || !strings.HasPrefix(err.Error(), tc.want)) {
				t.Errorf("required: %v, want %s", err, tc.want)
			}
			if !tc.loose && err != nil {
				t.Errorf("required: %v, want none", err)
			}
		})
	}
}

// The copy is what was hashed: it does not change when the drive does.
func TestCopyIsIndependent(t *testing.T) {
	drive, tree := kit(t)
	dst := copyDir(t)
	if err := tree.Copy(t.Context(), drive, dst, true); err != nil {
		t.Fatal(err)
	}
	write(t, drive+"/kit/startup/start.sh", "#!/bin/evil\n", 0o755)
	if b, _ := os.ReadFile(dst + "/kit/startup/start.sh"); string(b) != "#!/bin/sh\n" {
		t.Errorf("the copy reads %q", b)
	}
}

func TestScanOfNamedFiles(t *testing.T) {
	drive, _ := kit(t)
	for name, want := range map[string]string{"kit/nothing": "is not there", "kit/startup": "is a folder", "other": "is not there"} {
		if _, err := Scan(map[string]string{"kit": drive + "/kit"}, name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What else is there does not count, not even against the limits.
	if err := os.Truncate(drive+"/kit/local/empty", 1<<40); err != nil {
		t.Fatal(err)
	}
	if _, err := Scan(map[string]string{"kit": drive + "/kit"}, "kit/startup/start.sh"); err != nil {
		t.Error(err)
	}
}

func TestScanRefuses(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mkfifo(dir+"/pipe", 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Scan(map[string]string{"x": dir}); err == nil || !strings.Contains(err.Error(), dir+"/pipe is neither file, folder nor link") {
		t.Errorf("a pipe: %v", err)
	}
	many := t.TempDir()
	for i := range maxEntries + 1 {
		write(t, filepath.Join(many, "f"+string(rune('a'+i%26))+strings.Repeat("x", i/26)), "", 0o644)
	}
	if _, err := Scan(map[string]string{"x": many}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("many files: %v", err)
	}
	big := t.TempDir()
	f, err := os.Create(big + "/sparse")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 40); err != nil {
		testenv.Need(t, false, "no sparse files here: "+err.Error())
	}
	if _, err := Scan(map[string]string{"x": big}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a large file: %v", err)
	}
}

// A single file may stand in the place of a folder.
func TestScanFile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/a.json", "{}", 0o640)
	tree, err := Scan(map[string]string{"conf": dir + "/a.json"})
	if err != nil || len(tree) != 1 || tree[0].Path != "conf" || tree[0].Mode != 0o640 || tree[0].Size != 2 {
		t.Errorf("%+v, %v", tree, err)
	}
}

func TestValidate(t *testing.T) {
	sum := strings.Repeat("ab", 32)
	for _, tc := range []struct{ name, list, want string }{
		{"climbs out", `[{"path":"../x","mode":"0644","sha256":"` + sum + `"}]`, "not a clean relative one"},
		{"absolute", `[{"path":"/x","mode":"0755"}]`, "not a clean relative one"},
		{"not clean", `[{"path":"a/","mode":"0755"}]`, "not a clean relative one"},
		{"twice", `[{"path":"a","mode":"0755"},{"path":"a","mode":"0755"}]`, "out of order"},
		{"no parent", `[{"path":"a/b","mode":"0755"}]`, "folder of \"a/b\" is not in the list"},
		{"parent is a link", `[{"path":"a","link":"/etc"},{"path":"a/b","mode":"0755"}]`, "folder of \"a/b\" is not in the list"},
		{"digest", `[{"path":"a","mode":"0644","sha256":"ab"}]`, "not 64 hex"},
		{"size of a folder", `[{"path":"a","mode":"0755","size":1}]`, "out of range"},
		{"size", `[{"path":"a","mode":"0755","size":100000000,"sha256":"` + sum + `"}]`, "out of range"},
		{"file and link", `[{"path":"a","link":"x","sha256":"` + sum + `"}]`, "both file and link"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var tree Tree
			if err := json.Unmarshal([]byte(tc.list), &tree); err != nil {
				t.Fatal(err)
			}
			if err := tree.Validate(); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	for _, mode := range []string{"644", "00644", "0o644", "0999", "17777", ""} {
		var m Mode
		if err := m.UnmarshalText([]byte(mode)); err == nil {
			t.Errorf("mode %q was read as %v", mode, m)
		}
	}
}

func FuzzTree(f *testing.F) {
	f.Add([]byte(`[{"path":"a","mode":"0755"},{"path":"a/b","mode":"0644","size":1,"sha256":"` + strings.Repeat("ab", 32) + `"},{"path":"l","link":"a"}]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var tree Tree
		if json.Unmarshal(raw, &tree) != nil || tree.Validate() != nil {
			return
		}
		outside := t.TempDir()
		dst := filepath.Join(outside, "dst")
		src := t.TempDir()
		if err := tree.Copy(t.Context(), src, dst, true); err == nil && len(tree) > 0 {
			t.Error("copied from nothing")
		}
		if names, _ := filepath.Glob(outside + "/*"); len(names) != 1 {
			t.Errorf("something lies outside: %v", names)
		}
	})
}
