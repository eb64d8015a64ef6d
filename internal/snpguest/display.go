package snpguest

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"coffer/internal/snp"
)

// maxFile bounds the files that are read but for firmware, kernel and initrd.
const maxFile = 1 << 20

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxFile)
	}
	return b, err
}

// readReport reads a report whose CPU is known: without it, the layout of the
// TCB is not.
func readReport(path string) (*snp.Report, error) {
	b, err := readFile(path)
	if err == nil {
		var r *snp.Report
		if r, err = snp.ParseReport(b); err == nil {
			if r.Version >= 3 {
				_, err = r.Product()
			} else if r.ChipID == [64]byte{} {
				err = fmt.Errorf("a version %d report with a masked chip id does not tell its product", r.Version)
			}
			if err == nil {
				err = reservedZero(b, r.Version)
			}
			if err == nil {
				return r, nil
			}
		}
	}
	return nil, fmt.Errorf("Could not open attestation report: %w", err)
}

// reservedZero refuses what virtee's parser does: bytes that its version of the
// report has no meaning for. It would not print them.
func reservedZero(b []byte, version uint32) error {
	cpu, vectors := 0x18b, 0x208
	if version < 3 {
		cpu = 0x188
	}
	if version < 5 {
		vectors = 0x1f8
	}
	for _, part := range [][2]int{{0x4c, 0x50}, {cpu, 0x1a0}, {0x1eb, 0x1ec}, {0x1ef, 0x1f0}, {vectors, 0x2a0}} {
		for i := part[0]; i < part[1]; i++ {
			if b[i] != 0 {
				return fmt.Errorf("byte %#x is set, which is reserved in version %d", i, version)
			}
		}
	}
	return nil
}

func displayReport(r *run, a *args) error {
	if err := a.want(1, 1, "<att-report-path>"); err != nil {
		return err
	}
	rep, err := readReport(a.positional[0])
	if err != nil {
		return err
	}
	r.printf("%s\n", reportText(rep))
	return nil
}

