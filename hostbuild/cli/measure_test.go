package cli

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coffer/hostbuild/bundle"
	"coffer/internal/measure"
	"coffer/test/fakebase"
	"coffer/test/simsnp"
)

// run runs hostbuild and returns its exit code and outputs.
func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	a := &App{Version: "test", Stdout: &out, Stderr: &errOut}
	code = a.Run(context.Background(), append([]string{"hostbuild"}, args...))
	return code, out.String(), errOut.String()
}

func writeFiles(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

const testCmdline = "console=ttyS0 vm_id=cvm_0123456789ab"

// testBundle makes the measured files of an unpacked bundle and its manifest.
func testBundle(t *testing.T) (dir string, m *bundle.Manifest) {
	t.Helper()
	dir = t.TempDir()
	ovmf := fakebase.OVMF(t)
	writeFiles(t, dir, map[string][]byte{
		bundle.OVMF: ovmf, bundle.Kernel: []byte("kernel"), bundle.Initrd: []byte("initrd"),
		bundle.LaunchVM: []byte("#!/bin/sh\nCMDLINE='" + testCmdline + "'\n"),
	})
	m = &bundle.Manifest{Version: 1, CVMID: "cvm_0123456789ab", Platform: "snp", Cmdline: testCmdline, GuestFeatures: "0x1"}
	for _, name := range []string{bundle.OVMF, bundle.Kernel, bundle.Initrd} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		m.Files = append(m.Files, bundle.File{Name: name, Size: int64(len(b)), SHA256: measure.HexSHA256(b)})
	}
	for _, cpu := range []string{"EPYC-v4", "EPYC-Genoa"} {
		for _, n := range []int{2, 1} {
			d := digestOf(t, dir, cpu, n, testCmdline)
			m.LaunchDigests = append(m.LaunchDigests, bundle.LaunchDigest{CPU: cpu, VCPUs: n, Digest: d})
		}
	}
	if err := bundle.WriteManifest(dir, m); err != nil {
		t.Fatal(err)
	}
	return dir, m
}

