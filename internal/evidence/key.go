package evidence

import (
	"context"
	"errors"
	"fmt"
)

// KeyRequest asks for a key that the firmware derives from one of its own. VMPL
// is mixed in, so that each privilege level has keys of its own.
type KeyRequest struct {
	Root       string  `json:"root"` // "vcek" or "vmrk"
	VMPL       int     `json:"vmpl"`
	Fields     uint64  `json:"guest_field_select"`
	GuestSVN   uint32  `json:"guest_svn"`
	TCB        uint64  `json:"tcb_version"`
	Mitigation *uint64 `json:"launch_mit_vector,omitempty"`
}

// ErrNoKey means that the platform, or its kernel, cannot derive the key.
var ErrNoKey = errors.New("this platform cannot derive the key")

// DeriveKey returns 32 bytes. The caller wipes them.
func (s *source) DeriveKey(ctx context.Context, q KeyRequest) ([]byte, error) {
	if s.derive == nil {
		return nil, ErrNoKey
	}
	if q.Mitigation != nil {
		return nil, fmt.Errorf("%w: the kernel's interface has no launch mitigation vector", ErrNoKey)
	}
	select {
	case s.busy <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("derived key: an earlier request is still running: %w", ctx.Err())
	}
	type answer struct {
		key []byte
		err error
	}
	done := make(chan answer, 1)
	go func() { // the call sits in the kernel and knows no context
		defer func() { <-s.busy }()
		key, err := s.derive(q)
		done <- answer{key, err}
	}()
	select {
	case a := <-done:
		if a.err != nil {
			return nil, fmt.Errorf("derived key of VMPL %d: %w", q.VMPL, a.err)
		}
		return a.key, nil
	case <-ctx.Done():
		go func() { clear((<-done).key) }() // nobody else wipes it
		return nil, fmt.Errorf("derived key of VMPL %d: no answer: %w", q.VMPL, ctx.Err())
	}
}
