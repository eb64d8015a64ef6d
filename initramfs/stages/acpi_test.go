package stages

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestIgnored(t *testing.T) {
	for record, want := range map[string]string{
		"6,123,456,-;ACPI: Ignoring installation of SSDT at 000000003FFE0000": "SSDT(ignored)",
		"6,123,456,-;ACPI: SSDT 0x000000003FFE0000 000027 (v01)":              "",
		"6,123,456,-;ACPI: Ignoring installation of SS":                       "",
		"": "",
	} {
		got, ok := ignored(record)
		if got.Name != want || ok != (want != "") {
			t.Errorf("%q: %q, %v", record, got.Name, ok)
		}
	}
}

func TestReadACPITables(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"APIC", "DSDT", "SSDT1", "SSDT2", "data/BERT", "dynamic/SSDT3"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("of "+name), 0o400); err != nil {
			t.Fatal(err)
		}
	}
	tables, err := readACPITables(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, x := range tables {
		names = append(names, x.Name)
		if want := map[bool]string{true: "of DSDT"}[x.Name == "DSDT"]; string(x.Data) != want {
			t.Errorf("%s: data %q, want %q", x.Name, x.Data, want)
		}
	}
	if want := []string{"APIC", "DSDT", "SSDT1", "SSDT2", "dynamic/SSDT3"}; !slices.Equal(names, want) {
		t.Errorf("tables %q, want %q", names, want)
	}
	if tables, err := readACPITables(filepath.Join(dir, "none")); err != nil || tables != nil {
		t.Errorf("a machine without ACPI: %v, %v", tables, err)
	}
}
