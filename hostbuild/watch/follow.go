package watch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
)

// Follow gives the file's content to f as it grows, each poll an empty text
// where nothing is new, until f returns false. A file that is not there yet is
// waited for; one that was replaced, as launch_vm.sh does, or cut is read anew.
func Follow(ctx context.Context, path string, poll time.Duration, f func(text []byte) bool) error {
	var file *os.File
	defer func() {
		if file != nil {
			file.Close()
		}
	}()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	buf := make([]byte, 64<<10)
	for {
		if file == nil {
			var err error
			if file, err = os.Open(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		for file != nil {
			n, err := file.Read(buf)
			if n > 0 && !f(buf[:n]) {
				return nil
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return fmt.Errorf("read %s: %w", path, err)
			}
		}
		if !f(nil) {
			return nil
		}
		if file != nil && replaced(file, path) {
			file.Close()
			file = nil
			continue
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// replaced says whether path is another file than the open one, or shorter than
// what was read.
func replaced(file *os.File, path string) bool {
	there, err := os.Stat(path)
	if err != nil {
		return false // it will come
	}
	open, err := file.Stat()
	if err != nil || !os.SameFile(there, open) {
		return true
	}
	at, err := file.Seek(0, io.SeekCurrent)
	return err == nil && there.Size() < at
}
