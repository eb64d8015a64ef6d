package cli

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"coffer/hostbuild/bundle"
	"coffer/hostbuild/config"
	"coffer/hostbuild/kbs"
	"coffer/hostbuild/settings"
	"coffer/internal/testenv"
	"coffer/test/dockersave"
	"coffer/test/fakebase"
	"coffer/test/flarekit"
)

func TestMain(m *testing.M) {
	run := func() { os.Exit(Main(context.Background(), "test", os.Args)) }
	testscript.Main(m, map[string]func(){"hostbuild": run, "cvm_build": run, "cvm_build.sh": run,
		"nvflare-reader": func() { os.Exit(nvflareReader(os.Args[1:])) }})
}

// nvflareReader runs a command as NVFlare's packager does: it waits for a line of
// standard output, then for one of standard error, in turn, and so stands still
// for ever where one of the two fills its pipe while the other is silent.
func nvflareReader(argv []string) int {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var lines [2]*bufio.Reader
	for i, pipe := range []func() (io.ReadCloser, error){cmd.StdoutPipe, cmd.StderrPipe} {
		r, err := pipe()
		if err != nil {
			panic(err)
		}
		lines[i] = bufio.NewReader(r)
	}
	if err := cmd.Start(); err != nil {
		panic(err)
	}
	for ended := 0; ended < len(lines); {
		ended = 0
		for _, r := range lines {
			line, err := r.ReadString('\n')
			fmt.Print(line)
			if err != nil {
				ended++
			}
		}
	}
	cmd.Wait()
	if ctx.Err() != nil {
		fmt.Println("nvflare-reader: dead-lock")
		return 99
	}
	return cmd.ProcessState.ExitCode()
}

// TestScripts drives the program as people and NVFlare do: real bundles, without
// a guest's programs in them, and a real KBS in this process. A script finds:
//
//	$SETTINGS        settings of a build host; bundles go to $WORK/bundles
//	$OTHER_ADMIN     the same with an admin key that the KBS does not know
//	$KBS_URL, $BASE  address of the KBS, whose folder is $WORK/kbs; a guest base
//	image FILE [PACKAGE...]          an archive, with Python packages
//	two-images FILE                  an archive of two images
//	truncate FILE SIZE               cuts a file
//	kit FOLDER [no-cc|sign-first|gpu]  a startup kit
//	tmpfs FOLDER SIZE                a small file system; needs root
//	nothing FOLDER                   fails unless nothing lies in it, hidden files included
//	bundle-id FILE                   sets $ID to the id in a file
//	example VERB...                  runs the examples of a verb's help
//	report FILE                      a report of the bundle in this folder, with 5 vCPUs
//	usage COMMAND...                 fails unless the command's exit code is 2
func TestScripts(t *testing.T) {
	testenv.LookTool(t, "mke2fs")
	base := t.TempDir()
	fakebase.Write(t, base)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup:               func(e *testscript.Env) error { return setup(e, base) },
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"image":      func(ts *testscript.TestScript, _ bool, args []string) { ts.Check(image(ts.MkAbs(args[0]), args[1:])) },
			"two-images": func(ts *testscript.TestScript, _ bool, args []string) { ts.Check(twoImages(ts.MkAbs(args[0]))) },
			"kit":        func(ts *testscript.TestScript, _ bool, args []string) { ts.Check(kit(ts.MkAbs(args[0]), args[1:])) },
			"truncate": func(ts *testscript.TestScript, _ bool, args []string) {
				var size int64
				_, err := fmt.Sscan(args[1], &size)
				ts.Check(errors.Join(err, os.Truncate(ts.MkAbs(args[0]), size)))
			},
			"tmpfs": func(ts *testscript.TestScript, _ bool, args []string) {
				dir := ts.MkAbs(args[0])
				ts.Check(os.MkdirAll(dir, 0o755))
				ts.Check(unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+args[1]))
				ts.Defer(func() { unix.Unmount(dir, unix.MNT_DETACH) })
			},
			"nothing": func(ts *testscript.TestScript, _ bool, args []string) {
				entries, err := os.ReadDir(ts.MkAbs(args[0]))
				if !errors.Is(err, os.ErrNotExist) {
					ts.Check(err)
				}
				for _, e := range entries {
					ts.Fatalf("%s holds %s", args[0], e.Name())
				}
			},
			"bundle-id": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Setenv("ID", strings.TrimSpace(ts.ReadFile(args[0])))
			},
			"example": example,
			"report": func(ts *testscript.TestScript, _ bool, args []string) { // of 5 vCPUs, of the bundle in this folder
				m, err := bundle.ReadManifest(ts.MkAbs("."))
				ts.Check(err)
				ts.Check(os.WriteFile(ts.MkAbs(args[0]), reportOf(t, digestOf(t, ts.MkAbs("."), "EPYC-v4", 5, m.Cmdline)), 0o644))
			},
			"usage": func(ts *testscript.TestScript, _ bool, args []string) {
				var exit *exec.ExitError
				if err := ts.Exec(args[0], args[1:]...); !errors.As(err, &exit) || exit.ExitCode() != 2 {
					ts.Fatalf("%q: %v, want exit code 2", args, err)
				}
			},
		},
		Condition: func(cond string) (bool, error) {
			if cond != "root" {
				return false, fmt.Errorf("unknown condition %s", cond)
			}
			return os.Geteuid() == 0, nil
		},
	})
}

