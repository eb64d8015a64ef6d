package snp

import "fmt"

// TCB holds the security version numbers of a platform's firmware. FMC exists
// from Turin on and is nil before.
type TCB struct {
	FMC        *uint8
	Bootloader uint8
	TEE        uint8
	SNP        uint8
	Microcode  uint8
}

func (t TCB) parts() [5]uint8 {
	var fmc uint8
	if t.FMC != nil {
		fmc = *t.FMC
	}
	return [5]uint8{fmc, t.Bootloader, t.TEE, t.SNP, t.Microcode}
}

// ParseTCB reads the eight bytes of a TCB, in Turin's layout or the earlier one.
func ParseTCB(b [8]byte, turin bool) (t TCB) {
	reader(b[:]).tcb(0, &t, turin)
	return t
}

// Equal reports that both have the same parts, a missing FMC being unlike any.
func (t TCB) Equal(o TCB) bool {
	return t.parts() == o.parts() && (t.FMC == nil) == (o.FMC == nil)
}

// AtLeast reports that no part of t is below that of min. A missing FMC counts
// as 0.
func (t TCB) AtLeast(min TCB) bool {
	m := min.parts()
	for i, v := range t.parts() {
		if v < m[i] {
			return false
		}
	}
	return true
}

// String gives the parts as key=value pairs.
func (t TCB) String() string {
	s := fmt.Sprintf("bootloader=%d tee=%d snp=%d microcode=%d", t.Bootloader, t.TEE, t.SNP, t.Microcode)
	if t.FMC != nil {
		s = fmt.Sprintf("fmc=%d %s", *t.FMC, s)
	}
	return s
}

// turinLayout tells which of the two layouts a report's TCBs have.
func turinLayout(version uint32, family uint8) bool { return version >= 3 && family >= 0x1a }

// tcbIndex holds the byte of each part within a TCB's eight bytes.
type tcbIndex struct{ fmc, bootloader, tee, snp, microcode int }

func tcbOffsets(turin bool) tcbIndex {
	if turin {
		return tcbIndex{fmc: 0, bootloader: 1, tee: 2, snp: 3, microcode: 7}
	}
	return tcbIndex{fmc: -1, bootloader: 0, tee: 1, snp: 6, microcode: 7}
}
