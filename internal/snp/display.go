package snp

import (
	"fmt"
	"strconv"
	"strings"
)

// Display gives the report as `snpguest display report` of version 0.9.2 prints
// it, byte for byte, its naming slips included: programs read that text.
func (r *Report) Display() string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format, args...) }
	bit := func(v uint64, n int) bool { return v>>n&1 == 1 }

	p("Attestation Report:\n\n")
	p("Version:                      %d\n\n", r.Version)
	p("Guest SVN:                    %d\n\n", r.GuestSVN)
	p("Guest Policy (0x%x):\n", r.Policy)
	p("  ABI Major:     %d\n", r.Policy>>8&0xff)
	p("  ABI Minor:     %d\n", r.Policy&0xff)
	for _, f := range []struct {
		label string
		bit   int
	}{
		{"SMT Allowed:   ", 16}, {"Migrate MA:    ", 18}, {"Debug Allowed: ", 19}, {"Single Socket: ", 20}, {"CXL Allowed:   ", 21},
		{"AEX 256 XTS:   ", 22}, {"RAPL Allowed:  ", 23}, {"Ciphertext hiding: ", 24}, {"Page Swap Disable: ", 25},
	} {
		p("  %s%t\n", f.label, bit(r.Policy, f.bit))
	}
	p("\nFamily ID:\n%s\n", hexLines(r.FamilyID[:]))
	p("Image ID:\n%s\n", hexLines(r.ImageID[:]))
	p("VMPL:                         %d\n\n", r.VMPL)
	p("Signature Algorithm:          %d\n\n", r.SigAlgo)
	p("Current TCB:\n\n%s\n", displayTCB(r.CurrentTCB))
	p("Platform Info (%d):\n", r.PlatformInfo)
	for _, f := range []struct {
		label string
		bit   int
	}{
		{"SMT Enabled:               ", 0}, {"TSME Enabled:              ", 1}, {"ECC Enabled:               ", 2},
		{"RAPL Disabled:             ", 3}, {"Ciphertext Hiding Enabled: ", 4}, {"Alias Check Complete:      ", 5},
		{"SEV-TIO Enabled:           ", 7},
	} {
		p("  %s%t\n", f.label, bit(r.PlatformInfo, f.bit))
	}
	p("\nKey Information:\n")
	p("    author key enabled: %t\n", r.KeyInfo&1 != 0)
	p("    mask chip key:      %t\n", r.MaskChipKey())
	p("    signing key:        %s\n", r.signingKeyName())
	p("\nReport Data:\n%s\n", hexLines(r.ReportData[:]))
	p("Measurement:\n%s\n", hexLines(r.Measurement[:]))
	p("Host Data:\n%s\n", hexLines(r.HostData[:]))
	p("ID Key Digest:\n%s\n", hexLines(r.IDKeyDigest[:]))
	p("Author Key Digest:\n%s\n", hexLines(r.AuthorKeyDigest[:]))
	p("Report ID:\n%s\n", hexLines(r.ReportID[:]))
	p("Report ID Migration Agent:\n%s\n", hexLines(r.ReportIDMA[:]))
	p("Reported TCB:\n\n%s\n", displayTCB(r.ReportedTCB))
	since := func(version uint32, v uint64) string {
		if r.Version < version {
			return "None"
		}
		return strconv.FormatUint(v, 10)
	}
	p("CPUID Family ID:              %s\n\n", since(3, uint64(r.CPUFamily)))
	p("CPUID Model ID:               %s\n\n", since(3, uint64(r.CPUModel)))
	p("CPUID Stepping:               %s\n\n", since(3, uint64(r.CPUStepping)))
	p("Chip ID:\n%s\n", hexLines(r.ChipID[:]))
	p("Committed TCB:\n\n%s\n", displayTCB(r.CommittedTCB))
	p("Current Version:              %s\n\n", r.Current)
	p("Committed Version:            %s\n\n", r.Committed)
	p("Launch TCB:\n\n%s\n", displayTCB(r.LaunchTCB))
	p("Launch Mitigation Vector:     %s\n\n", since(5, r.LaunchMitVector))
	p("Current Mitigation Vector:    %s\n\n", since(5, r.CurrentMitVector))
	p("Signature:\n  R:\n%s  S:\n%s", hexLines(r.SignatureR[:]), hexLines(r.SignatureS[:]))
	return b.String()
}

// String gives major.minor.build.
func (v FirmwareVersion) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Build) }

func (r *Report) signingKeyName() string {
	switch r.SigningKey() {
	case SigningKeyVCEK:
		return "vcek"
	case SigningKeyVLEK:
		return "vlek"
	case SigningKeyNone:
		return "none"
	}
	return "unknown"
}

func displayTCB(t TCB) string {
	fmc := "None"
	if t.FMC != nil {
		fmc = strconv.Itoa(int(*t.FMC))
	}
	return fmt.Sprintf("TCB Version:\n  Microcode:   %d\n  SNP:         %d\n  TEE:         %d\n  Boot Loader: %d\n  FMC:         %s\n",
		t.Microcode, t.SNP, t.TEE, t.Bootloader, fmc)
}

// hexLines gives bytes in upper case, 16 a line.
func hexLines(data []byte) string {
	var b strings.Builder
	for i, c := range data {
		sep := " "
		if i%16 == 15 || i == len(data)-1 {
			sep = "\n"
		}
		fmt.Fprintf(&b, "%02X%s", c, sep)
	}
	return b.String()
}
