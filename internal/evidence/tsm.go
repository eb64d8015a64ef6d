package evidence

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"coffer/internal/strict"

	"golang.org/x/sys/unix"
)

// tsmDir is where configfs-tsm takes requests
// (Documentation/ABI/testing/configfs-tsm in the kernel's source).
const tsmDir = "/sys/kernel/config/tsm/report"

// snpProvider is the content of the attribute "provider" on SEV-SNP.
const snpProvider = "sev_guest"

// Bounds of what is read: the kernel's own are 32 KiB for either blob.
const (
	maxBlob = 64 << 10
	maxAttr = 256
)

// tsm reads reports from configfs-tsm. Making and removing an entry is injected,
// because only the kernel makes a directory that comes with files.
type tsm struct {
	mkdir func() (string, error)
	rmdir func(string) error
}

func newTSM(dir string) tsm {
	return tsm{
		mkdir: func() (string, error) { return os.MkdirTemp(dir, "coffer-") },
		rmdir: os.Remove,
	}
}

func (t tsm) report(_ context.Context, reportData [64]byte, vmpl int) (report, certs []byte, err error) {
	entry, err := t.mkdir()
	if err != nil {
		return nil, nil, fmt.Errorf("%w: configfs-tsm has no provider, so this is no SEV-SNP guest, or sev-guest is not loaded: %w", ErrNoDevice, err)
	}
	defer func() {
		if e := t.rmdir(entry); e != nil && err == nil {
			err = fmt.Errorf("remove the request: %w", e)
		}
	}()

	if err := writeAttr(entry, "inblob", reportData[:]); err != nil {
		return nil, nil, err
	}
	if err := writeAttr(entry, "privlevel", []byte(strconv.Itoa(vmpl))); err != nil {
		return nil, nil, err
	}
	const writes = "2"

	report, err = readAttr(entry, "outblob", maxBlob)
	if errors.Is(err, unix.ENOTTY) { // sev-guest's answer for it
		err = fmt.Errorf("%w: %w", ErrKeyDisabled, err)
	}
	if err != nil {
		return nil, nil, err
	}
	// The host need not give certificates.
	if certs, err = readAttr(entry, "auxblob", maxBlob); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	for _, a := range []struct{ name, want string }{{"provider", snpProvider}, {"generation", writes}} {
		got, err := readAttr(entry, a.name, maxAttr)
		if err != nil {
			return nil, nil, err
		}
		if s := strings.TrimSpace(string(got)); s != a.want {
			return nil, nil, fmt.Errorf("%w: %s is %q, want %q", ErrReport, a.name, s, a.want)
		}
	}
	return report, certs, nil
}

// writeAttr hands a value over in one write, as configfs wants it.
func writeAttr(entry, name string, value []byte) error {
	f, err := os.OpenFile(filepath.Join(entry, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(value)
	return errors.Join(err, f.Close()) // a binary attribute is judged at close
}

func readAttr(entry, name string, limit int64) ([]byte, error) {
	b, err := strict.ReadFile(filepath.Join(entry, name), limit)
	if errors.Is(err, strict.ErrTooLarge) {
		err = fmt.Errorf("%w: %w", ErrReport, err)
	}
	return b, err
}
