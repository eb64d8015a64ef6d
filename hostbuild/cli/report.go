package cli

import (
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"coffer/internal/snp"
	"coffer/internal/snp/verify"
)

func (a *App) report() *cobra.Command {
	return group("report", "Look into attestation reports", a.reportShow(), a.reportVerify())
}

func (a *App) reportShow() *cobra.Command {
	return &cobra.Command{
		Use:     "show FILE",
		Short:   "Print a report as `snpguest display report` does",
		Long:    "Prints a report (1184 bytes, or Trustee's evidence) in the form of snpguest 0.9.2.\nIt checks nothing.",
		Example: "  hostbuild report show report.bin",
		Args:    usage(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			r, _, err := readReport(args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(a.Stdout, r.Display())
			return err
		},
	}
}

// verdict is what `report verify --json` prints.
type verdict struct {
	Verified    bool   `json:"verified"`
	Reason      string `json:"reason,omitempty"` // why not
	Product     string `json:"product,omitempty"`
	Signer      string `json:"signer,omitempty"`
	Simulated   bool   `json:"simulated,omitempty"`
	Version     uint32 `json:"version"`
	Measurement string `json:"measurement"`
	ReportData  string `json:"report_data"`
	HostData    string `json:"host_data"`
	IDKeyDigest string `json:"id_key_digest"`
	ChipID      string `json:"chip_id"`
	Policy      string `json:"policy"`
	VMPL        uint32 `json:"vmpl"`
	Reported    string `json:"reported_tcb"`
	Committed   string `json:"committed_tcb"`
	Launch      string `json:"launch_tcb"`
}

func (a *App) reportVerify() *cobra.Command {
	var certs, minimums []string
	var roots, measurement, data string
	var vlek, masked, asJSON bool
	var vmpl uint32
	c := &cobra.Command{
		Use:   "verify FILE",
		Short: "Judge a report: signature, chain to AMD's roots, TCB, policy, platform",
		Long: `Judges a report (1184 bytes, or Trustee's evidence, which holds its certificates) as the
KBS does: signature, chain to AMD's roots, chip id, TCB, policy, platform and VMPL. Any
failed check makes it exit with 1. AMD's roots are built in; the chip's certificate
(VCEK) is read from the evidence or from --certs. Nothing is asked over the network.`,
		Example: `  hostbuild report verify report.bin --certs /opt/certs
  hostbuild report verify evidence.json --measurement $(jq -r .launch_digests[0].digest manifest.json)`,
		Args: usage(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			r, found, err := readReport(args[0])
			if err != nil {
				return err
			}
			for _, path := range certs {
				more, err := readCerts(path)
				if err != nil {
					return err
				}
				found = append(more, found...)
			}
			o := verify.Options{Roots: verify.AMDRoots(), Now: time.Now(), MaxVMPL: vmpl, MinTCB: verify.DefaultMinTCB(), AllowVLEK: vlek, AllowMaskedChipID: masked}
			if roots != "" {
				text, err := os.ReadFile(roots)
				if err != nil {
					return err
				}
				more, err := verify.LoadRoots(text)
				if err != nil {
					return fmt.Errorf("%s: %w", roots, err)
				}
				o.Roots = append(o.Roots, more...)
			}
			for _, s := range minimums {
				product, min, err := parseMinTCB(s)
				if err != nil {
					return err
				}
				o.MinTCB[product] = min
			}
			if data != "" {
				b, err := hex.DecodeString(data)
				if err != nil || len(b) != 64 {
					return fmt.Errorf("%w: --report-data is not 128 hex characters", errUsage)
				}
				o.ReportData = (*[64]byte)(b)
			}
			var want *[48]byte
			if measurement != "" {
				d, err := readDigest(measurement)
				if err != nil {
					return err
				}
				want = &d
			}
			v, err := judge(r, found, o, want)
			if asJSON {
				enc := json.NewEncoder(a.Stdout)
				if err := enc.Encode(v); err != nil {
					return err
				}
			} else if err == nil {
				v.print(a)
			}
			return err
		},
	}
	f := c.Flags()
	f.StringArrayVar(&certs, "certs", nil, "certificates: a folder with vcek or vlek (.pem, .der), one such file, or the table of configfs's auxblob; may be repeated")
	f.StringVar(&roots, "roots", "", "PEM file of simulated chips' roots, accepted beside AMD's")
	f.StringVar(&measurement, "measurement", "", "the launch digest that the report must hold, in hex")
	f.StringVar(&data, "report-data", "", "the report data that it must hold, in hex")
	f.StringArrayVar(&minimums, "min-tcb", nil, "`PRODUCT=bootloader/tee/snp/microcode`, such as Milan=4/0/24/219; may be repeated (default: Genoa alone)")
	f.Uint32Var(&vmpl, "max-vmpl", 0, "highest VMPL accepted; reports of a workload come from 1")
	f.BoolVar(&vlek, "allow-vlek", false, "accept keys that AMD lends to cloud providers; they name no chip")
	f.BoolVar(&masked, "allow-masked-chip-id", false, "accept a chip id of zeros")
	f.BoolVar(&asJSON, "json", false, "print an object")
	return c
}

// judge verifies the report; the verdict describes it either way.
func judge(r *snp.Report, certs []snp.Cert, o verify.Options, measurement *[48]byte) (*verdict, error) {
	v := &verdict{
		Version: r.Version, Measurement: hex.EncodeToString(r.Measurement[:]), ReportData: hex.EncodeToString(r.ReportData[:]),
		HostData: hex.EncodeToString(r.HostData[:]), IDKeyDigest: hex.EncodeToString(r.IDKeyDigest[:]), ChipID: hex.EncodeToString(r.ChipID[:]),
		Policy: fmt.Sprintf("%#x", r.Policy), VMPL: r.VMPL, Reported: r.ReportedTCB.String(), Committed: r.CommittedTCB.String(), Launch: r.LaunchTCB.String(),
	}
	res, err := verify.Verify(r, certs, o)
	switch {
	case errors.Is(err, verify.ErrNoVEK):
		err = fmt.Errorf("%w: give it by --certs%s", err, vcekAddress(r))
	case errors.Is(err, verify.ErrNoMinimum):
		err = fmt.Errorf("%w; --min-tcb sets one", err)
	case err == nil && measurement != nil && *measurement != r.Measurement:
		err = fmt.Errorf("the report's measurement is %x, want %x; `hostbuild measure --explain` looks for the cause", r.Measurement, *measurement)
	}
	if err != nil {
		v.Reason = err.Error()
		return v, fmt.Errorf("the report is refused: %w", err)
	}
	v.Verified, v.Product, v.Signer, v.Simulated = true, res.Product, string(res.Signer), res.Simulated
	return v, nil
}

func (v *verdict) print(a *App) {
	if v.Simulated {
		fmt.Fprintln(a.Stdout, "SIMULATED: a made-up chip signed this report, nothing in it is confidential")
	}
	fmt.Fprintf(a.Stdout, "verified           %s, signed by its %s\nmeasurement        %s\nreport data        %s\nhost data          %s\nID key digest      %s\nchip id            %s\npolicy             %s, VMPL %d\nreported TCB       %s\ncommitted TCB      %s\nlaunch TCB         %s\n",
		v.Product, v.Signer, v.Measurement, v.ReportData, v.HostData, v.IDKeyDigest, v.ChipID, v.Policy, v.VMPL, v.Reported, v.Committed, v.Launch)
}

// vcekAddress says where AMD hands out the certificate that a report needs.
func vcekAddress(r *snp.Report) string {
	path, err := r.VCEKPath()
	if err != nil || r.SigningKey() != snp.SigningKeyVCEK {
		return ""
	}
	return "; AMD has it at https://kdsintf.amd.com" + path
}

// readCerts reads the signer's certificate: from a folder as snpguest keeps it,
// from a PEM or DER file, or from a certificate table.
func readCerts(path string) ([]snp.Cert, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return readCertFile(path)
	}
	var out []snp.Cert
	for _, name := range []string{"vcek.der", "vcek.pem", "vlek.der", "vlek.pem"} {
		certs, err := readCertFile(filepath.Join(path, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		out = append(out, certs...)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s holds no vcek.pem, vcek.der, vlek.pem or vlek.der", path)
	}
	return out, nil
}

func readCertFile(path string) ([]snp.Cert, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	kind := snp.VCEK
	if strings.Contains(filepath.Base(path), "vlek") {
		kind = snp.VLEK
	}
	if block, _ := pem.Decode(b); block != nil {
		return []snp.Cert{{Type: kind, Data: block.Bytes}}, nil
	}
	if len(b) > 0 && b[0] == 0x30 { // a DER SEQUENCE; no table's first GUID begins so
		return []snp.Cert{{Type: kind, Data: b}}, nil
	}
	certs, err := snp.ParseCertTable(b)
	if err != nil {
		return nil, fmt.Errorf("%s is neither PEM nor DER nor a certificate table: %w", path, err)
	}
	return certs, nil
}

// parseMinTCB reads PRODUCT=bootloader/tee/snp/microcode; Turin has its fmc first.
func parseMinTCB(s string) (product string, min snp.TCB, err error) {
	product, list, _ := strings.Cut(s, "=")
	bad := fmt.Errorf("%w: --min-tcb %q is not like Genoa=10/0/23/84, or Turin=1/1/1/4/79 with the fmc first", errUsage, s)
	var n []uint8
	for _, part := range strings.Split(list, "/") {
		v, err := strconv.ParseUint(part, 10, 8)
		if err != nil {
			return "", min, bad
		}
		n = append(n, uint8(v))
	}
	switch {
	case product == "Turin" && len(n) == 5:
		min.FMC, n = &n[0], n[1:]
	case (product == "Milan" || product == "Genoa") && len(n) == 4:
	default:
		return "", min, bad
	}
	min.Bootloader, min.TEE, min.SNP, min.Microcode = n[0], n[1], n[2], n[3]
	return product, min, nil
}
