// Package strict reads what somebody else wrote: no more of it than a limit, and
// JSON that is one document without a field that is not known.
package strict

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

// ErrTooLarge says that there is more than the limit.
var ErrTooLarge = errors.New("too large")

// ReadAll reads all of r, at most limit bytes.
func ReadAll(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, limit)
	}
	return b, err
}

// ReadFile reads a file of at most limit bytes. Its error names the file.
func ReadFile(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := ReadAll(f, limit)
	if errors.Is(err, ErrTooLarge) {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return b, err
}

// JSON decodes data into v: one document and nothing behind it, each of whose
// fields v has.
func JSON(data []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("data after the document")
	}
	return nil
}
