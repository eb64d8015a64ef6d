package agent

import (
	"encoding/binary"
	"io"
)

// Values of the kernel's input events (include/uapi/linux/input-event-codes.h).
const (
	inputEventSize = 24 // struct input_event on 64-bit: time 16, type 2, code 2, value 4
	evKey          = 1
	keyPower       = 116
	keyPower2      = 356
	keyPressed     = 1
)

// awaitPowerKey reads input events until the power button is pressed. It
// reports false when the device ends.
func awaitPowerKey(r io.Reader) bool {
	var ev [inputEventSize]byte
	for {
		if _, err := io.ReadFull(r, ev[:]); err != nil {
			return false
		}
		code := binary.LittleEndian.Uint16(ev[18:])
		if binary.LittleEndian.Uint16(ev[16:]) == evKey && (code == keyPower || code == keyPower2) &&
			binary.LittleEndian.Uint32(ev[20:]) == keyPressed {
			return true
		}
	}
}
