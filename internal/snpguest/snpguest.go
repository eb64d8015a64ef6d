// Package snpguest is the guest's snpguest program: a drop-in for virtee's
// snpguest 0.9.2, with the same arguments, files, standard output and exit codes
// (0; 1 for any error; 2 for a command line that cannot be read).
//
// Where virtee's program asks the SNP device or AMD's web site, this one asks
// Coffer's agent over a unix socket. The agent gives reports of VMPL 1 to 3 only
// (VMPL 0 is how the disk's key is fetched), and the chip's certificate from its
// cache. AMD's CA certificates are part of the program.
//
// It is stricter in what it accepts, never in what it prints on success: a report
// is verified only if its VCEK chains to AMD's pinned roots for the product that
// the report names, the chip id and the TCB are the certificate's, the guest is
// neither debuggable nor migratable, its TCB reaches a minimum and, where the
// guest config lists measurements, its measurement is one of them. `verify certs`
// accepts AMD's own ARK only. Reports of unknown versions are refused.
//
// `fetch crl` is what later versions of virtee's program have.
package snpguest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"coffer/internal/snp/verify"
)

// Version is the version of virtee's program that this one stands for.
const Version = "0.9.2"

// SocketPath is where the agent serves in the workload's container.
const SocketPath = "/host/run/coffer.sock"

// Env is what a run of the program works with.
type Env struct {
	Stdout, Stderr io.Writer
	Socket         string         // the agent's
	Now            time.Time      // for the validity of certificates
	Roots          []verify.Roots // nil: AMD's, and in a simulated build the agent's
}

// runTime bounds a run as a whole.
const runTime = 30 * time.Second

// command is what one pair of words does.
type command struct {
	options []option
	run     func(*run, *args) error
}

// run is one run of a command.
type run struct {
	Env
	ctx   context.Context
	quiet bool
}

func (r *run) printf(format string, a ...any) {
	if !r.quiet {
		fmt.Fprintf(r.Stdout, format, a...)
	}
}

func commands() map[string]command {
	product := []option{{long: "processor-model", short: 'p'}}
	ca := []option{{long: "report", short: 'r'}, {long: "endorser", short: 'e'}}
	return map[string]command{
		"report":       {[]option{{long: "random", short: 'r', flag: true}, {long: "vmpl", short: 'v'}, {long: "platform", short: 'p', flag: true}}, report},
		"certificates": {nil, certificates},
		"fetch ca":     {ca, fetchCA},
		"fetch vcek":   {product, fetchVCEK},
		"fetch crl":    {ca, fetchCRL},
		"verify certs": {nil, verifyCerts},
		"verify attestation": {append([]option{{long: "tcb", short: 't', flag: true}, {long: "signature", short: 's', flag: true}}, product...),
			verifyAttestation},
		"display report": {nil, displayReport},
		"display key":    {nil, displayKey},
		"key": {[]option{{long: "vmpl", short: 'v'}, {long: "guest_field_select", short: 'g'}, {long: "guest_svn", short: 's'},
			{long: "tcb_version", short: 't'}, {long: "launch_mit_vector", short: 'l'}}, key},
		"ok": {nil, ok},
		"generate measurement": {[]option{{long: "vcpus", short: 'v'}, {long: "vcpu-type"}, {long: "vcpu-sig"}, {long: "vcpu-family"},
			{long: "vcpu-model"}, {long: "vcpu-stepping"}, {long: "vmm-type", short: 't'}, {long: "ovmf", short: 'o'},
			{long: "kernel", short: 'k'}, {long: "initrd", short: 'i'}, {long: "append", short: 'a'}, {long: "guest-features", short: 'g'},
			{long: "ovmf-hash"}, {long: "output-format", short: 'f'}, {long: "measurement-file", short: 'm'}}, generateMeasurement},
		"generate ovmf-hash": {[]option{{long: "ovmf", short: 'o'}, {long: "output-format", short: 'f'}, {long: "hash-file"}}, generateOVMFHash},
		"generate id-block": {[]option{{long: "family-id", short: 'f'}, {long: "image-id", short: 'm'}, {long: "version", short: 'v'},
			{long: "svn", short: 's'}, {long: "policy", short: 'p'}, {long: "id-file", short: 'i'}, {long: "auth-file", short: 'a'}}, generateIDBlock},
		"generate key-digest": {[]option{{long: "key-digest-file", short: 'd'}}, generateKeyDigest},
	}
}

const help = `Drop-in for virtee's snpguest ` + Version + `, served by Coffer's agent.

Usage: snpguest [-q|--quiet] <COMMAND>

  report <att-report-path> <request-file> [-r] [-v <vmpl>]   a report of VMPL 1 (default) to 3
  certificates <pem|der> <certs-dir>                         the host's certificates
  fetch ca <pem|der> <certs-dir> <model> | -r <report> [-e vcek|vlek]
  fetch vcek <pem|der> <certs-dir> <report> [-p <model>]
  fetch crl <pem|der> <certs-dir> <model> | -r <report> [-e vcek|vlek]
  verify certs <certs-dir>
  verify attestation <certs-dir> <report> [-p <model>] [-t|-s]
  display report <report>
  display key <key>
  key <path> <vcek|vmrk> [-v] [-g] [-s] [-t] [-l]            a derived key of VMPL 1 (default) to 3
  ok
  generate measurement | ovmf-hash | id-block | key-digest
`

// Run runs the program and returns its exit code.
func Run(words []string, e Env) int {
	ctx, cancel := context.WithTimeout(context.Background(), runTime)
	defer cancel()
	r := &run{Env: e, ctx: ctx}
	err := r.dispatch(words)
	var usage usageError
	switch {
	case err == nil:
		return 0
	case err == errHelp:
		fmt.Fprint(e.Stdout, help)
		return 0
	case errors.As(err, &usage):
		fmt.Fprintf(e.Stderr, "error: %s\n\nFor more information, try '--help'.\n", usage)
		return 2
	}
	if !r.quiet {
		fmt.Fprintf(e.Stderr, "ERROR: %v\n", err)
	}
	fmt.Fprintf(e.Stderr, "Error: %v\n", err)
	return 1
}

func (r *run) dispatch(words []string) error {
	for len(words) > 0 && strings.HasPrefix(words[0], "-") {
		switch words[0] {
		case "-q", "--quiet":
			r.quiet = true
		case "-V", "--version":
			fmt.Fprintf(r.Stdout, "snpguest %s\n", Version)
			return nil
		case "-h", "--help":
			return errHelp
		default:
			return usagef("unexpected argument '%s' found", words[0])
		}
		words = words[1:]
	}
	if len(words) > 0 && words[0] == "help" {
		return errHelp
	}
	all := commands()
	for n := 1; n <= min(2, len(words)); n++ {
		if c, found := all[strings.Join(words[:n], " ")]; found {
			a, err := parseArgs(words[n:], c.options)
			if err != nil {
				return err
			}
			return c.run(r, a)
		}
	}
	if len(words) > 1 && (words[1] == "-h" || words[1] == "--help") {
		return errHelp
	}
	if len(words) == 0 {
		return usageError("a command is missing")
	}
	return usagef("unrecognized subcommand '%s'", strings.Join(words[:min(2, len(words))], " "))
}
