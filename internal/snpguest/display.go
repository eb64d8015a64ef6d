package snpguest

import (
	"bytes"
	"fmt"

	"coffer/internal/snp"
	"coffer/internal/strict"
)

// maxFile bounds the files that are read but for firmware, kernel and initrd.
const maxFile = 1 << 20

// readReport reads a report whose CPU is known: without it, the layout of the
// TCB is not.
func readReport(path string) (*snp.Report, error) {
	b, err := strict.ReadFile(path, maxFile)
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
	r.printf("%s", reportText(rep))
	return nil
}

// reportText is a report as virtee's program prints it.
func reportText(r *snp.Report) string {
	if r.Version >= 3 || !turinTCB(r) {
		return r.Display()
	}
	turin, raw := *r, r.Marshal()
	for off, into := range map[int]*snp.TCB{0x38: &turin.CurrentTCB, 0x180: &turin.ReportedTCB, 0x1e0: &turin.CommittedTCB, 0x1f0: &turin.LaunchTCB} {
		*into = snp.ParseTCB([8]byte(raw[off:]), true)
	}
	return turin.Display()
}

// turinTCB tells the layout of the report's TCBs. Version 2 does not name the
// CPU; only a Turin's chip id has 8 bytes.
func turinTCB(r *snp.Report) bool {
	if r.Version >= 3 {
		return r.ReportedTCB.FMC != nil
	}
	return [56]byte(r.ChipID[8:]) == [56]byte{}
}

func displayKey(r *run, a *args) error {
	if err := a.want(1, 1, "<key-path>"); err != nil {
		return err
	}
	b, err := strict.ReadFile(a.positional[0], maxFile)
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