// reportText is a report as virtee/sev 6.3.0 prints it, its slips included:
// "RAPL Allowed" shows the bit that forbids it.
func reportText(r *snp.Report) string {
	cpu := func(v uint8) string {
		if r.Version < 3 {
			return "None"
		}
		return strconv.Itoa(int(v))
	}
	vector := func(v uint64) string {
		if r.Version < 5 {
			return "None"
		}
		return strconv.FormatUint(v, 10)
	}
	policy := func(bit int) bool { return r.Policy>>bit&1 == 1 }
	platform := func(bit int) bool { return r.PlatformInfo>>bit&1 == 1 }
	key := map[uint32]string{snp.SigningKeyVCEK: "vcek", snp.SigningKeyVLEK: "vlek", snp.SigningKeyNone: "none"}[r.SigningKey()]
	if key == "" {
		key = "unknown"
	}
	raw := r.Marshal()
	tcb := func(off int) string {
		t := snp.ParseTCB([8]byte(raw[off:]), turinTCB(r))
		fmc := "None"
		if t.FMC != nil {
			fmc = strconv.Itoa(int(*t.FMC))
		}
		return fmt.Sprintf("TCB Version:\n  Microcode:   %d\n  SNP:         %d\n  TEE:         %d\n  Boot Loader: %d\n  FMC:         %s",
			t.Microcode, t.SNP, t.TEE, t.Bootloader, fmc)
	}
	var b strings.Builder
	part := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n\n", a...) }
	part("Attestation Report:")
	part("Version:                      %d", r.Version)
	part("Guest SVN:                    %d", r.GuestSVN)
	part(`Guest Policy (0x%x):
  ABI Major:     %d
  ABI Minor:     %d
  SMT Allowed:   %t
  Migrate MA:    %t
  Debug Allowed: %t
  Single Socket: %t
  CXL Allowed:   %t
  AEX 256 XTS:   %t
  RAPL Allowed:  %t
  Ciphertext hiding: %t
  Page Swap Disable: %t`, r.Policy, r.Policy>>8&0xff, r.Policy&0xff, policy(16), policy(18), policy(19), policy(20), policy(21), policy(22),
		policy(23), policy(24), policy(25))
	part("Family ID:%s", hexLines(r.FamilyID[:]))
	part("Image ID:%s", hexLines(r.ImageID[:]))
	part("VMPL:                         %d", r.VMPL)
	part("Signature Algorithm:          %d", r.SigAlgo)
	part("Current TCB:")
	part("%s", tcb(0x38))
	part(`Platform Info (%d):
  SMT Enabled:               %t
  TSME Enabled:              %t
  ECC Enabled:               %t
  RAPL Disabled:             %t
  Ciphertext Hiding Enabled: %t
  Alias Check Complete:      %t
  SEV-TIO Enabled:           %t`, r.PlatformInfo, platform(0), platform(1), platform(2), platform(3), platform(4), platform(5), platform(7))
	part("Key Information:\n    author key enabled: %t\n    mask chip key:      %t\n    signing key:        %s", r.KeyInfo&1 == 1, r.MaskChipKey(), key)
	part("Report Data:%s", hexLines(r.ReportData[:]))
	part("Measurement:%s", hexLines(r.Measurement[:]))
	part("Host Data:%s", hexLines(r.HostData[:]))
	part("ID Key Digest:%s", hexLines(r.IDKeyDigest[:]))
	part("Author Key Digest:%s", hexLines(r.AuthorKeyDigest[:]))
	part("Report ID:%s", hexLines(r.ReportID[:]))
	part("Report ID Migration Agent:%s", hexLines(r.ReportIDMA[:]))
	part("Reported TCB:")
	part("%s", tcb(0x180))
	part("CPUID Family ID:              %s", cpu(r.CPUFamily))
	part("CPUID Model ID:               %s", cpu(r.CPUModel))
	part("CPUID Stepping:               %s", cpu(r.CPUStepping))
	part("Chip ID:%s", hexLines(r.ChipID[:]))
	part("Committed TCB:")
	part("%s", tcb(0x1e0))
	part("Current Version:              %d.%d.%d", r.Current.Major, r.Current.Minor, r.Current.Build)
	part("Committed Version:            %d.%d.%d", r.Committed.Major, r.Committed.Minor, r.Committed.Build)
	part("Launch TCB:")
	part("%s", tcb(0x1f0))
	part("Launch Mitigation Vector:     %s", vector(r.LaunchMitVector))
	part("Current Mitigation Vector:    %s", vector(r.CurrentMitVector))
	fmt.Fprintf(&b, "Signature:\n  R:%s\n  S:%s", hexLines(r.SignatureR[:]), hexLines(r.SignatureS[:]))
	return b.String()
}

// turinTCB tells the layout of the report's TCBs. Version 2 does not name the
// CPU; only a Turin's chip id has 8 bytes.
func turinTCB(r *snp.Report) bool {
	if r.Version >= 3 {
		return r.ReportedTCB.FMC != nil
	}
	return [56]byte(r.ChipID[8:]) == [56]byte{}
}

// hexLines begins a new line and puts 16 bytes on each.
func hexLines(b []byte) string {
	var s strings.Builder
	for i, v := range b {
		sep := byte(' ')
		if i%16 == 0 {
			sep = '\n'
		}
		s.WriteByte(sep)
		fmt.Fprintf(&s, "%02X", v)
	}
	return s.String()
}

func displayKey(r *run, a *args) error {
	if err := a.want(1, 1, "<key-path>"); err != nil {
		return err
	}
	b, err := readFile(a.positional[0])
	if err != nil {
		return fmt.Errorf("Could not open key: %w", err)
	}
	var out bytes.Buffer
	for i, v := range b {
		if i%16 == 0 {
			out.WriteByte('\n')
		}
		fmt.Fprintf(&out, "%02x ", v)
	}
	r.printf("%s\n\n", out.Bytes())
	clear(b)
	clear(out.Bytes())
	return nil
}
