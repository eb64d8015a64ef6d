package evidence

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// A key that comes after its request was given up is wiped.
func TestLateKeyIsWiped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := bytes.Repeat([]byte{9}, 32)
		s := newSource(TEESNP, false, nil)
		s.derive = func(KeyRequest) ([]byte, error) { time.Sleep(time.Minute); return key, nil }
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.DeriveKey(ctx, KeyRequest{Root: "vcek", VMPL: 1}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a firmware that does not answer gave %v", err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if !bytes.Equal(key, make([]byte, 32)) {
			t.Error("the key is still in memory")
		}
		s.derive = func(KeyRequest) ([]byte, error) { return []byte{1}, nil }
		if got, err := s.DeriveKey(t.Context(), KeyRequest{Root: "vcek", VMPL: 1}); err != nil || len(got) != 1 {
			t.Errorf("afterwards: %x, %v", got, err)
		}
	})
}
