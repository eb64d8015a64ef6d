package agent

import (
	"bufio"
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"coffer/internal/testenv"
)

// Every page of the program is resident and locked, not those alone that have run.
func TestStay(t *testing.T) {
	err := stay()
	testenv.Need(t, !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOMEM), "memory cannot be locked here")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	smaps, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer smaps.Close()
	parts, size, inside := 0, "", false
	for lines := bufio.NewScanner(smaps); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimSpace(value)
		switch {
		case strings.Contains(name, "-"): // the first line of a mapping
			if inside = strings.HasSuffix(lines.Text(), " "+program); inside {
				parts++
			}
		case inside && name == "Size":
			size = value
		case inside && name == "Rss" && value != size:
			t.Errorf("%s of %s are resident", value, size)
		case inside && name == "VmFlags" && !strings.Contains(value, "lo"):
			t.Errorf("a mapping of %s is not locked: %s", size, value)
		}
	}
	if parts < 3 { // code, constants, variables
		t.Errorf("%d mappings of the program", parts)
	}
}
