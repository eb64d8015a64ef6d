//go:build !simulated

package evidence

import (
	"bytes"
	"encoding/hex"
	"testing"
	"unsafe"
)

// The structures of linux/sev-guest.h.
func TestKeyRequestLayout(t *testing.T) {
	if n := unsafe.Sizeof(guestRequest{}); n != 32 {
		t.Errorf("the call's structure has %d bytes", n)
	}
	got := KeyRequest{Root: "vmrk", VMPL: 2, Fields: 0x3f, GuestSVN: 7, TCB: 0x0102030405060708}.requestBytes()
	const want = "01000000" + "00000000" + "3f00000000000000" + "02000000" + "07000000" + "0807060504030201"
	if hex.EncodeToString(got) != want {
		t.Errorf("request is %x", got)
	}
	response := append(make([]byte, 32), bytes.Repeat([]byte{9}, 32)...)
	if key, err := keyOf(response); err != nil || !bytes.Equal(key, response[32:]) {
		t.Errorf("key is %x, %v", key, err)
	}
	response[0] = 0x16
	if _, err := keyOf(response); err == nil {
		t.Error("a refusal was taken for a key")
	}
}