func example(ts *testscript.TestScript, _ bool, verb []string) {
	c, rest, err := new(App).Command().Find(verb)
	if err != nil || len(rest) > 0 {
		ts.Fatalf("no verb %q: %v", verb, err)
	}
	places := strings.NewReplacer("cvm_0123456789ab", ts.Getenv("ID"), "/srv/", ts.Getenv("WORK")+"/srv/")
	for line := range strings.Lines(c.Example) {
		ts.Check(ts.Exec("sh", "-c", places.Replace(line)))
	}
}

// Every verb that does something has an example, and each is a command line that
// can be read.
func TestExamples(t *testing.T) {
	app := new(App)
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			walk(sub)
		}
		if c.Example == "" && !c.HasSubCommands() {
			t.Errorf("%s has no example", c.CommandPath())
		}
		for line := range strings.Lines(c.Example) {
			line, _, _ = strings.Cut(quoted.ReplaceAllString(line, "X"), "|")
			words := strings.Fields(redirected.ReplaceAllString(line, ""))
			if words[0] == "cvm_build" {
				words = append([]string{"hostbuild", "cvm"}, words[1:]...)
			}
			root := app.Command()
			cmd, rest, err := root.Find(words[1:])
			if err == nil {
				err = cmd.ParseFlags(rest)
			}
			if err == nil && cmd.Args != nil {
				err = cmd.Args(cmd, cmd.Flags().Args())
			}
			if err != nil || words[0] != "hostbuild" || c.HasParent() && cmd.CommandPath() != c.CommandPath() {
				t.Errorf("%s: example %q: %v", c.CommandPath(), line, err)
			}
		}
	}
	walk(app.Command())
}

// quoted is a word of shell that holds blanks.
var quoted = regexp.MustCompile(`"[^"]*"|'[^']*'|\$\([^)]*\)`)

var redirected = regexp.MustCompile(`[<>] ?[^ ]+`)

