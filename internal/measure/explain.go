package measure

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// Change is the one input of a launch that was not as meant. Values are for
// people; Actual says what was launched in place of Meant.
type Change struct {
	Input  string `json:"input"` // "vcpus", "cpu", "guest_features", "append", "kernel", "initrd", "ovmf" or "kernel_hashes"
	Meant  string `json:"meant"`
	Actual string `json:"actual"`
}

func (c Change) String() string { return c.Input + ": " + c.Actual + ", meant was " + c.Meant }

// Alternatives are inputs that may have been launched by mistake.
type Alternatives struct {
	OVMF, Kernel, Initrd []Alternative
	Cmdlines             []string
}

// Alternative is a file that may have been launched in the place of another.
type Alternative struct {
	Name   string
	SHA256 [32]byte
	Image  []byte // a firmware's bytes
}

// Explain looks for the one change to in that gives the launch digest actual:
// another vCPU count, CPU model or SEV_FEATURES, a usual slip in the command
// line, a kernel or initrd left out, or one of the alternatives. It returns nil
// where in itself gives that digest (match) and where no single change does.
func Explain(in Input, actual [48]byte, alt Alternatives) (change *Change, match bool, err error) {
	if in.GuestFeatures == 0 {
		in.GuestFeatures = DefaultGuestFeatures
	}
	f, err := newFirmware(in.OVMF)
	if err != nil {
		return nil, false, err
	}
	r, err := f.launch(in)
	if err != nil {
		return nil, false, err
	}
	if r.LaunchDigest == actual {
		return nil, true, nil
	}
	for _, v := range variants(in, alt) {
		g := f
		if v.ovmf != nil {
			if g, err = newFirmware(v.ovmf); err != nil {
				continue // cannot have been launched
			}
		}
		if r, err := g.launch(v.in); err == nil && r.LaunchDigest == actual {
			return &v.change, false, nil
		}
	}
	return nil, false, nil
}

type variant struct {
	change Change
	in     Input
	ovmf   []byte // nil: the same
}

// variants lists in with one change each, the likely ones first.
func variants(in Input, alt Alternatives) []variant {
	var out []variant
	add := func(input, meant, actual string, change func(*Input)) {
		v := variant{change: Change{input, meant, actual}, in: in}
		change(&v.in)
		out = append(out, v)
	}
	for n := 1; n <= maxVCPUs; n++ {
		if n != in.VCPUs {
			add("vcpus", fmt.Sprint(in.VCPUs), fmt.Sprint(n), func(in *Input) { in.VCPUs = n })
		}
	}
	for sig, models := range modelsBySignature() {
		if own, err := CPUSignature(in.CPU); err == nil && sig != own {
			add("cpu", in.CPU, strings.Join(models, " or "), func(in *Input) { in.CPU = models[0] })
		}
	}
	for _, f := range []struct {
		bits uint64
		why  string
	}{
		{0x1, "SNPActive only: QEMU 9.1 and later on a kernel from 6.10 on"},
		{0x21, "with DebugSwap: a host kernel from before 6.10"},
		{0x201, "with Secure TSC"},
		{0x221, "with DebugSwap and Secure TSC"},
	} {
		if f.bits != in.GuestFeatures {
			add("guest_features", fmt.Sprintf("%#x", in.GuestFeatures), fmt.Sprintf("%#x (%s)", f.bits, f.why), func(in *Input) { in.GuestFeatures = f.bits })
		}
	}
	if in.HasKernel {
		cmdline := func(what, hashed string) {
			sum := sha256.Sum256([]byte(hashed))
			add("append", fmt.Sprintf("%q", in.Cmdline), what, func(in *Input) { in.cmdlineSum = &sum })
		}
		for _, c := range cmdlines(in.Cmdline) {
			cmdline(c.what, c.hashed)
		}
		for _, s := range alt.Cmdlines {
			cmdline(fmt.Sprintf("%q", s), s+"\x00")
		}
		const off = "not measured at all: kernel-hashes=off, or QEMU was given no -kernel"
		add("kernel_hashes", "on", off, func(in *Input) { in.HasKernel, in.HasInitrd = false, false })
		if in.HasInitrd {
			add("initrd", hex.EncodeToString(in.Initrd[:]), "none", func(in *Input) { in.HasInitrd = false })
		}
		for _, a := range alt.Kernel {
			add("kernel", hex.EncodeToString(in.Kernel[:]), a.String(), func(in *Input) { in.Kernel = a.SHA256 })
		}
		for _, a := range alt.Initrd {
			add("initrd", hex.EncodeToString(in.Initrd[:]), a.String(), func(in *Input) { in.Initrd, in.HasInitrd = a.SHA256, true })
		}
	}
	for _, a := range alt.OVMF {
		add("ovmf", HexSHA256(in.OVMF), a.String(), func(*Input) {})
		out[len(out)-1].ovmf = a.Image
	}
	return out
}

func (a Alternative) String() string { return fmt.Sprintf("%s (%x)", a.Name, a.SHA256) }

// cmdlineVariant is what QEMU may have hashed in place of the command line and
// the NUL that ends it.
type cmdlineVariant struct{ what, hashed string }

// cmdlines lists the slips that people make between -append and its prediction.
func cmdlines(s string) []cmdlineVariant {
	trimmed := strings.TrimRight(s, " \t\r\n")
	out := []cmdlineVariant{
		{"the same with a trailing space", s + " \x00"},
		{"the same with a trailing newline", s + "\n\x00"},
		{"the same with a trailing CR LF", s + "\r\n\x00"},
		{"the same with a leading space", " " + s + "\x00"},
		{"the same, hashed without the NUL that ends it", s},
		{"the same with a trailing newline, hashed without the NUL that ends it", s + "\n"},
		{"the same with a second NUL", s + "\x00\x00"},
		{"the same in single quotes", "'" + s + "'\x00"},
		{"the same in double quotes", `"` + s + "\"\x00"},
		{"the same with ` initrd=initrd`, which the guest's firmware adds to /proc/cmdline", s + " initrd=initrd\x00"},
		{"none", "\x00"},
	}
	if trimmed != s {
		out = append(out, cmdlineVariant{"the same without white space at its end", trimmed + "\x00"})
	}
	if one := strings.Join(strings.Fields(s), " "); one != s {
		out = append(out, cmdlineVariant{"the same with single spaces", one + "\x00"})
	}
	words := strings.Split(s, " ")
	for i, w := range words {
		rest := append(append([]string(nil), words[:i]...), words[i+1:]...)
		out = append(out, cmdlineVariant{fmt.Sprintf("the same without the word %q", w), strings.Join(rest, " ") + "\x00"})
	}
	return out
}

// modelsBySignature groups the CPU models that give the same digest.
func modelsBySignature() map[uint32][]string {
	m := map[uint32][]string{}
	for _, model := range CPUModels() {
		if sig, err := CPUSignature(model); err == nil {
			m[sig] = append(m[sig], model)
		}
	}
	return m
}
