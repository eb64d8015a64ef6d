package reaper

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// In a process of its own, which inherits orphans as PID 1 does: many children
// that end at once and are waited for, and as many orphans that nobody waits for.
func TestReaper(t *testing.T) {
	if os.Getenv("REAPER_HELPER") != "" {
		subreaper(t)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestReaper$", "-test.v")
	cmd.Env = append(os.Environ(), "REAPER_HELPER=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func subreaper(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	r := New()
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(stop)
	}()

	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			want := i % 7
			// The shell leaves an orphan behind, then ends with its code.
			cmd := exec.Command("/bin/sh", "-c", "(sleep 0.05 &) ; exit "+strconv.Itoa(want))
			wait, err := r.Start(cmd)
			if err != nil {
				t.Error(err)
				return
			}
			err = wait()
			var exit *exec.ExitError
			switch {
			case want == 0 && err == nil:
			case errors.As(err, &exit) && exit.ExitCode() == want:
			default:
				t.Errorf("child %d: %v, want exit code %d", i, err, want)
			}
		})
	}
	wg.Wait()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		left := children(t)
		if len(left) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("not reaped: %v", left)
		}
	}
	close(stop)
	<-done
	if len(r.managed) != 0 {
		t.Errorf("still managed: %v", r.managed)
	}
}

// children lists the processes whose parent this one is, zombies included.
func children(t *testing.T) (left []string) {
	t.Helper()
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		if _, err := strconv.Atoi(d.Name()); err != nil {
			continue
		}
		f, err := os.Open("/proc/" + d.Name() + "/status")
		if err != nil {
			continue
		}
		for s := bufio.NewScanner(f); s.Scan(); {
			if ppid, ok := strings.CutPrefix(s.Text(), "PPid:\t"); ok && ppid == strconv.Itoa(os.Getpid()) {
				left = append(left, d.Name())
			}
		}
		f.Close()
	}
	return left
}

func TestStartFails(t *testing.T) {
	r := New()
	if _, err := r.Start(exec.Command("/no/such/program")); err == nil {
		t.Error("no error")
	}
	if len(r.managed) != 0 {
		t.Errorf("managed: %v", r.managed)
	}
}
