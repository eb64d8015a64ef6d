//go:build !simulated

package evidence

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// guestDevice is the driver's own interface; configfs-tsm has no derived keys.
const guestDevice = "/dev/sev-guest"

// getDerivedKey is _IOWR('S', 1, struct snp_guest_request_ioctl) of
// linux/sev-guest.h.
const getDerivedKey = 0xc0205301

// guestRequest is struct snp_guest_request_ioctl.
type guestRequest struct {
	version  uint8
	_        [7]byte
	request  uint64
	response uint64
	failure  uint64 // firmware's and VMM's error
}

// requestBytes is struct snp_derived_key_req.
func (q KeyRequest) requestBytes() []byte {
	b := make([]byte, 0, 32)
	root := uint32(0)
	if q.Root == "vmrk" {
		root = 1
	}
	le := binary.LittleEndian
	b = le.AppendUint32(b, root)
	b = le.AppendUint32(b, 0)
	b = le.AppendUint64(b, q.Fields)
	b = le.AppendUint32(b, uint32(q.VMPL))
	b = le.AppendUint32(b, q.GuestSVN)
	return le.AppendUint64(b, q.TCB)
}

// keyOf reads the firmware's MSG_KEY_RSP: status, 28 reserved bytes, the key.
func keyOf(response []byte) ([]byte, error) {
	if status := binary.LittleEndian.Uint32(response); status != 0 {
		return nil, fmt.Errorf("the firmware refuses with status %#x", status)
	}
	return append([]byte(nil), response[32:64]...), nil
}

func deriveKey(q KeyRequest) ([]byte, error) {
	f, err := os.OpenFile(guestDevice, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrNoKey, err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	request, response := q.requestBytes(), make([]byte, 64)
	defer clear(response)
	var pinned runtime.Pinner
	defer pinned.Unpin()
	pinned.Pin(&request[0])
	pinned.Pin(&response[0])
	call := guestRequest{
		version: 1,
		request: uint64(uintptr(unsafe.Pointer(&request[0]))), response: uint64(uintptr(unsafe.Pointer(&response[0]))),
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), getDerivedKey, uintptr(unsafe.Pointer(&call))); errno != 0 {
		return nil, fmt.Errorf("%w (firmware %#x)", errno, call.failure)
	}
	return keyOf(response)
}
