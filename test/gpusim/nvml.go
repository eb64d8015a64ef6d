package gpusim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"coffer/internal/gpu"
)

// Driver is what stands behind the fake libnvidia-ml.so.1 of test/fakenvml: it
// answers its queries over a unix socket. Fields are changed under Edit only.
type Driver struct {
	Devices  []*Device
	Settings gpu.Settings
	Ready    uint32
	Failed   bool         // ready was taken back: it never comes again
	Returns  map[byte]int // NVML's return values by operation; Crash and Hang are two more
	Absent   map[int]int  // index of a device to what NVML returns when asked for it
	Bad      map[int]int  // index of a device to a measurement that it reports wrongly
	Nonce    *[32]byte    // replaces the one asked with
	Replay   []byte       // replaces every report
	Size     int          // of a report, where it is not what was signed

	mu    sync.Mutex
	calls map[byte]int
}

// Return values that are none of NVML's.
const (
	Crash = -1 // the library ends its process
	Hang  = -2 // it does not answer
)

// NewDriver makes a driver for devices that is set up as production is.
func NewDriver(devices ...*Device) *Driver {
	return &Driver{
		Devices: devices, Settings: gpu.Settings{CPU: gpu.CPUSEVSNP, Environment: gpu.EnvironmentOn, Feature: 1},
		Returns: map[byte]int{}, Absent: map[int]int{}, Bad: map[int]int{}, calls: map[byte]int{},
	}
}

// Edit changes the driver while it answers.
func (d *Driver) Edit(change func(*Driver)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change(d)
}

// Calls returns how often an operation was asked for.
func (d *Driver) Calls(op byte) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls[op]
}

// Serve answers until l is closed.
func (d *Driver) Serve(l net.Listener) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			// A guest's port is one connection for all its queries.
			for query := [37]byte{}; ; {
				if _, err := io.ReadFull(c, query[:]); err != nil {
					return
				}
				ret, answer := d.answer(query[0], int(binary.LittleEndian.Uint32(query[1:])), [32]byte(query[5:]))
				if ret == Hang {
					continue
				}
				head := binary.LittleEndian.AppendUint32(nil, uint32(ret))
				head = binary.LittleEndian.AppendUint32(head, uint32(len(answer)))
				c.Write(append(head, answer...))
			}
		}()
	}
}

// NVML's return values.
const (
	invalidArgument = 2
	unknownError    = 999
)

func (d *Driver) answer(op byte, index int, nonce [32]byte) (int, []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls[op]++
	if ret := d.Returns[op]; ret != 0 {
		return ret, nil
	}
	numbers := func(list ...uint32) []byte {
		var b []byte
		for _, n := range list {
			b = binary.LittleEndian.AppendUint32(b, n)
		}
		return b
	}
	switch s := d.Settings; op {
	case 'I':
		return 0, nil
	case 'N':
		return 0, numbers(uint32(len(d.Devices)))
	case 'S':
		return 0, numbers(s.CPU, s.Environment, s.Feature, s.DevTools, s.MultiGPU)
	case 'r':
		return 0, numbers(d.Ready)
	case 'w':
		if d.Failed && index == 1 {
			return invalidArgument, nil
		}
		d.Failed = d.Failed || d.Ready == 1 && index == 0
		d.Ready = uint32(index)
		return 0, nil
	case 'D':
		if len(d.Devices) > 0 {
			return 0, []byte(d.Devices[0].Driver)
		}
		return 0, []byte("0.0")
	}
	if index < 0 || index >= len(d.Devices) {
		return invalidArgument, nil
	}
	dev := d.Devices[index]
	switch op {
	case 'H':
		return d.Absent[index], nil
	case 'P':
		return 0, nil
	case 'U':
		return 0, fmt.Appendf(nil, "GPU-%032x", dev.Chain[0].Cert.SerialNumber)
	case 'V':
		return 0, []byte(dev.VBIOS)
	case 'A':
		return 0, numbers(map[string]uint32{gpu.Hopper: 9, gpu.Blackwell: 10}[dev.Arch])
	case 'C':
		return 0, PEM(dev.Chain)
	case 'R':
		return 0, d.report(index, nonce)
	}
	return unknownError, nil
}

func (d *Driver) report(index int, nonce [32]byte) []byte {
	if d.Nonce != nil {
		nonce = *d.Nonce
	}
	dev := d.Devices[index]
	r := dev.NewReport(nonce)
	if bad, ok := d.Bad[index]; ok {
		r.Blocks[bad][7] ^= 1
	}
	b := r.Sign(dev.Chain[0].Key)
	if d.Replay != nil {
		b = d.Replay
	}
	if d.Size > len(b) {
		b = append(b, make([]byte, d.Size-len(b))...)
	} else if d.Size > 0 {
		b = b[:d.Size]
	}
	return b
}
