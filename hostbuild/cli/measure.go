package cli

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"coffer/internal/measure"
)

// measured is what `hostbuild measure` prints: the digest and all that led to it.
type measured struct {
	LaunchDigest  string `json:"launch_digest"`
	OVMF          string `json:"ovmf_sha256"`
	Kernel        string `json:"kernel_sha256"`
	Initrd        string `json:"initrd_sha256"`
	Append        string `json:"append"`
	CPU           string `json:"cpu"`
	CPUSignature  string `json:"cpu_signature"`
	VCPUs         int    `json:"vcpus"`
	GuestFeatures string `json:"guest_features"`
	AfterOVMF     string `json:"ld_after_ovmf"`
	AfterMetadata string `json:"ld_after_metadata"`
	VMSABSP       string `json:"vmsa_bsp_sha384"`
	VMSAAP        string `json:"vmsa_ap_sha384,omitempty"`
}

func (a *App) measure() *cobra.Command {
	var ovmf, kernel, initrd, appendix, cpu, features string
	var vcpus int
	var asJSON bool
	c := &cobra.Command{
		Use:     "measure",
		Short:   "Compute an SNP launch digest",
		Example: `  hostbuild measure --ovmf OVMF.amdsev.fd --kernel vmlinuz --initrd initrd.img --append "$(jq -r .cmdline manifest.json)" --vcpus 2 --cpu EPYC-v4`,
		Args:    usage(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			m, err := measureFiles(ovmf, kernel, initrd, appendix, cpu, features, vcpus)
			if err != nil {
				return err
			}
			enc := json.NewEncoder(a.Stdout)
			enc.SetEscapeHTML(false)
			if asJSON {
				return enc.Encode(m)
			}
			fmt.Fprintf(a.Stdout, "launch digest      %s\nOVMF sha256        %s\nkernel sha256      %s\ninitrd sha256      %s\nappend             %q\nvCPUs              %d\nCPU                %s (signature %s)\nguest features     %s\nafter OVMF         %s\nafter metadata     %s\nVMSA, first vCPU   %s\n",
				m.LaunchDigest, m.OVMF, m.Kernel, m.Initrd, m.Append, m.VCPUs, m.CPU, m.CPUSignature, m.GuestFeatures, m.AfterOVMF, m.AfterMetadata, m.VMSABSP)
			if m.VMSAAP != "" {
				fmt.Fprintf(a.Stdout, "VMSA, other vCPUs  %s\n", m.VMSAAP)
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&ovmf, "ovmf", "", "the firmware, OVMF.amdsev.fd")
	f.StringVar(&kernel, "kernel", "", "the kernel, vmlinuz")
	f.StringVar(&initrd, "initrd", "", "the initrd; empty for none")
	f.StringVar(&appendix, "append", "", "the kernel command line, byte for byte")
	f.IntVar(&vcpus, "vcpus", 1, "number of vCPUs")
	f.StringVar(&cpu, "cpu", "EPYC-v4", "QEMU's CPU model")
	f.StringVar(&features, "guest-features", "0x1", "SEV_FEATURES")
	f.BoolVar(&asJSON, "json", false, "print an object")
	c.MarkFlagRequired("ovmf")
	c.MarkFlagRequired("kernel")
	return c
}

func measureFiles(ovmf, kernel, initrd, appendix, cpu, features string, vcpus int) (*measured, error) {
	image, err := os.ReadFile(ovmf)
	if err != nil {
		return nil, err
	}
	feat, err := strconv.ParseUint(features, 0, 64)
	if err != nil {
		return nil, fmt.Errorf("%w: --guest-features %q is not a number such as 0x1", errUsage, features)
	}
	in := measure.Input{OVMF: image, HasKernel: true, Cmdline: appendix, VCPUs: vcpus, CPU: cpu, GuestFeatures: feat}
	if in.Kernel, err = measure.HashFile(kernel); err != nil {
		return nil, err
	}
	m := &measured{Append: appendix, CPU: cpu, VCPUs: vcpus, GuestFeatures: fmt.Sprintf("%#x", feat), Kernel: hex.EncodeToString(in.Kernel[:])}
	if initrd != "" {
		in.HasInitrd = true
		if in.Initrd, err = measure.HashFile(initrd); err != nil {
			return nil, err
		}
		m.Initrd = hex.EncodeToString(in.Initrd[:])
	}
	sum, err := measure.HashFile(ovmf)
	if err != nil {
		return nil, err
	}
	sig, err := measure.CPUSignature(cpu)
	if err != nil {
		return nil, err
	}
	r, err := measure.Digest(in)
	if err != nil {
		return nil, err
	}
	m.OVMF, m.CPUSignature = hex.EncodeToString(sum[:]), fmt.Sprintf("%#x", sig)
	m.LaunchDigest, m.AfterOVMF, m.AfterMetadata = hex.EncodeToString(r.LaunchDigest[:]), hex.EncodeToString(r.AfterOVMF[:]), hex.EncodeToString(r.AfterMetadata[:])
	m.VMSABSP = hex.EncodeToString(r.VMSABSP[:])
	if vcpus > 1 {
		m.VMSAAP = hex.EncodeToString(r.VMSAAP[:])
	}
	return m, nil
}
