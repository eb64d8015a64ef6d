package gpus

import (
	"errors"
	"slices"

	"coffer/internal/gpu"
)

// Found is what a round found of the GPUs, for its record. It holds no secret, and
// no more than a line can.
type Found struct {
	Code    gpu.Code `json:"code,omitempty"` // of the check that failed
	Devices []Device `json:"devices,omitempty"`
}

// Device is one GPU. Where it was not verified, all of it is only what it says itself.
type Device struct {
	Serial  string   `json:"serial"` // of its key's certificate, decimal
	Driver  string   `json:"driver"`
	VBIOS   string   `json:"vbios"`
	Verdict string   `json:"verdict"`
	Code    gpu.Code `json:"code,omitempty"`
}

// Verdicts of a Device.
const (
	verdictPass     = "pass"
	verdictNegative = "negative"
	verdictUnknown  = "unknown"  // a service that had to be asked gave no answer
	verdictUnjudged = "unjudged" // nobody has looked at it: the KBS judges alone, or another GPU has failed before
)

const maxText = 64 // bytes of a text that a GPU says of itself

// list begins with devices that nobody has judged.
func (f *Found) list(evidence []gpu.Evidence) {
	clip := func(s string) string { return s[:min(len(s), maxText)] }
	for _, e := range evidence {
		serial, _ := gpu.Serial(e.Chain) // a chain that cannot be read fails later
		f.Devices = append(f.Devices, Device{Serial: clip(serial), Driver: clip(e.Driver), VBIOS: clip(e.VBIOS), Verdict: verdictUnjudged})
	}
}

// judged takes a judge's answer, who has looked at the first n devices; an error is
// about the last of them.
func (f *Found) judged(n int, err error) {
	for i := range f.Devices {
		d := &f.Devices[i]
		switch {
		case i >= n:
			d.Verdict = verdictUnjudged
		case err == nil || i < n-1:
			d.Verdict = verdictPass
		case codeIn(err).Unreachable():
			d.Verdict, d.Code = verdictUnknown, codeIn(err)
		default:
			d.Verdict, d.Code = verdictNegative, codeIn(err)
		}
	}
}

// unknown marks the devices whose serial is none of those known.
func (f *Found) unknown(serials, known []string) {
	for i, s := range serials {
		if !slices.Contains(known, s) {
			f.Devices[i].Verdict, f.Devices[i].Code = verdictNegative, CodeIdentity
		}
	}
}

// codeIn returns the code of a check that failed, "" where it was none.
func codeIn(err error) gpu.Code {
	var e *gpu.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}
