package snpguest

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strconv"
	"strings"

	"coffer/internal/snp"
)

// errVMPL0 is the answer to a wish for VMPL 0.
var errVMPL0 = errors.New("VMPL 0 is Coffer's agent's own: what a VMPL 0 report says, the key of this CVM's disk is given to; take 1 to 3")

func report(r *run, a *args) error {
	if err := a.want(2, 2, "<att-report-path> <request-file>"); err != nil {
		return err
	}
	random := a.has("random")
	if random && a.has("platform") {
		return usageError("the argument '--random' cannot be used with '--platform'")
	}
	vmpl, err := number(a, "vmpl", 1, 32)
	if err != nil {
		return err
	}
	if a.has("platform") {
		return errors.New("--platform requires a binary built with --features hyperv. Consult man page.")
	}
	var data [64]byte
	if random {
		rand.Read(data[:])
	} else if err := readExactly(a.positional[1], data[:]); err != nil {
		return err
	}
	if vmpl == 0 {
		return errVMPL0
	}
	b, err := r.ask("/v1/snp/report", url.Values{"vmpl": {strconv.FormatUint(vmpl, 10)}}, data[:])
	if err != nil {
		return fmt.Errorf("unable to fetch attestation report: %w", err)
	}
	if _, err := snp.ParseReport(b); err != nil {
		return err
	}
	if err := os.WriteFile(a.positional[0], b, 0o666); err != nil {
		return err
	}
	if random {
		if err := os.WriteFile(a.positional[1], data[:], 0o666); err != nil {
			return fmt.Errorf("unable to write random request data to specified file: %w", err)
		}
	}
	return nil
}

// number is an option's unsigned number.
func number(a *args, long string, fallback uint64, bits int) (uint64, error) {
	text, given := a.options[long]
	if !given {
		return fallback, nil
	}
	v, err := strconv.ParseUint(text, 10, bits)
	if err != nil {
		return 0, usagef("invalid value '%s' for '--%s': invalid digit found in string", text, long)
	}
	return v, nil
}

func readExactly(path string, into []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.ReadFull(f, into); err != nil {
		return fmt.Errorf("unable to read %d bytes from REQUEST_FILE: %w", len(into), err)
	}
	return nil
}

// keyRequest is the agent's derived-key request.
type keyRequest struct {
	Root       string  `json:"root"` // "vcek" or "vmrk"
	VMPL       uint32  `json:"vmpl"`
	Fields     uint64  `json:"guest_field_select"`
	GuestSVN   uint32  `json:"guest_svn"`
	TCB        uint64  `json:"tcb_version"`
	Mitigation *uint64 `json:"launch_mit_vector,omitempty"`
}

func key(r *run, a *args) error {
	if err := a.want(2, 2, "<key-path> <root-key-select>"); err != nil {
		return err
	}
	q := keyRequest{Root: a.positional[1]}
	vmpl, err := number(a, "vmpl", 1, 32)
	if err != nil {
		return err
	}
	svn, err := number(a, "guest_svn", 0, 32)
	if err != nil {
		return err
	}
	if q.TCB, err = number(a, "tcb_version", 0, 64); err != nil {
		return err
	}
	if a.has("launch_mit_vector") {
		v, err := number(a, "launch_mit_vector", 0, 64)
		if err != nil {
			return err
		}
		q.Mitigation = &v
	}
	if q.Root != "vcek" && q.Root != "vmrk" {
		return errors.New("Invalid input. Enter either vcek or vmrk")
	}
	if vmpl > 3 {
		return errors.New("Invalid Virtual Machine Privilege Level.")
	}
	if bits, given := a.options["guest_field_select"]; given {
		if len(bits) != 6 && len(bits) != 7 {
			return errors.New("Invalid Guest Field Select option. Must be 6 or 7 digits.")
		}
		if strings.Trim(bits, "01") != "" {
			return errors.New("Invalid Guest Field Select option. Must be a binary string.")
		}
		q.Fields, _ = strconv.ParseUint(bits, 2, 64)
	}
	if vmpl == 0 {
		return errVMPL0
	}
	q.VMPL, q.GuestSVN = uint32(vmpl), uint32(svn)
	body, err := json.Marshal(q)
	if err != nil {
		return err
	}
	derived, err := r.ask("/v1/snp/key", nil, body)
	if err != nil {
		return fmt.Errorf("Failed to request derived key: %w", err)
	}
	defer clear(derived)
	if len(derived) != 32 {
		return fmt.Errorf("Failed to request derived key: it has %d bytes, not 32", len(derived))
	}
	return os.WriteFile(a.positional[0], derived, 0o600)
}

// Bits of the SEV_STATUS register, as snpguest names them.
var sevStatus = []struct {
	name     string
	bit      int
	optional bool
}{
	{"SEV", 0, false}, {"SEV-ES", 1, false}, {"SNP", 2, false},
	{"VTOM", 3, true}, {"ReflectVC", 4, true}, {"Restricted Injection", 5, true}, {"Alternate Injection", 6, true},
	{"Debug Swap", 7, true}, {"Prevent Host IBS", 8, true}, {"SNP BTB Isolation", 9, true}, {"VMPL SSS", 10, true}, {"Secure TSE", 11, true},
	{"VMG Exit Parameter", 12, true}, {"IBS Virtualization", 14, true}, {"VMSA Reg Prot", 16, true}, {"SMT Protection", 17, true},
}

// ok prints the guest's SEV_STATUS. The agent knows it without the register:
// what it says is what the launch digest covers.
func ok(r *run, a *args) error {
	if err := a.want(0, 0, ""); err != nil {
		return err
	}
	const pass, fail = "\x1b[38;5;2mPASS\x1b[0m", "\x1b[38;5;1mFAIL\x1b[0m"
	failed := errors.New("One or more tests in snpguest-ok reported a failure")
	line := func(result string, level int, text string) {
		r.printf("[ %s ] %s- %s\n", result, strings.Repeat(" ", level), text)
	}
	text, err := r.ask("/v1/info", nil, nil)
	var info struct {
		Status    uint64 `json:"sev_status"`
		Simulated bool   `json:"simulated"`
	}
	if err == nil {
		err = json.Unmarshal(text, &info)
	}
	if err != nil {
		line(fail, 0, "Error reading MSR: Failed to get bit values, "+err.Error())
		return failed
	}
	if info.Simulated {
		fmt.Fprintln(r.Stderr, "simulated platform: nothing here is confidential")
	}
	for i, s := range sevStatus {
		on := info.Status>>s.bit&1 == 1
		if s.optional && !sevStatus[i-1].optional {
			line(pass, 0, "Optional Features statuses:")
		}
		result, state, level := pass, "ENABLED", 0
		if s.optional {
			level = 2
		}
		if !on {
			state = "DISABLED"
			if !s.optional {
				result, err = fail, failed
			}
		}
		line(result, level, s.name+": "+state)
	}
	return err
}