func digestOf(t *testing.T, dir, cpu string, vcpus int, cmdline string) string {
	t.Helper()
	in := measure.Input{HasKernel: true, HasInitrd: true, Cmdline: cmdline, VCPUs: vcpus, CPU: cpu}
	var err error
	if in.OVMF, err = os.ReadFile(filepath.Join(dir, bundle.OVMF)); err != nil {
		t.Fatal(err)
	}
	for name, sum := range map[string]*[32]byte{bundle.Kernel: &in.Kernel, bundle.Initrd: &in.Initrd} {
		if *sum, err = measure.HashFile(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	r, err := measure.Digest(in)
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(r.LaunchDigest[:])
}

// reportOf is a report with a launch digest.
func reportOf(t *testing.T, digest string) []byte {
	t.Helper()
	chip, err := simsnp.New(simsnp.Params{})
	if err != nil {
		t.Fatal(err)
	}
	sum, err := hex.DecodeString(digest)
	if err != nil {
		t.Fatal(err)
	}
	r, err := chip.Report([48]byte(sum), [64]byte{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	return r.Marshal()
}

func fileArgs(dir string, more ...string) []string {
	return append([]string{"measure", "--ovmf", filepath.Join(dir, bundle.OVMF), "--kernel", filepath.Join(dir, bundle.Kernel),
		"--initrd", filepath.Join(dir, bundle.Initrd), "--append", testCmdline}, more...)
}

func parseOutput(t *testing.T, stdout string) (o measureOutput) {
	t.Helper()
	if err := json.Unmarshal([]byte(stdout), &o); err != nil {
		t.Fatalf("%v: %s", err, stdout)
	}
	return o
}

func TestMeasureFiles(t *testing.T) {
	dir, m := testBundle(t)
	code, out, errOut := run(t, fileArgs(dir, "--vcpus", "2", "--cpu", "EPYC-v4", "--json")...)
	if code != 0 {
		t.Fatal(errOut)
	}
	o := parseOutput(t, out)
	if o.LaunchDigest != m.LaunchDigests[0].Digest || o.VCPUs != 2 || o.CPUSignature != "0x800f12" || o.Append != testCmdline || o.GuestFeatures != "0x1" {
		t.Errorf("%+v", o)
	}
	for _, f := range m.Files {
		if got := map[string]string{bundle.OVMF: o.OVMF, bundle.Kernel: o.Kernel, bundle.Initrd: o.Initrd}[f.Name]; got != f.SHA256 {
			t.Errorf("%s: sha256 %s, want %s", f.Name, got, f.SHA256)
		}
	}
	for _, d := range []string{o.AfterOVMF, o.AfterMetadata, o.VMSABSP, o.VMSAAP} {
		if len(d) != 96 {
			t.Errorf("intermediate digest %q", d)
		}
	}
	if code, out, _ := run(t, fileArgs(dir, "--vcpus", "2")...); code != 0 || !strings.Contains(out, "launch digest      "+o.LaunchDigest+"\n") {
		t.Errorf("exit %d: %s", code, out)
	}
}

func TestMeasureBundlePrintsAllShapes(t *testing.T) {
	dir, m := testBundle(t)
	code, out, errOut := run(t, "measure", dir, "--json")
	if code != 0 || errOut != "" {
		t.Fatal(code, errOut)
	}
	o := parseOutput(t, out)
	if o.CVMID != m.CVMID || o.LaunchDigest != m.LaunchDigests[0].Digest || len(o.Shapes) != 4 {
		t.Fatalf("%+v", o)
	}
	for i, d := range m.LaunchDigests {
		if s := o.Shapes[i]; s.LaunchDigest != d.Digest || s.CPU != d.CPU || s.VCPUs != d.VCPUs {
			t.Errorf("shape %d: %+v, want %+v", i, s, d)
		}
	}
	_, out, _ = run(t, "measure", dir)
	for _, d := range m.LaunchDigests {
		if !strings.Contains(out, d.Digest) {
			t.Errorf("the text lacks %s:\n%s", d.Digest, out)
		}
	}
	if code, out, _ := run(t, "measure", dir, "--vcpus", "1", "--cpu", "EPYC-Genoa", "--json"); code != 0 || parseOutput(t, out).LaunchDigest != m.LaunchDigests[3].Digest {
		t.Errorf("one shape: exit %d, %s", code, out)
	}
}

func TestMeasureExplain(t *testing.T) {
	dir, m := testBundle(t)
	changed := t.TempDir() // the same bundle with another initrd
	initrd, err := os.ReadFile(filepath.Join(dir, bundle.Initrd))
	if err != nil {
		t.Fatal(err)
	}
	ovmf, other := fakebase.OVMF(t), t.TempDir()
	writeFiles(t, changed, map[string][]byte{bundle.OVMF: ovmf, bundle.Kernel: []byte("kernel"), bundle.Initrd: append(initrd, ' ')})
	ovmf = bytes.Clone(ovmf)
	ovmf[0] ^= 1
	writeFiles(t, other, map[string][]byte{bundle.OVMF: ovmf, bundle.Kernel: []byte("kernel"), bundle.Initrd: initrd})
	for _, d := range []string{changed, other} {
		if err := bundle.WriteManifest(d, m); err != nil {
			t.Fatal(err)
		}
	}
	for name, tc := range map[string]struct {
		args          []string
		digest        string
		input, actual string
	}{
		"vCPUs":                         {[]string{"measure", dir}, digestOf(t, dir, "EPYC-v4", 3, testCmdline), "vcpus", "3"},
		"vCPUs of the second model":     {[]string{"measure", dir}, digestOf(t, dir, "EPYC-Genoa", 7, testCmdline), "vcpus", "7"},
		"model":                         {[]string{"measure", dir}, digestOf(t, dir, "EPYC-Milan", 2, testCmdline), "cpu", "EPYC-Milan or EPYC-Milan-v1"},
		"trailing space":                {[]string{"measure", dir}, digestOf(t, dir, "EPYC-v4", 2, testCmdline+" "), "append", "trailing space"},
		"the host changed initrd.img":   {[]string{"measure", changed}, digestOf(t, changed, "EPYC-v4", 2, testCmdline), "initrd", "initrd.img of this folder"},
		"the host changed the firmware": {[]string{"measure", other}, digestOf(t, other, "EPYC-v4", 1, testCmdline), "ovmf", "OVMF.amdsev.fd of this folder"},
		"files, initrd given":           {fileArgs(dir, "--alt-initrd", changed+"/"+bundle.Initrd), digestOf(t, changed, "EPYC-v4", 1, testCmdline), "initrd", changed},
		"files, firmware given":         {fileArgs(dir, "--alt-ovmf", other+"/"+bundle.OVMF), digestOf(t, other, "EPYC-v4", 1, testCmdline), "ovmf", other},
		"files, command line given":     {fileArgs(dir, "--alt-append", "x"), digestOf(t, dir, "EPYC-v4", 1, "x"), "append", `"x"`},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errOut := run(t, append(tc.args, "--json", "--explain", tc.digest)...)
			if code != 0 {
				t.Fatalf("exit %d: %s", code, errOut)
			}
			e := parseOutput(t, out).Explanation
			if e == nil || e.Match || e.Change == nil || e.Change.Input != tc.input || !strings.Contains(e.Change.Actual, tc.actual) {
				t.Errorf("%+v, want %s %s", e, tc.input, tc.actual)
			}
			if _, out, _ := run(t, append(tc.args, "--explain", "0x"+strings.ToUpper(tc.digest))...); !strings.Contains(out, "input            "+tc.input) {
				t.Errorf("text: %s", out)
			}
		})
	}
	t.Run("predicted", func(t *testing.T) {
		for _, d := range []string{dir, changed} { // the manifest's digest, whatever the files are by now
			code, out, errOut := run(t, "measure", d, "--json", "--explain", m.LaunchDigests[2].Digest)
			if e := parseOutput(t, out).Explanation; code != 0 || !e.Match || e.CPU != "EPYC-Genoa" || e.VCPUs != 2 {
				t.Errorf("exit %d, %+v, %s", code, e, errOut)
			}
		}
	})
	t.Run("no single change", func(t *testing.T) {
		for _, args := range [][]string{{"measure", dir}, fileArgs(dir)} {
			code, out, errOut := run(t, append(args, "--explain", digestOf(t, dir, "EPYC-Milan", 3, testCmdline+" "))...)
			if code != 1 || !strings.Contains(out, "explanation        none: no single change") || !strings.Contains(errOut, "no single change") {
				t.Errorf("exit %d\n%s%s", code, out, errOut)
			}
		}
	})
	t.Run("a changed file is told", func(t *testing.T) {
		if _, _, errOut := run(t, "measure", changed); !strings.Contains(errOut, "initrd.img is not the file of manifest.json") {
			t.Error(errOut)
		}
	})
}

// A report and Trustee's evidence are as good as their digest.
func TestMeasureExplainsReports(t *testing.T) {
	dir, _ := testBundle(t)
	digest := digestOf(t, dir, "EPYC-v4", 5, testCmdline)
	sum, err := hex.DecodeString(digest)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "report.bin")
	writeFiles(t, dir, map[string][]byte{"report.bin": reportOf(t, digest), "short.bin": []byte("x")})
	for _, arg := range []string{file, base64.StdEncoding.EncodeToString(sum)} {
		code, out, errOut := run(t, "measure", dir, "--json", "--explain", arg)
		if e := parseOutput(t, out).Explanation; code != 0 || e.Change == nil || e.Change.Actual != "5" {
			t.Errorf("%s: exit %d, %+v, %s", arg, code, e, errOut)
		}
	}
	for arg, want := range map[string]int{filepath.Join(dir, "short.bin"): 1, filepath.Join(dir, "nowhere"): 2, "ab": 2} {
		if code, _, errOut := run(t, "measure", dir, "--explain", arg); code != want || !strings.Contains(errOut, arg) {
			t.Errorf("%s: exit %d, %s", arg, code, errOut)
		}
	}
}

func TestMeasureUsage(t *testing.T) {
	dir, _ := testBundle(t)
	for want, args := range map[string][]string{
		"give a bundle's folder":  {"measure"},
		"together with a bundle":  {"measure", dir, "--append", "x"},
		"allows no such number":   {"measure", dir, "--vcpus", "9"},
		"is not a number such as": fileArgs(dir, "--guest-features", "x"),
		"unknown CPU model":       fileArgs(dir, "--cpu", "host"),
		"is no bundle":            {"measure", t.TempDir()},
	} {
		if code, out, errOut := run(t, args...); code == 0 || out != "" || !strings.Contains(errOut, want) {
			t.Errorf("%v: exit %d, %q, want %q", args, code, errOut, want)
		}
	}
}
