package measure

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"coffer/internal/testenv"
)

type vectors struct {
	Inputs struct {
		OVMF, Kernel, Initrd struct {
			SHA256 string `json:"sha256"`
		}
		Cmdline   string
		Synthetic struct {
			OVMF   string `json:"ovmf_base64_gz"`
			Kernel string `json:"kernel_sha256"`
			Initrd string `json:"initrd_sha256"`
		}
	}
	VCPUSigs    map[string]string `json:"vcpu_sigs"`
	HashesTable struct {
		Hex        string
		PageSHA384 string `json:"page_sha384"`
	} `json:"hashes_table"`
	Vectors []struct {
		Name           string
		OVMF           string
		Kernel, Initrd bool
		Cmdline        string
		VCPUs          int
		CPU            string `json:"vcpu_type"`
		Features       string `json:"guest_features"`
		LaunchDigest   string `json:"launch_digest"`
		AfterOVMF      string `json:"ld_after_ovmf"`
		AfterMetadata  string `json:"ld_after_metadata"`
		VMSABSP        string `json:"vmsa_bsp_sha384"`
		VMSAAP         string `json:"vmsa_ap_sha384"`
	}
}

func load(t testing.TB) vectors {
	t.Helper()
	b, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var v vectors
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func (v vectors) synthetic(t testing.TB) []byte {
	t.Helper()
	zipped, err := base64.StdEncoding.DecodeString(v.Inputs.Synthetic.OVMF)
	if err != nil {
		t.Fatal(err)
	}
	r, err := gzip.NewReader(bytes.NewReader(zipped))
	if err != nil {
		t.Fatal(err)
	}
	image, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// amdsev returns the OVMF.amdsev.fd of the vectors, whose path COFFER_TEST_OVMF gives.
func (v vectors) amdsev(t *testing.T) []byte {
	t.Helper()
	path := os.Getenv("COFFER_TEST_OVMF")
	testenv.Need(t, path != "", "COFFER_TEST_OVMF does not name Debian's OVMF.amdsev.fd (ovmf-amdsev 2026.08+ds-2)")
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(image)
	if hex.EncodeToString(sum[:]) != v.Inputs.OVMF.SHA256 {
		// Debian keeps one version only: a newer one is no fault of ours, in CI neither.
		t.Skipf("%s is not the OVMF.amdsev.fd that the vectors were made with", path)
	}
	return image
}

func sum32(t testing.TB, s string) [32]byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 32 {
		t.Fatalf("bad SHA-256 %q", s)
	}
	return [32]byte(b)
}

func TestDigestVectors(t *testing.T) {
	v := load(t)
	if len(v.Vectors) != 24 {
		t.Fatalf("%d vectors, want 24", len(v.Vectors))
	}
	for _, c := range v.Vectors {
		t.Run(c.Name, func(t *testing.T) {
			features, err := strconv.ParseUint(c.Features, 0, 64)
			if err != nil {
				t.Fatal(err)
			}
			in := Input{HasKernel: c.Kernel, HasInitrd: c.Initrd, Cmdline: c.Cmdline, VCPUs: c.VCPUs, CPU: c.CPU, GuestFeatures: features}
			switch c.OVMF {
			case "synthetic":
				in.OVMF = v.synthetic(t)
				in.Kernel, in.Initrd = sum32(t, v.Inputs.Synthetic.Kernel), sum32(t, v.Inputs.Synthetic.Initrd)
			case "amdsev":
				in.OVMF = v.amdsev(t)
				in.Kernel, in.Initrd = sum32(t, v.Inputs.Kernel.SHA256), sum32(t, v.Inputs.Initrd.SHA256)
			default:
				t.Fatalf("unknown OVMF %q", c.OVMF)
			}
			r, err := Digest(in)
			if err != nil {
				t.Fatal(err)
			}
			if c.VMSAAP == "" {
				c.VMSAAP = strings.Repeat("0", 96)
			}
			for _, step := range []struct {
				name string
				got  [48]byte
				want string
			}{
				{"after OVMF", r.AfterOVMF, c.AfterOVMF},
				{"after metadata", r.AfterMetadata, c.AfterMetadata},
				{"first VMSA", r.VMSABSP, c.VMSABSP},
				{"other VMSAs", r.VMSAAP, c.VMSAAP},
				{"launch digest", r.LaunchDigest, c.LaunchDigest},
			} {
				if got := hex.EncodeToString(step.got[:]); got != step.want {
					t.Errorf("%s = %s, want %s", step.name, got, step.want)
				}
			}
		})
	}
}

func TestHashPageVector(t *testing.T) {
	v := load(t)
	o, err := ParseOVMF(v.synthetic(t)) // its table lies where OVMF.amdsev.fd has it
	if err != nil {
		t.Fatal(err)
	}
	page, err := hashPage(o, Input{
		Kernel: sum32(t, v.Inputs.Kernel.SHA256), Initrd: sum32(t, v.Inputs.Initrd.SHA256), HasInitrd: true, Cmdline: v.Inputs.Cmdline,
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(page[0xc00 : 0xc00+176]); got != v.HashesTable.Hex {
		t.Errorf("table = %s, want %s", got, v.HashesTable.Hex)
	}
	if sum := sha512.Sum384(page); hex.EncodeToString(sum[:]) != v.HashesTable.PageSHA384 {
		t.Errorf("page's SHA-384 = %x, want %s", sum, v.HashesTable.PageSHA384)
	}
}

func TestCPUSignatures(t *testing.T) {
	v := load(t)
	if len(CPUModels()) != len(v.VCPUSigs) {
		t.Errorf("%d models, want %d", len(CPUModels()), len(v.VCPUSigs))
	}
	for model, want := range v.VCPUSigs {
		sig, err := CPUSignature(model)
		if err != nil || fmt.Sprintf("%#x", sig) != want {
			t.Errorf("%s: %#x, %v, want %s", model, sig, err, want)
		}
	}
	for _, model := range []string{"", "host", "max", "epyc-v4", "EPYC-v4,host-phys-bits=on"} {
		if _, err := CPUSignature(model); !errors.Is(err, ErrUnknownCPU) {
			t.Errorf("%q: %v, want %v", model, err, ErrUnknownCPU)
		}
	}
}

// Whatever is measured changes the digest.
func TestDigestDependsOn(t *testing.T) {
	v := load(t)
	input := func() Input {
		return Input{OVMF: v.synthetic(t), Kernel: [32]byte{1}, Initrd: [32]byte{2}, HasKernel: true, HasInitrd: true, Cmdline: "a", VCPUs: 2, CPU: "EPYC-v4"}
	}
	base, err := Digest(input())
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Input){
		"firmware":         func(in *Input) { in.OVMF[0] ^= 1 },
		"kernel":           func(in *Input) { in.Kernel[31] ^= 1 },
		"initrd":           func(in *Input) { in.Initrd[31] ^= 1 },
		"no initrd":        func(in *Input) { in.HasInitrd = false },
		"no kernel":        func(in *Input) { in.HasInitrd, in.HasKernel = false, false },
		"command line":     func(in *Input) { in.Cmdline += " " },
		"number of vCPUs":  func(in *Input) { in.VCPUs = 3 },
		"CPU model":        func(in *Input) { in.CPU = "EPYC-Genoa" },
		"CPU features":     func(in *Input) { in.GuestFeatures = 0x21 },
		"(default stands)": func(in *Input) { in.GuestFeatures = DefaultGuestFeatures },
	} {
		in := input()
		change(&in)
		r, err := Digest(in)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if same := r.LaunchDigest == base.LaunchDigest; same != strings.HasPrefix(name, "(") {
			t.Errorf("%s: digest the same: %v", name, same)
		}
	}
}

func TestDigestRefuses(t *testing.T) {
	v := load(t)
	plain := v.synthetic(t) // a firmware without hash table is what Debian's OVMF.fd is
	g := guidHashTable()
	plain[bytes.Index(plain, g[:])] ^= 1
	for _, tc := range []struct {
		name   string
		change func(*Input)
		want   error // nil: any
	}{
		{"no vCPU", func(in *Input) { in.VCPUs = 0 }, nil},
		{"too many vCPUs", func(in *Input) { in.VCPUs = maxVCPUs + 1 }, nil},
		{"unknown CPU", func(in *Input) { in.CPU = "host" }, ErrUnknownCPU},
		{"initrd without kernel", func(in *Input) { in.HasKernel = false }, nil},
		{"firmware without hash table", func(in *Input) { in.OVMF = plain }, ErrNoKernelHashes},
		{"no firmware", func(in *Input) { in.OVMF = nil }, ErrOVMF},
	} {
		in := Input{OVMF: v.synthetic(t), HasKernel: true, HasInitrd: true, VCPUs: 1, CPU: "EPYC-v4"}
		tc.change(&in)
		if _, err := Digest(in); err == nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
}

func TestParseOVMF(t *testing.T) {
	good := load(t).synthetic(t)
	o, err := ParseOVMF(good)
	if err != nil {
		t.Fatal(err)
	}
	want := []section{{0x800000, 0x2000, 1}, {0x80d000, 0x1000, 2}, {0x80e000, 0x1000, 3}, {0x80f000, 0x1000, 4}, {0x811000, 0x1000, 1}, {0x810000, 0x1000, 0x10}}
	if fmt.Sprint(o.sections) != fmt.Sprint(want) || o.apEIP != 0x80b004 || o.hashTable != 0x810c00 || o.hashSize != 0x400 {
		t.Errorf("parsed %+v %#x %#x %#x", o.sections, o.apEIP, o.hashTable, o.hashSize)
	}
	if !o.KernelHashes() {
		t.Error("KernelHashes = false")
	}

	at := func(g guid) int { return bytes.Index(good, g[:]) }
	asev := bytes.Index(good, []byte("ASEV"))
	put16 := func(off int, v uint16) func([]byte) {
		return func(b []byte) { binary.LittleEndian.PutUint16(b[off:], v) }
	}
	put32 := func(off int, v uint32) func([]byte) {
		return func(b []byte) { binary.LittleEndian.PutUint32(b[off:], v) }
	}
	unknown := func(b []byte, g guid) { copy(b[at(g):], bytes.Repeat([]byte{0xee}, 16)) }
	for name, tc := range map[string]struct {
		breakIt func([]byte)
		want    string
	}{
		"no footer":              {func(b []byte) { unknown(b, guidFooter()) }, "no GUID table"},
		"table beyond image":     {put16(at(guidFooter())-2, 0xffff), "GUID table claims"},
		"table below footer":     {put16(at(guidFooter())-2, 17), "GUID table claims"},
		"stray bytes":            {put16(at(guidFooter())-2, 19), "stray bytes"},
		"entry of length 0":      {put16(at(guidSEVMetadata())-2, 0), "claims 0"},
		"entry beyond the table": {put16(at(guidSEVMetadata())-2, 0xffff), "claims 65535"},
		"entry without data":     {put16(at(guidSEVMetadata())-2, 18), "SEV metadata entry has 0 bytes"},
		"entry twice":            {func(b []byte) { unknown(b, guidSEVMetadata()); unknown(b, guidResetVector()) }, "twice"},
		"reset vector missing":   {func(b []byte) { unknown(b, guidResetVector()) }, "no SEV reset vector"},
		"metadata missing":       {func(b []byte) { unknown(b, guidSEVMetadata()) }, "no SEV metadata"},
		"metadata out of bounds": {put32(at(guidSEVMetadata())-6, uint32(len(good)+1)), "before the end"},
		"metadata at the end":    {put32(at(guidSEVMetadata())-6, 4), "no signature"},
		"metadata signature":     {func(b []byte) { b[asev] = 'X' }, "no signature"},
		"metadata version":       {put32(asev+8, 2), "version 2"},
		"too many sections":      {put32(asev+12, 1<<31), "claims 2147483648 sections"},
		"unknown section type":   {put32(asev+16+8, 0x11), "unknown type 0x11"},
		"section not aligned":    {put32(asev+16, 0x800001), "not made of pages"},
		"section of half a page": {put32(asev+16+4, 0x800), "not made of pages"},
		"empty section":          {put32(asev+16+4, 0), "not made of pages"},
		"section of 4 GiB":       {put32(asev+16+4, 0xfffff000), "more than"},
	} {
		b := bytes.Clone(good)
		tc.breakIt(b)
		if _, err := ParseOVMF(b); !errors.Is(err, ErrOVMF) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %v with %q", name, err, ErrOVMF, tc.want)
		}
	}
	for _, size := range []int{0, 1, pageSize - 1, pageSize + 1} {
		if _, err := ParseOVMF(make([]byte, size)); !errors.Is(err, ErrOVMF) {
			t.Errorf("%d bytes: %v, want %v", size, err, ErrOVMF)
		}
	}
}

func TestHashFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	sum, err := HashFile(path)
	if err != nil || sum != sha256.Sum256([]byte("abc")) {
		t.Errorf("HashFile = %x, %v", sum, err)
	}
	if _, err := HashFile(path + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

// Other programs compute the same digests from files, for inputs made anew in
// each run: sev-snp-measure of PyPI, and virtee's own snpguest.
func TestOracles(t *testing.T) {
	for name, o := range map[string]struct {
		program string
		args    []string
		like    func(in *Input) // makes an input one that the program understands as QEMU does
	}{
		"sev-snp-measure": {"sev-snp-measure", []string{"--mode", "snp"}, func(*Input) {}},
		"snpguest": {os.Getenv("COFFER_SNPGUEST_ORACLE"), []string{"generate", "measurement"}, func(in *Input) {
			in.Cmdline = strings.TrimSpace(in.Cmdline) // which it does to any
			if in.CPU == "EPYC-Turin" {                // which it does not know
				in.CPU = "EPYC-Genoa"
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			tool, err := exec.LookPath(o.program)
			if err != nil {
				t.Skip("optional, for `make test-oracles`: it is not installed")
			}
			for i := range 16 {
				in, files := randomInput(t, i)
				o.like(&in)
				args := append(slices.Clone(o.args), "--vcpu-type", in.CPU, "--vcpus", strconv.Itoa(in.VCPUs), "--append="+in.Cmdline, "--guest-features", fmt.Sprintf("%#x", in.GuestFeatures))
				out, err := exec.CommandContext(t.Context(), tool, append(args, files...)...).CombinedOutput()
				if err != nil {
					t.Fatalf("%q: %v: %s", args, err, out)
				}
				r, err := Digest(in)
				if err != nil {
					t.Fatal(err)
				}
				if got, want := hex.EncodeToString(r.LaunchDigest[:]), strings.TrimPrefix(strings.TrimSpace(string(out)), "0x"); got != want {
					t.Errorf("%q: launch digest %s, it says %s", args, got, want)
				}
			}
		})
	}
}

// randomInput makes the i-th input, and the options that name its files.
func randomInput(t *testing.T, i int) (in Input, files []string) {
	bytesOf := func(n int) []byte {
		b := make([]byte, n)
		rand.Read(b)
		return b
	}
	n, pick := bytesOf(5), func(b byte, s []string) string { return s[int(b)%len(s)] }
	in = Input{
		OVMF: bytes.Clone(load(t).synthetic(t)), HasKernel: true, HasInitrd: i%5 != 1, VCPUs: 1 + int(n[2])%64, CPU: pick(n[3], CPUModels()),
		Cmdline:       pick(n[4], []string{"", " ", "quiet", "a  b ", "vm_id=cvm_" + hex.EncodeToString(n), `x="y z" '$HOME'`, "n\u00e4h\n"}),
		GuestFeatures: []uint64{0x1, 0x21, 0x201}[i%3],
	}
	copy(in.OVMF, bytesOf(64))
	if path := os.Getenv("COFFER_TEST_OVMF"); path != "" && i%4 == 0 {
		var err error
		if in.OVMF, err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	kernel, initrd := bytesOf(1+int(n[0])*7), bytesOf(int(n[1])*5)
	in.Kernel = sha256.Sum256(kernel)
	dir := t.TempDir()
	for name, b := range map[string][]byte{"ovmf": in.OVMF, "kernel": kernel, "initrd": initrd} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if name != "initrd" || in.HasInitrd {
			files = append(files, "--"+name, path)
		}
	}
	if in.HasInitrd {
		in.Initrd = sha256.Sum256(initrd)
	}
	return in, files
}

func FuzzParseOVMF(f *testing.F) {
	image := load(f).synthetic(f)
	f.Add(image[len(image)-pageSize:])
	f.Fuzz(func(t *testing.T, b []byte) {
		// Make the size right, so that the fuzzer gets to the table.
		b = append(make([]byte, (pageSize-len(b)%pageSize)%pageSize), b...)
		o, err := ParseOVMF(b)
		if err != nil {
			if !errors.Is(err, ErrOVMF) {
				t.Errorf("untyped error %v", err)
			}
			return
		}
		Digest(Input{OVMF: b, HasKernel: o.KernelHashes(), VCPUs: 1, CPU: "EPYC-v4"})
	})
}
