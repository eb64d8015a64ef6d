package stages

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"coffer/internal/boot"
)

// acpiTables are those that QEMU's q35 and its firmware give a guest. DSDT is the
// only one that may hold bytecode: it describes the machine and nothing boots
// without it. A host may add others with bytecode of its own. The kernel has been
// told not to load SSDTs (acpi_no_static_ssdt); the like of them, PSDT and OSDT, it
// has loaded before anybody can look here.
var acpiTables = []string{"APIC", "BGRT", "DSDT", "FACP", "FACS", "HMAT", "HPET", "MCFG", "SLIT", "SRAT", "WAET"}

// acpi tells which tables the host gives, and refuses to go on with one that
// neither q35 has nor the guest config names.
func (g *guest) acpi(context.Context) error {
	tables, err := g.ACPITables()
	if err != nil {
		return err
	}
	var names, unexpected []string
	dsdt := "none"
	for _, t := range tables {
		names = append(names, t.Name)
		// Nothing allows what bytecode has loaded: dynamic/... has no signature.
		signature := t.Name[:min(4, len(t.Name))]
		if !slices.Contains(acpiTables, signature) && !slices.Contains(g.cfg.ACPITables, signature) {
			unexpected = append(unexpected, t.Name)
		}
		if t.Name == "DSDT" {
			sum := sha256.Sum256(t.Data)
			dsdt = hex.EncodeToString(sum[:])
		}
	}
	g.log.Printf("coffer: acpi tables=%s dsdt_sha256=%s", strings.Join(names, ","), dsdt)
	if len(unexpected) > 0 {
		return boot.Fail(boot.CodeACPI, fmt.Errorf("the host gives ACPI tables that are not expected: %s; acpi_tables in CONFIG.yaml allows more than %s",
			strings.Join(unexpected, ", "), strings.Join(acpiTables, " ")))
	}
	return nil
}

// ACPITable is one table as the kernel has it.
type ACPITable struct {
	// Name is the signature, with a number behind it where there are several and
	// "(ignored)" where the kernel did as it was told. dynamic/ stands before those
	// that bytecode has loaded.
	Name string
	Data []byte // DSDT's alone
}

const dynamicTables = "dynamic/"

// maxDSDT bounds what is read; q35's has 8 KiB.
const maxDSDT = 4 << 20

// ignored finds, in a record of the kernel's log, the table that the kernel has
// not taken because of acpi_no_static_ssdt. It is nowhere else to be seen.
func ignored(record string) (ACPITable, bool) {
	_, name, ok := strings.Cut(record, "ACPI: Ignoring installation of ")
	if !ok || len(name) < 4 {
		return ACPITable{}, false
	}
	return ACPITable{Name: name[:4] + "(ignored)"}, true
}

// acpiTablesOfKernel is all that the kernel has or has refused.
func acpiTablesOfKernel() ([]ACPITable, error) {
	tables, err := readACPITables("/sys/firmware/acpi/tables")
	if err != nil {
		return nil, err
	}
	text, err := kernelLog()
	for record := range strings.Lines(text) {
		if t, ok := ignored(record); ok {
			tables = append(tables, t)
		}
	}
	return tables, err
}

// readACPITables reads /sys/firmware/acpi/tables, at dir.
func readACPITables(dir string) ([]ACPITable, error) {
	var out []ACPITable
	for _, prefix := range []string{"", dynamicTables} {
		entries, err := os.ReadDir(filepath.Join(dir, prefix))
		if errors.Is(err, fs.ErrNotExist) { // a machine without ACPI, or bytecode that loads none
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list ACPI tables: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() {
				continue
			}
			t := ACPITable{Name: prefix + e.Name()}
			if t.Name == "DSDT" {
				if t.Data, err = readFile(filepath.Join(dir, t.Name), maxDSDT); err != nil {
					return nil, fmt.Errorf("ACPI table: %w", err)
				}
			}
			out = append(out, t)
		}
	}
	return out, nil
}
