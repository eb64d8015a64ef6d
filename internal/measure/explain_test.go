package measure

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func explainInput(t testing.TB) Input {
	return Input{OVMF: load(t).synthetic(t), Kernel: [32]byte{1}, Initrd: [32]byte{2}, HasKernel: true, HasInitrd: true,
		Cmdline: "console=ttyS0  ro vm_id=a ", VCPUs: 2, CPU: "EPYC-v4"}
}

// Each single change is named, whichever of the two launches was meant.
func TestExplainNamesTheOneChange(t *testing.T) {
	other := bytes.Clone(explainInput(t).OVMF)
	other[0] ^= 1
	alt := Alternatives{
		OVMF:     []Alternative{{"old.fd", sha256.Sum256(other), other}, {"broken.fd", [32]byte{}, []byte("x")}},
		Kernel:   []Alternative{{Name: "vmlinuz.old", SHA256: [32]byte{9}}},
		Initrd:   []Alternative{{Name: "initrd.old", SHA256: [32]byte{8}}},
		Cmdlines: []string{"quiet"},
	}
	nul := sha256.Sum256([]byte("console=ttyS0  ro vm_id=a "))
	for name, tc := range map[string]struct {
		change        func(*Input)
		input, actual string
	}{
		"more vCPUs":       {func(in *Input) { in.VCPUs = 64 }, "vcpus", "64"},
		"fewer vCPUs":      {func(in *Input) { in.VCPUs = 1 }, "vcpus", "1"},
		"most vCPUs":       {func(in *Input) { in.VCPUs = maxVCPUs }, "vcpus", "512"},
		"CPU":              {func(in *Input) { in.CPU = "EPYC-Genoa" }, "cpu", "EPYC-Genoa or EPYC-Genoa-v1"},
		"DebugSwap":        {func(in *Input) { in.GuestFeatures = 0x21 }, "guest_features", "0x21"},
		"Secure TSC":       {func(in *Input) { in.GuestFeatures = 0x201 }, "guest_features", "0x201"},
		"trailing space":   {func(in *Input) { in.Cmdline += " " }, "append", "trailing space"},
		"trailing newline": {func(in *Input) { in.Cmdline += "\n" }, "append", "trailing newline"},
		"trimmed":          {func(in *Input) { in.Cmdline = strings.TrimSpace(in.Cmdline) }, "append", "without white space at its end"},
		"single spaces":    {func(in *Input) { in.Cmdline = "console=ttyS0 ro vm_id=a" }, "append", "single spaces"},
		"a word missing":   {func(in *Input) { in.Cmdline = "console=ttyS0  vm_id=a " }, "append", `without the word "ro"`},
		"no NUL":           {func(in *Input) { in.cmdlineSum = &nul }, "append", "without the NUL"},
		"no command line":  {func(in *Input) { in.Cmdline = "" }, "append", "none"},
		"given":            {func(in *Input) { in.Cmdline = "quiet" }, "append", `"quiet"`},
		"no hashes":        {func(in *Input) { in.HasKernel, in.HasInitrd = false, false }, "kernel_hashes", "kernel-hashes=off"},
		"no initrd":        {func(in *Input) { in.HasInitrd = false }, "initrd", "none"},
		"other initrd":     {func(in *Input) { in.Initrd = [32]byte{8} }, "initrd", "initrd.old (08"},
		"other kernel":     {func(in *Input) { in.Kernel = [32]byte{9} }, "kernel", "vmlinuz.old (09"},
		"other firmware":   {func(in *Input) { in.OVMF = other }, "ovmf", "old.fd ("},
	} {
		t.Run(name, func(t *testing.T) {
			in := explainInput(t)
			tc.change(&in)
			r, err := Digest(in)
			if err != nil {
				t.Fatal(err)
			}
			change, match, err := Explain(explainInput(t), r.LaunchDigest, alt)
			if err != nil || match || change == nil {
				t.Fatalf("change %v, match %v, %v", change, match, err)
			}
			if change.Input != tc.input || !strings.Contains(change.Actual, tc.actual) {
				t.Errorf("%s, want %s: %s", change, tc.input, tc.actual)
			}
		})
	}
}

func TestExplainSaysNothingItCannotKnow(t *testing.T) {
	in := explainInput(t)
	r, err := Digest(in)
	if err != nil {
		t.Fatal(err)
	}
	if change, match, err := Explain(in, r.LaunchDigest, Alternatives{}); change != nil || !match || err != nil {
		t.Errorf("the digest itself: %v, %v, %v", change, match, err)
	}
	two := in
	two.VCPUs, two.Cmdline = 3, in.Cmdline+" "
	if r, err = Digest(two); err != nil {
		t.Fatal(err)
	}
	if change, match, err := Explain(in, r.LaunchDigest, Alternatives{}); change != nil || match || err != nil {
		t.Errorf("two changes: %v, %v, %v", change, match, err)
	}
	if _, _, err := Explain(Input{VCPUs: 1, CPU: "EPYC-v4"}, r.LaunchDigest, Alternatives{}); !errors.Is(err, ErrOVMF) {
		t.Errorf("no firmware: %v", err)
	}
}

func TestReadOVMF(t *testing.T) {
	good := load(t).synthetic(t)
	without := func(g guid) []byte {
		b := bytes.Clone(good)
		b[bytes.Index(b, g[:])] ^= 1
		return b
	}
	noPage := bytes.Clone(good) // the last section of the synthetic firmware is the hashes page
	asev := bytes.Index(noPage, []byte("ASEV"))
	noPage[asev+16+5*12+8] = byte(secMem)
	for name, tc := range map[string]struct {
		image []byte
		want  error
		text  string
	}{
		"fit":                  {good, nil, ""},
		"no firmware":          {[]byte("x"), ErrOVMF, "size 1"},
		"no hash table":        {without(guidHashTable()), ErrNoKernelHashes, "it has no hash table"},
		"hashes not measured":  {noPage, ErrNoKernelHashes, "no measured page"},
		"no SEV metadata":      {without(guidSEVMetadata()), ErrOVMF, "no SEV metadata"},
		"larger than firmware": {make([]byte, maxOVMF+pageSize), ErrOVMF, "size"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "OVMF.fd")
			if err := os.WriteFile(path, tc.image, 0o600); err != nil {
				t.Fatal(err)
			}
			image, err := ReadOVMF(path)
			if tc.want == nil {
				if err != nil || !bytes.Equal(image, tc.image) {
					t.Fatalf("%d bytes, %v", len(image), err)
				}
				return
			}
			if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.text) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "ovmf-amdsev") {
				t.Errorf("%v, want %v with %q, the file and the cure", err, tc.want, tc.text)
			}
		})
	}
	if _, err := ReadOVMF(filepath.Join(t.TempDir(), "x")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}
