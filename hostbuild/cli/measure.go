package cli

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"coffer/hostbuild/bundle"
	"coffer/internal/measure"
	"coffer/internal/snp"
	"coffer/internal/strict"
)

// measured is a launch digest and all that led to it.
type measured struct {
	LaunchDigest  string `json:"launch_digest"`
	OVMF          string `json:"ovmf_sha256"`
	Kernel        string `json:"kernel_sha256"`
	Initrd        string `json:"initrd_sha256"` // "" for none
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

// measureOutput is what --json prints: the first shape, and all of a bundle's.
type measureOutput struct {
	measured
	CVMID       string       `json:"cvm_id,omitempty"`
	Shapes      []measured   `json:"shapes,omitempty"`
	Explanation *explanation `json:"explanation,omitempty"`
}

// explanation says why a digest is not (one of) the predicted.
type explanation struct {
	Actual string          `json:"actual"`
	Match  bool            `json:"match"`            // it is the predicted one
	CPU    string          `json:"cpu,omitempty"`    // the shape that matches or was changed
	VCPUs  int             `json:"vcpus,omitempty"`  //
	Change *measure.Change `json:"change,omitempty"` // absent: no single change explains it
}

// launch is what is to be measured: the inputs and the allowed shapes of them.
type launch struct {
	cvmID  string
	in     measure.Input // of the files as they are; CPU and VCPUs stand in shapes
	shapes []shape
	alt    measure.Alternatives

	// Of a bundle, whose files may not be those that its manifest names:
	predicted map[shape]string // hex
	meant     measure.Input    // in with the manifest's kernel and initrd
	meantOVMF string           // hex SHA-256
	notes     []string
}

type shape struct {
	cpu   string
	vcpus int
}

type measureFlags struct {
	ovmf, kernel, initrd, appendix, cpu, features string
	vcpus                                         int
	explain                                       string
	altOVMF, altKernel, altInitrd, altAppend      []string
}

func (a *App) measure() *cobra.Command {
	var m measureFlags
	var asJSON bool
	c := &cobra.Command{
		Use:   "measure (BUNDLE | --ovmf F --kernel F [--initrd F] --append S --vcpus N --cpu MODEL)",
		Short: "Compute an SNP launch digest, or explain another",
		Long: `Computes the launch digest from the files themselves, and prints every input and
intermediate digest with it. Given the folder of an unpacked bundle it prints all
shapes (CPU model and number of vCPUs) that the bundle allows.

--explain takes an attestation report, Trustee's evidence, or a digest in hex, and
names the one input that differs where one change explains it: the number of vCPUs,
the CPU model, SEV_FEATURES, the command line (a trailing space, a missing word, ...),
kernel, initrd or firmware of an --alt option or of the manifest. It exits with 1 where
no single change does.`,
		Example: `  hostbuild measure ./cvm_0123456789ab
  hostbuild measure ./cvm_0123456789ab --explain report.bin
  hostbuild measure --ovmf OVMF.amdsev.fd --kernel vmlinuz --initrd initrd.img --append "$(jq -r .cmdline manifest.json)" --vcpus 2 --cpu EPYC-v4`,
		Args: usage(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := m.launch(cmd, args)
			if err != nil {
				return err
			}
			a.warn(l.notes)
			var out measureOutput
			out.CVMID = l.cvmID
			for _, s := range l.shapes {
				r, err := l.measure(s)
				if err != nil {
					return err
				}
				out.Shapes = append(out.Shapes, *r)
			}
			out.measured = out.Shapes[0]
			if len(args) == 0 {
				out.Shapes = nil
			}
			if m.explain != "" {
				if out.Explanation, err = l.explain(m.explain); err != nil {
					return err
				}
			}
			if asJSON {
				enc := json.NewEncoder(a.Stdout)
				enc.SetEscapeHTML(false)
				if err := enc.Encode(out); err != nil {
					return err
				}
			} else {
				out.print(a.Stdout)
			}
			if e := out.Explanation; e != nil && !e.Match && e.Change == nil {
				return errors.New("no single change of an input explains the digest " + e.Actual)
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&m.ovmf, "ovmf", "", "the firmware, OVMF.amdsev.fd")
	f.StringVar(&m.kernel, "kernel", "", "the kernel, vmlinuz")
	f.StringVar(&m.initrd, "initrd", "", "the initrd; empty for none")
	f.StringVar(&m.appendix, "append", "", "the kernel command line, byte for byte")
	f.IntVar(&m.vcpus, "vcpus", 1, "number of vCPUs; with a bundle: show this number only")
	f.StringVar(&m.cpu, "cpu", "EPYC-v4", "QEMU's CPU model; with a bundle: show this model only")
	f.StringVar(&m.features, "guest-features", "0x1", "SEV_FEATURES")
	f.StringVar(&m.explain, "explain", "", "`REPORT|HEX`: why is this the digest, and not the predicted one?")
	f.StringArrayVar(&m.altOVMF, "alt-ovmf", nil, "for --explain: a firmware that may have been used; may be repeated")
	f.StringArrayVar(&m.altKernel, "alt-kernel", nil, "for --explain: the same for the kernel")
	f.StringArrayVar(&m.altInitrd, "alt-initrd", nil, "for --explain: the same for the initrd")
	f.StringArrayVar(&m.altAppend, "alt-append", nil, "for --explain: the same for the command line")
	f.BoolVar(&asJSON, "json", false, "print an object")
	return c
}

func (m *measureFlags) launch(cmd *cobra.Command, args []string) (*launch, error) {
	features, err := strconv.ParseUint(m.features, 0, 64)
	if err != nil {
		return nil, fmt.Errorf("%w: --guest-features %q is not a number such as 0x1", errUsage, m.features)
	}
	var l *launch
	given := cmd.Flags().Changed
	switch {
	case len(args) == 1:
		for _, name := range []string{"ovmf", "kernel", "initrd", "append", "guest-features"} {
			if given(name) {
				return nil, fmt.Errorf("%w: --%s together with a bundle, which says itself what it is; --alt-... is for what may have been used in its place", errUsage, name)
			}
		}
		if l, err = bundleLaunch(args[0]); err != nil {
			return nil, err
		}
		l.keep(func(s shape) bool {
			return (!given("vcpus") || s.vcpus == m.vcpus) && (!given("cpu") || s.cpu == m.cpu)
		})
		if len(l.shapes) == 0 {
			return nil, fmt.Errorf("%s allows no such number of vCPUs or CPU model", args[0])
		}
	case m.ovmf == "" || m.kernel == "":
		return nil, fmt.Errorf("%w: give a bundle's folder, or --ovmf and --kernel; see %s --help", errUsage, cmd.CommandPath())
	default:
		l = &launch{shapes: []shape{{m.cpu, m.vcpus}}, in: measure.Input{Cmdline: m.appendix, HasKernel: true, HasInitrd: m.initrd != ""}}
		if l.in.OVMF, err = os.ReadFile(m.ovmf); err != nil {
			return nil, err
		}
		if l.in.Kernel, err = measure.HashFile(m.kernel); err != nil {
			return nil, err
		}
		if l.in.HasInitrd {
			if l.in.Initrd, err = measure.HashFile(m.initrd); err != nil {
				return nil, err
			}
		}
	}
	if len(args) == 0 {
		l.in.GuestFeatures = features
		l.meant, l.meantOVMF = l.in, measure.HexSHA256(l.in.OVMF)
	}
	return l, m.alternatives(l)
}

func (m *measureFlags) alternatives(l *launch) error {
	for _, kind := range []struct {
		paths []string
		out   *[]measure.Alternative
	}{{m.altOVMF, &l.alt.OVMF}, {m.altKernel, &l.alt.Kernel}, {m.altInitrd, &l.alt.Initrd}} {
		for _, path := range kind.paths {
			sum, err := measure.HashFile(path)
			if err != nil {
				return err
			}
			alt := measure.Alternative{Name: path, SHA256: sum}
			if kind.out == &l.alt.OVMF {
				if alt.Image, err = os.ReadFile(path); err != nil {
					return err
				}
			}
			*kind.out = append(*kind.out, alt)
		}
	}
	l.alt.Cmdlines = append(l.alt.Cmdlines, m.altAppend...)
	return nil
}

// bundleLaunch reads an unpacked bundle. What is measured are its files as they
// are; where they are not the manifest's, those are alternatives to explain with.
func bundleLaunch(dir string) (*launch, error) {
	man, err := bundle.ReadManifest(dir)
	if err != nil {
		return nil, err
	}
	l := &launch{cvmID: man.CVMID, predicted: map[shape]string{}, in: measure.Input{Cmdline: man.Cmdline, HasKernel: true, HasInitrd: true}}
	if l.in.GuestFeatures, err = strconv.ParseUint(man.GuestFeatures, 0, 64); err != nil {
		return nil, fmt.Errorf("%s: guest_features: %w", bundle.ManifestName, err)
	}
	for _, d := range man.LaunchDigests {
		s := shape{d.CPU, d.VCPUs}
		l.shapes = append(l.shapes, s)
		l.predicted[s] = d.Digest
	}
	if len(l.shapes) == 0 {
		return nil, fmt.Errorf("%s: %s names no launch digest", dir, bundle.ManifestName)
	}
	if l.in.OVMF, err = os.ReadFile(filepath.Join(dir, bundle.OVMF)); err != nil {
		return nil, err
	}
	want := map[string][32]byte{}
	for _, f := range man.Files {
		if sum, err := hex.DecodeString(f.SHA256); err == nil && len(sum) == 32 {
			want[f.Name] = [32]byte(sum)
		}
	}
	if l.in.Kernel, err = measure.HashFile(filepath.Join(dir, bundle.Kernel)); err != nil {
		return nil, err
	}
	if l.in.Initrd, err = measure.HashFile(filepath.Join(dir, bundle.Initrd)); err != nil {
		return nil, err
	}
	l.meant = l.in
	l.meant.Kernel, l.meant.Initrd = want[bundle.Kernel], want[bundle.Initrd]
	l.meantOVMF = fmt.Sprintf("%x", want[bundle.OVMF])
	differs := func(name string) {
		l.notes = append(l.notes, fmt.Sprintf("%s is not the file of %s: the digests below are not those that the KBS was given", name, bundle.ManifestName))
	}
	if measure.HexSHA256(l.in.OVMF) != l.meantOVMF {
		differs(bundle.OVMF)
	}
	if l.in.Kernel != l.meant.Kernel {
		differs(bundle.Kernel)
		l.alt.Kernel = append(l.alt.Kernel, measure.Alternative{Name: bundle.Kernel + " of this folder", SHA256: l.in.Kernel})
	}
	if l.in.Initrd != l.meant.Initrd {
		differs(bundle.Initrd)
		l.alt.Initrd = append(l.alt.Initrd, measure.Alternative{Name: bundle.Initrd + " of this folder", SHA256: l.in.Initrd})
	}
	if s, ok := scriptCmdline(filepath.Join(dir, bundle.LaunchVM)); ok && s != man.Cmdline {
		l.notes = append(l.notes, fmt.Sprintf("the command line in %s is not the manifest's", bundle.LaunchVM))
		l.alt.Cmdlines = append(l.alt.Cmdlines, s)
	}
	return l, nil
}

// scriptCmdline reads the command line that a launch_vm.sh would start with.
func scriptCmdline(path string) (string, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", false
	}
	_, rest, ok := strings.Cut(string(b), "\nCMDLINE='")
	if !ok {
		return "", false
	}
	s, _, ok := strings.Cut(rest, "'\n")
	return s, ok
}

func (l *launch) keep(ok func(shape) bool) {
	var kept []shape
	for _, s := range l.shapes {
		if ok(s) {
			kept = append(kept, s)
		}
	}
	l.shapes = kept
}

func (l *launch) measure(s shape) (*measured, error) {
	in := l.in
	in.CPU, in.VCPUs = s.cpu, s.vcpus
	r, err := measure.Digest(in)
	if err != nil {
		return nil, err
	}
	sig, err := measure.CPUSignature(s.cpu)
	if err != nil {
		return nil, err
	}
	m := &measured{
		LaunchDigest: hex.EncodeToString(r.LaunchDigest[:]), OVMF: measure.HexSHA256(in.OVMF), Kernel: hex.EncodeToString(in.Kernel[:]),
		Append: in.Cmdline, CPU: s.cpu, CPUSignature: fmt.Sprintf("%#x", sig), VCPUs: s.vcpus, GuestFeatures: fmt.Sprintf("%#x", in.GuestFeatures),
		AfterOVMF: hex.EncodeToString(r.AfterOVMF[:]), AfterMetadata: hex.EncodeToString(r.AfterMetadata[:]), VMSABSP: hex.EncodeToString(r.VMSABSP[:]),
	}
	if in.HasInitrd {
		m.Initrd = hex.EncodeToString(in.Initrd[:])
	}
	if s.vcpus > 1 {
		m.VMSAAP = hex.EncodeToString(r.VMSAAP[:])
	}
	return m, nil
}

func (l *launch) explain(arg string) (*explanation, error) {
	actual, err := readDigest(arg)
	if err != nil {
		return nil, err
	}
	e := &explanation{Actual: hex.EncodeToString(actual[:])}
	found := func(s shape, c *measure.Change) *explanation {
		e.CPU, e.VCPUs, e.Match, e.Change = s.cpu, s.vcpus, c == nil, c
		return e
	}
	for _, s := range l.shapes {
		if l.predicted[s] == e.Actual {
			return found(s, nil), nil
		}
	}
	// With another firmware than the manifest's, whatever else differs is a
	// second change.
	ovmf := measure.HexSHA256(l.in.OVMF)
	for _, s := range l.shapes {
		in := l.meant
		in.CPU, in.VCPUs = s.cpu, s.vcpus
		change, match, err := measure.Explain(in, actual, l.alt)
		switch {
		case err != nil:
			return nil, err
		case match && ovmf != l.meantOVMF:
			return found(s, &measure.Change{Input: "ovmf", Meant: l.meantOVMF, Actual: bundle.OVMF + " of this folder (" + ovmf + ")"}), nil
		case match:
			return found(s, nil), nil
		case change != nil && ovmf == l.meantOVMF:
			return found(s, change), nil
		}
	}
	return e, nil
}

// readDigest takes a digest as hex or base64, or the file of a report or of
// evidence.
func readDigest(arg string) (digest [48]byte, err error) {
	for _, decode := range []func(string) ([]byte, error){hex.DecodeString, base64.StdEncoding.DecodeString} {
		if b, err := decode(strings.TrimPrefix(arg, "0x")); err == nil && len(b) == len(digest) {
			return [48]byte(b), nil
		}
	}
	r, _, err := readReport(arg)
	if errors.Is(err, os.ErrNotExist) {
		return digest, fmt.Errorf("%w: --explain %q is neither a file nor a digest of 96 hex characters", errUsage, arg)
	}
	if err != nil {
		return digest, err
	}
	return r.Measurement, nil
}

// readReport reads a report, raw or in Trustee's evidence, and its certificates.
func readReport(path string) (*snp.Report, []snp.Cert, error) {
	data, err := strict.ReadFile(path, 1<<20)
	if err != nil {
		return nil, nil, err
	}
	var certs []snp.Cert
	if len(data) > 0 && data[0] == '{' {
		if data, certs, err = snp.ParseEvidenceJSON(data); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	r, err := snp.ParseReport(data)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, certs, nil
}

func (o *measureOutput) print(w io.Writer) {
	p := func(label, format string, args ...any) {
		fmt.Fprintf(w, "%-18s %s\n", label, fmt.Sprintf(format, args...))
	}
	shapes := o.Shapes
	if shapes == nil {
		shapes = []measured{o.measured}
	} else {
		p("CVM", "%s", o.CVMID)
	}
	p("OVMF sha256", "%s", o.OVMF)
	p("kernel sha256", "%s", o.Kernel)
	p("initrd sha256", "%s", o.Initrd)
	p("append", "%q", o.Append)
	p("guest features", "%s", o.GuestFeatures)
	p("after OVMF", "%s", o.AfterOVMF)
	p("after metadata", "%s", o.AfterMetadata)
	for _, m := range shapes {
		fmt.Fprintln(w)
		p("CPU", "%s (signature %s)", m.CPU, m.CPUSignature)
		p("vCPUs", "%d", m.VCPUs)
		p("VMSA, first vCPU", "%s", m.VMSABSP)
		if m.VMSAAP != "" {
			p("VMSA, other vCPUs", "%s", m.VMSAAP)
		}
		p("launch digest", "%s", m.LaunchDigest)
	}
	if e := o.Explanation; e != nil {
		fmt.Fprintln(w)
		p("explained digest", "%s", e.Actual)
		switch {
		case e.Match:
			p("explanation", "it is the predicted one, for %s with %d vCPU", e.CPU, e.VCPUs)
		case e.Change != nil:
			p("explanation", "one input differs from %s with %d vCPU", e.CPU, e.VCPUs)
			p("  input", "%s", e.Change.Input)
			p("  launched", "%s", e.Change.Actual)
			p("  meant", "%s", e.Change.Meant)
		default:
			p("explanation", "none: no single change of vCPU count, CPU model, features, command line, kernel, initrd or firmware gives it;")
			p("", "two inputs differ, or a file that is not known here was used (--alt-kernel, --alt-initrd, --alt-ovmf)")
		}
	}
}
