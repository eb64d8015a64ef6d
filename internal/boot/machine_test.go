package boot

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"coffer/internal/testenv"
)

// A host that does not read the console holds up a line for the limit, not the machine.
func TestConsoleGivesUp(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	c, err := newConsole(w, 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := c.Write([]byte("a line\n")); n != 7 || err != nil {
		t.Fatalf("a console that is read took %d bytes, %v", n, err)
	}
	if _, err := c.Write(make([]byte, 4<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a console that nobody reads gave %v", err)
	}
	go func() {
		if _, err := r.Read(make([]byte, 8<<20)); err != nil {
			t.Error(err)
		}
	}()
	c.limit = time.Minute
	if n, err := c.Write([]byte("read again\n")); n != 11 || err != nil {
		t.Fatalf("once it is read again it took %d bytes, %v", n, err)
	}
}

func TestConsoleThatTakesNoDeadline(t *testing.T) {
	f, err := os.Create(t.TempDir() + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := newConsole(f, time.Second); err == nil {
		t.Error("a file whose writes cannot be given up passes for a console")
	}
}

// killEnv makes this program PID 1 of a PID namespace.
const killEnv = "BOOT_TEST_KILL_ALL"

func TestMain(m *testing.M) {
	if os.Getenv(killEnv) == "" {
		os.Exit(m.Run())
	}
	// A process that ignores what can be ignored, in a session of its own.
	cmd := exec.Command("/bin/sh", "-c", "trap '' TERM HUP INT; echo ready; while :; do sleep 60; done")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		panic(err)
	}
	if err := cmd.Start(); err != nil {
		panic(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		panic(err)
	}
	killAll()
	fmt.Println(cmd.Wait())
	os.Exit(0)
}

// The power goes only after every process has: what the kernel then waits for is
// the host's.
func TestKillAll(t *testing.T) {
	testenv.Root(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), killEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "signal: killed\n" {
		t.Errorf("%v, %q: want the process killed", err, out)
	}
}