func setup(e *testscript.Env, base string) error {
	dir := filepath.Join(e.WorkDir, "kbs")
	if err := kbs.Init(dir, kbs.Options{Hosts: []string{"127.0.0.1"}}); err != nil {
		return err
	}
	server, err := kbs.New(kbs.Options{Dir: dir, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()
	e.Defer(func() { cancel(); <-served })

	other := filepath.Join(e.WorkDir, "other-kbs")
	if err := errors.Join(kbs.Init(other, kbs.Options{Hosts: []string{"127.0.0.1"}}), os.Mkdir(filepath.Join(dir, "policy"), 0o755)); err != nil {
		return err
	}
	for name, key := range map[string]string{"SETTINGS": dir, "OTHER_ADMIN": other} {
		file := filepath.Join(e.WorkDir, strings.ToLower(name)+".yaml")
		text := fmt.Sprintf("kbs:\n  url: https://%s\n  ca: %s/ca.pem\n  admin_key: %s/admin.key\npolicy_dir: %s/policy\nbase_dir: %s\noutput_dir: %s/bundles\n",
			l.Addr(), dir, key, dir, base, e.WorkDir)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return err
		}
		e.Setenv(name, file)
	}
	e.Setenv("COFFER_SETTINGS", e.Getenv("SETTINGS"))
	e.Setenv("KBS_URL", "https://"+l.Addr().String())
	e.Setenv("BASE", base)
	e.Setenv("HOME", e.WorkDir)
	return nil
}

// incompressible fills a layer so that a cut archive is cut inside of it.
func incompressible() []byte {
	var b []byte
	for i := range 4096 {
		sum := sha256.Sum256([]byte{byte(i), byte(i >> 8)})
		b = append(b, sum[:]...)
	}
	return b
}

func image(path string, packages []string) error {
	entries := []dockersave.Entry{{Name: "app", Mode: 0o755, Body: incompressible()}}
	for _, p := range packages {
		entries = append(entries, dockersave.Entry{Name: "usr/lib/python3/dist-packages/" + p + "/__init__.py", Body: []byte("#\n")})
	}
	layer, err := dockersave.Layer(entries...)
	if err != nil {
		return err
	}
	return dockersave.Image{Tag: "app:1", Entrypoint: []string{"/app"}, Layers: [][]byte{layer}}.SaveLegacy(path)
}

func kit(dir string, args []string) error {
	k := flarekit.Kit{}
	for _, a := range args {
		switch a {
		case "no-cc":
			k.NoCC = true
		case "sign-first":
			k.SignFirst = true
		case "gpu":
			k.Authorizers = map[string]string{"snp_authorizer": flarekit.SNP, "gpu_authorizer": flarekit.GPU}
		default:
			return fmt.Errorf("kit: unknown %q", a)
		}
	}
	return k.Make(dir)
}

func twoImages(path string) error {
	var b bytes.Buffer
	var images []dockersave.Image
	for _, name := range []string{"one", "two"} {
		layer, err := dockersave.Layer(dockersave.Entry{Name: name, Body: []byte(name)})
		if err != nil {
			return err
		}
		images = append(images, dockersave.Image{Tag: name + ":1", Entrypoint: []string{"/" + name}, Layers: [][]byte{layer}})
	}
	if err := dockersave.WriteLegacy(&b, images...); err != nil {
		return err
	}
	return os.WriteFile(path, b.Bytes(), 0o644)
}

// On a terminal, init asks for what is not said, again where nothing is answered.
func TestInitAsks(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	var out, errs bytes.Buffer
	a := &App{Version: "test", Asks: true, Stdout: &out, Stderr: &errs,
		Stdin: strings.NewReader("https://127.0.0.1:1\n\nca.pem\n~/admin.key\npolicy\napp: 1.tar.gz\n")}
	t.Setenv("HOME", dir)
	code := a.Run(context.Background(), []string{"hostbuild", "--settings", "settings.yaml", "init", "--base-dir", "base"})
	if code != 1 || !strings.Contains(out.String(), "MISSING  kbs.ca") { // there is none
		t.Errorf("code %d, %s%s", code, out.String(), errs.String())
	}
	if n := strings.Count(errs.String(), "PEM file of the authority"); n != 2 {
		t.Errorf("an empty answer is asked again %d times: %q", n-1, errs.String())
	}
	s, err := settings.Read("settings.yaml")
	if err != nil || s.KBSURL != "https://127.0.0.1:1" || s.KBSCA != filepath.Join(dir, "ca.pem") || s.AdminKey != filepath.Join(dir, "admin.key") {
		t.Errorf("%+v, %v", s, err)
	}
	c, err := config.Read("CONFIG.yaml")
	if err != nil || c.DockerArchive != filepath.Join(dir, "app: 1.tar.gz") || len(c.Warnings) != 0 {
		t.Errorf("%+v, %v", c, err)
	}
	a.Stdin = strings.NewReader("https://127.0.0.1:1\n")
	if code := a.Run(context.Background(), []string{"hostbuild", "--settings", "cut.yaml", "init"}); code != 1 {
		t.Errorf("answers that end: code %d", code)
	}
}
