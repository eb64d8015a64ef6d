package bundle

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"coffer/internal/guestconfig"
	"coffer/internal/testenv"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The test binary plays the simulated platform too: a socket that QEMU could
// connect to.
func TestMain(m *testing.M) {
	if i := slices.Index(os.Args, "--socket"); i > 0 && os.Args[1] == "serve" {
		if _, err := net.Listen("unix", os.Args[i+1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		select {} // killed
	}
	os.Exit(m.Run())
}

// testLaunch is a bundle with two shapes and ports of both kinds.
func testLaunch(platform string) Launch {
	return Launch{
		CVMID: "cvm_0123456789ab", Platform: platform, CPUModels: []string{"EPYC-v4", "EPYC-Genoa"}, VCPUs: []int{2, 1}, MemoryMiB: 2048,
		Cmdline: "console=ttyS0 vm_id=cvm_0123456789ab",
		Ports:   []guestconfig.Port{{Port: 8002, Proto: "tcp"}, {Port: 8003, Proto: "tcp"}, {Port: 5353, Proto: "udp"}},
	}
}

// place is a made-up unpacked bundle, and a made-up host for its launch_vm.sh.
type place struct {
	t    *testing.T
	dir  string // of the bundle
	root string // COFFER_SYSROOT
	qemu string // a program that answers as QEMU does where the script asks
	env  []string
}

// fakeQEMU knows what the script asks QEMU for. Started as a guest it prints
// $FAKE_MESSAGE and exits with $FAKE_RC; or as a guest that lives ($FAKE_GUEST):
// "obeys" ends when the monitor presses the power button, "deaf" never does.
const fakeQEMU = `#!/bin/sh
case $* in
--version) echo "QEMU emulator version ${FAKE_VERSION:-10.2.2} (Debian)"; exit ;;
'-object sev-snp-guest,help') exit ${FAKE_NO_SNP:-0} ;;
'-cpu help') printf 'Available CPUs:\n  EPYC-Genoa           AMD\n  %s  AMD EPYC\n' "${FAKE_CPU:-EPYC-v4}"; exit ;;
*query-sev*|*'-qmp stdio'*) cat >/dev/null; [ -z "${FAKE_CBIT:-}" ] || echo '{"return": {"cbitpos": '$FAKE_CBIT', "reduced-phys-bits": 1}}'; exit ;;
esac
echo "$@" >"${FAKE_ARGS:-/dev/null}"
[ -z "${FAKE_MESSAGE:-}" ] || printf '%s\n' "$FAKE_MESSAGE" >&2
echo "guest console"
case ${FAKE_GUEST:-} in
'') exit ${FAKE_RC:-0} ;;
deaf) exec sleep 1000 ;;
esac
for a; do case $a in pipe,id=mon,path=*) monitor=${a#pipe,id=mon,path=} ;; esac; done
read -r line <"$monitor.in"
echo "monitor: $line"
exit ${FAKE_RC:-0}
`

func newPlace(t *testing.T, l Launch) *place {
	t.Helper()
	top := t.TempDir()
	p := &place{t: t, dir: filepath.Join(top, l.CVMID), root: filepath.Join(top, "root"), qemu: filepath.Join(top, "qemu-fake")}
	p.write(p.qemu, fakeQEMU)
	p.mode(p.qemu, 0o755)
	for _, n := range []string{OVMF, Kernel, Initrd, CryptRoot, Applog, UserConfig, UserData} {
		p.write(filepath.Join(p.dir, n), n)
	}
	for _, n := range []string{Kernel, Initrd, OVMF} { // each holds its own name
		l.Files = append(l.Files, File{Name: n, Size: int64(len(n)), SHA256: fmt.Sprintf("%x", sha256.Sum256([]byte(n)))})
	}
	script, err := LaunchScript(l)
	if err != nil {
		t.Fatal(err)
	}
	p.write(filepath.Join(p.dir, LaunchVM), string(script))
	p.mode(filepath.Join(p.dir, LaunchVM), 0o755)

	p.host("proc/cpuinfo", "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9354\nflags\t\t: fpu svm sev sev_es sev_snp\n")
	p.host("proc/sys/kernel/osrelease", "6.12.9-amd64\n")
	p.host("proc/meminfo", "MemTotal: 99999999 kB\nMemAvailable:   8388608 kB\n")
	p.host("proc/net/tcp", listenTable)
	p.host("sys/module/kvm_amd/parameters/sev_snp", "Y\n")
	p.host("dev/sev", "")
	p.host("dev/kvm", "")
	p.cpuid(0x80000028, 0x1b, 51|1<<6)
	chip := filepath.Join(top, "chip")
	p.write(filepath.Join(chip, "roots.pem"), "")
	p.env = append(os.Environ(), "QEMU="+p.qemu, "COFFER_SYSROOT="+p.root, "COFFER_SIM_CHIP="+chip, "COFFER_SIMPLATFORM="+os.Args[0], "LC_ALL=C")
	return p
}

// listenTable says that someone listens on 127.0.0.1:22 and has a connection at :8002.
const listenTable = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:1F42 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
`

func (p *place) write(path, text string) {
	p.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		p.t.Fatal(err)
	}
}

func (p *place) mode(path string, mode os.FileMode) {
	p.t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		p.t.Fatal(err)
	}
}

func (p *place) host(name, text string) { p.write(filepath.Join(p.root, name), text) }

func (p *place) link(name, target string) {
	p.t.Helper()
	path := filepath.Join(p.root, name)
	os.Remove(path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink(target, path)); err != nil {
		p.t.Fatal(err)
	}
}

func (p *place) remove(name string) {
	if err := os.RemoveAll(filepath.Join(p.root, name)); err != nil {
		p.t.Fatal(err)
	}
}

// cpuid makes a sparse file in which the leaves from 0x80000000 on lie as
// /dev/cpu/0/cpuid gives them.
func (p *place) cpuid(max, eax, ebx uint32) {
	p.t.Helper()
	p.host("dev/cpu/0/cpuid", "")
	f, err := os.OpenFile(filepath.Join(p.root, "dev/cpu/0/cpuid"), os.O_WRONLY, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 32*16)
	binary.LittleEndian.PutUint32(b, max)
	binary.LittleEndian.PutUint32(b[31*16:], eax)
	binary.LittleEndian.PutUint32(b[31*16+4:], ebx)
	if _, err := f.WriteAt(b, 0x80000000); err != nil {
		p.t.Fatal(err)
	}
}

// gpu puts an NVIDIA card with a BAR of mib MiB on the made-up host.
func (p *place) gpu(address string, mib uint64, driver string) {
	dev := "sys/bus/pci/devices/" + address
	p.host(dev+"/vendor", "0x10de\n")
	p.host(dev+"/class", "0x030200\n")
	const start = 0x2a000000000
	p.host(dev+"/resource", fmt.Sprintf("0x00000000f1000000 0x00000000f1ffffff 0x0000000000040200\n0x%016x 0x%016x 0x000000000014220c\n0x0000000000000000 0x0000000000000000 0x0000000000000000\n", uint64(start), start+mib<<20-1))
	p.link(dev+"/driver", "../../../../bus/pci/drivers/"+driver)
	p.link(dev+"/iommu_group", "../../../../kernel/iommu_groups/42")
	p.host("sys/kernel/iommu_groups/42/type", "DMA")
	p.link("sys/kernel/iommu_groups/42/devices/"+address, "../../../../bus/pci/devices/"+address)
	p.host("dev/vfio/42", "")
}

// run runs the script and returns its exit code and what it printed.
func (p *place) run(args ...string) (code int, stdout, stderr string) {
	p.t.Helper()
	cmd := exec.CommandContext(p.t.Context(), testenv.LookTool(p.t, "dash"), append([]string{filepath.Join(p.dir, LaunchVM)}, args...)...)
	cmd.Env = p.env
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errOut.String()
}

func (p *place) golden(name, got string) {
	p.t.Helper()
	got = strings.ReplaceAll(strings.ReplaceAll(got, p.dir, "/BUNDLE"), p.qemu, "/QEMU")
	file := filepath.Join("testdata", name)
	if *update {
		p.write(file, got)
	}
	want, err := os.ReadFile(file)
	if err != nil {
		p.t.Fatal(err)
	}
	if got != string(want) {
		p.t.Errorf("%s differs (go test -update writes it anew):\n%s", name, got)
	}
}

// arguments lets a shell read the printed command line back, one argument a line.
func (p *place) arguments(printed string) string {
	p.t.Helper()
	out, err := exec.CommandContext(p.t.Context(), "sh", "-c", `eval "set -- $1"; printf '%s\n' "$@"`, "sh", printed).Output()
	if err != nil {
		p.t.Fatalf("%v: %s", err, printed)
	}
	return string(out)
}

func TestCommandLines(t *testing.T) {
	signed := testLaunch("snp")
	signed.IDBlocks = []SignedIDBlock{{"EPYC-v4", 2, "QkxPQ0s=", "QVVUSA=="}, {"EPYC-v4", 1, "QjE=", "QTE="}, {"EPYC-Genoa", 2, "QjI=", "QTI="}}
	for _, tc := range []struct {
		name  string
		l     Launch
		args  string
		iommu bool
	}{
		{"snp", testLaunch("snp"), "", false},
		{"snp-network", testLaunch("snp"), "--forward 127.0.0.1:18002:8002 --forward 15353:5353/udp --bind 192.0.2.7 --vcpus 1 --cpu EPYC-Genoa", false},
		{"snp-bridge", testLaunch("snp"), "--bridge br0 --mac 02:00:00:00:00:01", false},
		{"snp-gpus", testLaunch("snp"), "--gpu 81:00.0 --gpu 0000:c1:00.0 --memory 65536 --hugepages 1G --tap tap0", true},
		{"snp-idblock", signed, "", false},
		{"simulated", testLaunch("simulated"), "--hugepages 2M", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPlace(t, tc.l)
			p.gpu("0000:81:00.0", 128<<10, "vfio-pci")
			p.gpu("0000:c1:00.0", 256<<10, "vfio-pci")
			if tc.iommu {
				p.host("dev/iommu", "")
			}
			code, out, errOut := p.run(append(strings.Fields(tc.args), "--print")...)
			if code != 0 || errOut != "" {
				t.Fatalf("exit %d: %s", code, errOut)
			}
			p.golden(tc.name+".args", p.arguments(out))
		})
	}
}

func TestOtherWaysToStart(t *testing.T) {
	p := newPlace(t, testLaunch("snp"))
	p.gpu("0000:81:00.0", 128<<10, "vfio-pci")
	for name, args := range map[string]string{
		"libvirt.xml":         "--print-libvirt --forward 127.0.0.1:18002:8002",
		"libvirt-bridge.xml":  "--print-libvirt --bridge br0 --gpu 0000:81:00.0 --hugepages 2M",
		"libvirt-tap.xml":     "--print-libvirt --tap tap0 --cpu EPYC-Genoa --vcpus 1",
		"systemd.service":     "--print-systemd",
		"systemd-gpu.service": "--memory 4096 --gpu 0000:81:00.0 --print-systemd --forward [::1]:18002:8002 --stop-timeout 30",
	} {
		code, out, errOut := p.run(strings.Fields(args)...)
		if code != 0 || errOut != "" {
			t.Errorf("%s: exit %d: %s", name, code, errOut)
		}
		if strings.HasSuffix(name, ".xml") {
			wellFormed(t, out)
		}
		p.golden(name, out)
	}
	s := newPlace(t, testLaunch("simulated"))
	if code, out, _ := s.run("--print-systemd"); code != 0 || !strings.Contains(out, "Environment=COFFER_SIMPLATFORM="+os.Args[0]) {
		t.Errorf("simulated: %s", out)
	}
}

func wellFormed(t *testing.T, text string) {
	t.Helper()
	for d := xml.NewDecoder(strings.NewReader(text)); ; {
		if _, err := d.Token(); err == io.EOF {
			return
		} else if err != nil {
			t.Fatalf("%v:\n%s", err, text)
		}
	}
}

// A folder's name may hold what shells, XML and systemd give a meaning to.
func TestAwkwardFolder(t *testing.T) {
	p := newPlace(t, testLaunch("snp"))
	dir := filepath.Join(filepath.Dir(p.dir), `it's <a> & "50%" $HOME`)
	if err := os.Rename(p.dir, dir); err != nil {
		t.Fatal(err)
	}
	p.dir = dir
	if code, out, errOut := p.run("--check"); code != 0 {
		t.Errorf("--check: %s%s", out, errOut)
	}
	_, out, _ := p.run("--print-libvirt")
	var domain struct {
		OS struct {
			Kernel string `xml:"kernel"`
		} `xml:"os"`
	}
	if err := xml.Unmarshal([]byte(out), &domain); err != nil || domain.OS.Kernel != filepath.Join(dir, Kernel) {
		t.Errorf("libvirt: %v, %q", err, domain.OS.Kernel)
	}
	_, out, _ = p.run("--print-systemd")
	if want := `it's <a> & \"50%%\" $$HOME/launch_vm.sh"`; !strings.Contains(out, want) {
		t.Errorf("systemd: want %s in\n%s", want, out)
	}
}

func TestOptionsRefused(t *testing.T) {
	for args, want := range map[string]string{
		"--vcpus 3":                       "would change the launch digest, for which the KBS has no key; allowed: 2 1",
		"--cpu host":                      "would change the launch digest",
		"--append quiet":                  "would change the launch digest",
		"--kernel x":                      "would change the launch digest",
		"--policy 0xb0000":                "the KBS judges",
		"--memory 12x":                    "not a number",
		"--memory 010":                    "not a number",
		"--memory 100":                    "256 MiB at the least",
		"--memory":                        "'--print': not a value for it",
		"--hugepages 4M":                  "2M or 1G",
		"--forward 1:9999":                "9999 is not among the allowed ports (8002 8003)",
		"--forward 1:8002/udp":            "udp port 8002 is not among the allowed ports (5353)",
		"--forward 8002":                  "not [ADDR:]HOST:GUEST",
		"--forward a:8002":                "not a number",
		"--bind 1.2.3.4;id":               "not a value for it",
		"--bind -x":                       "not a value for it",
		"--tap a,script=/bin/x":           "not a value for it",
		"--tap t0 --bridge b0":            "exclude each other",
		"--tap t0 --forward 1:8002":       "user network",
		"--gpu nvidia0":                   "not a PCI address",
		"--gpu 8100":                      "not a PCI address",
		"--mac 52:54:00:12:34":            "not a MAC address",
		"--mac 53:54:00:12:34:56":         "not a MAC address",
		"--frobnicate":                    "unknown option",
		"--stop-timeout -1":               "not a value for it",
		"--cpu EPYC-v4,host-phys-bits=on": "not a value for it",
	} {
		p := newPlace(t, testLaunch("snp"))
		if code, out, errOut := p.run(append(strings.Fields(args), "--print")...); code != 1 || out != "" || !strings.Contains(errOut, want) {
			t.Errorf("%s: exit %d, %q %q, want %q", args, code, out, errOut, want)
		}
	}
	p := newPlace(t, testLaunch("simulated"))
	for _, args := range [][]string{{"--gpu", "81:00.0", "--print"}, {"--print-libvirt"}} {
		if code, _, errOut := p.run(args...); code != 1 || !strings.Contains(errOut, "simulated platform") {
			t.Errorf("%v: exit %d, %s", args, code, errOut)
		}
	}
}

func TestHelp(t *testing.T) {
	for _, platform := range []string{"snp", "simulated"} {
		p := newPlace(t, testLaunch(platform))
		if code, out, errOut := p.run("--help"); code != 0 || errOut != "" || !strings.Contains(out, "tcp 8002 8003, udp 5353") {
			t.Errorf("exit %d: %s%s", code, out, errOut)
		}
	}
}

// Each case breaks one thing on a host that is fit, and names the finding that
// must come of it, with cause and cure.
func TestChecks(t *testing.T) {
	type test struct {
		name  string
		args  string
		spoil func(*place)
		want  string // part of the line after FAIL or WARN; "" for a good host
		cure  string
	}
	gpu := func(change func(*place)) func(*place) {
		return func(p *place) {
			p.gpu("0000:81:00.0", 128<<10, "vfio-pci")
			p.host("dev/iommu", "")
			change(p)
		}
	}
	set := func(v string) func(*place) { return func(p *place) { p.env = append(p.env, v) } }
	for _, tc := range []test{
		{"good", "", func(*place) {}, "", ""},
		{"good GPU", "--gpu 81:00.0", gpu(func(*place) {}), "", ""},
		{"good GPU, no iommufd", "--gpu 81:00.0", gpu(func(p *place) { p.remove("dev/iommu") }), "", ""},
		{"GPU beside a bridge and its own audio", "--gpu 81:00.0", gpu(func(p *place) {
			p.host("sys/bus/pci/devices/0000:80:01.0/class", "0x060400\n")
			p.link("sys/bus/pci/devices/0000:80:01.0/driver", "/x/pcieport")
			p.link("sys/kernel/iommu_groups/42/devices/0000:80:01.0", "../../../../bus/pci/devices/0000:80:01.0")
			p.host("sys/bus/pci/devices/0000:81:00.1/class", "0x040300\n")
			p.link("sys/kernel/iommu_groups/42/devices/0000:81:00.1", "../../../../bus/pci/devices/0000:81:00.1")
		}), "", ""},
		{"good C-bit by QEMU", "", func(p *place) { p.remove("dev/cpu"); p.env = append(p.env, "FAKE_CBIT=51") }, "", ""},
		{"good tap", "--tap tap0", func(p *place) { p.host("sys/class/net/tap0/tun_flags", "0x1002\n") }, "", ""},
		{"good bridge", "--bridge br0", func(p *place) {
			p.host("sys/class/net/br0/bridge/stp_state", "0\n")
			p.host("etc/qemu/bridge.conf", "# ours\nallow br0\n")
		}, "", ""},
		{"good hugepages", "--hugepages 2M", func(p *place) { p.host("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "1024\n") }, "", ""},
		{"a port of another address", "--bind 192.0.2.7", func(p *place) {
			p.host("proc/net/tcp", listenTable+"   2: 0100007F:1F43 00000000:0000 0A 0 0\n")
		}, "", ""},

		{"Intel", "", func(p *place) { p.host("proc/cpuinfo", "vendor_id\t: GenuineIntel\nmodel name\t: Xeon\n") }, "processor is Xeon", "another host"},
		{"no SNP leaf", "", func(p *place) { p.cpuid(0x8000001e, 0, 0); p.env = append(p.env, "CBITPOS=51") }, "no SEV-SNP", "SMEE"},
		{"SEV without SNP", "", func(p *place) { p.cpuid(0x80000028, 0x0b, 51); p.env = append(p.env, "CBITPOS=51") }, "no SEV-SNP (CPUID 8000001f: EAX b)", "BIOS"},
		{"CPUID unreadable and no flag", "", func(p *place) {
			p.remove("dev/cpu")
			p.host("proc/cpuinfo", "vendor_id\t: AuthenticAMD\nflags\t\t: fpu\n")
			p.env = append(p.env, "FAKE_CBIT=51")
		}, "/dev/cpu/0/cpuid cannot be read", "modprobe cpuid"},
		{"no C-bit", "", func(p *place) { p.remove("dev/cpu") }, "C-bit is unknown", "modprobe cpuid"},
		{"old kernel", "", func(p *place) { p.host("proc/sys/kernel/osrelease", "6.10.3-amd64\n") }, "kernel 6.10.3-amd64 cannot", "newer kernel"},
		{"kernel 5", "", func(p *place) { p.host("proc/sys/kernel/osrelease", "5.15.0\n") }, "kernel 5.15.0 cannot", "newer kernel"},
		{"kvm_amd missing", "", func(p *place) { p.remove("sys/module/kvm_amd") }, "kvm_amd knows no SEV-SNP", "modprobe kvm_amd sev_snp=1"},
		{"sev_snp off", "", func(p *place) {
			p.host("sys/module/kvm_amd/parameters/sev_snp", "N\n")
			p.host("dmesg", "[    1.0] ccp 0000:42:00.5: SEV-SNP: failed to INIT error 0x3, rc -5\n")
		}, "kvm_amd.sev_snp is off", "failed to INIT error 0x3, rc -5"},
		{"sev_snp 0", "", func(p *place) { p.host("sys/module/kvm_amd/parameters/sev_snp", "0\n") }, "kvm_amd.sev_snp is off", "SMEE"},
		{"no /dev/sev", "", func(p *place) { p.remove("dev/sev") }, "/dev/sev is not there", "modprobe ccp"},
		{"no /dev/kvm", "", func(p *place) { p.remove("dev/kvm") }, "/dev/kvm is not there", "modprobe kvm_amd"},
		{"no QEMU", "", set("QEMU=/nonexistent/qemu"), "/nonexistent/qemu is not there", "QEMU 9.1 or later"},
		{"QEMU without SNP", "", set("FAKE_NO_SNP=1"), "knows no sev-snp-guest", "QEMU 9.1"},
		{"QEMU 9.0", "", set("FAKE_VERSION=9.0.4"), "QEMU 9.0 is too old", "QEMU 9.1"},
		{"QEMU without the CPU model", "", set("FAKE_CPU=EPYC-v40"), "no CPU model EPYC-v4", "newer QEMU"},
		{"changed initrd", "", func(p *place) { p.write(filepath.Join(p.dir, Initrd), "x") }, "initrd.img is not the bundle's", "unpack the bundle again"},
		{"missing kernel", "", func(p *place) { os.Remove(filepath.Join(p.dir, Kernel)) }, "vmlinuz is not the bundle's", "unpack the bundle again"},
		{"missing drive", "", func(p *place) { os.Remove(filepath.Join(p.dir, UserData)) }, "user_data.qcow2 cannot be read", "unpack the bundle again"},
		{"little memory", "--memory 9000", func(*place) {}, "8192 MiB of memory are available, 9000 are needed", "--memory"},
		{"no hugepages", "--hugepages 1G", func(*place) {}, "0 hugepages of 1G are free, 2 are needed", "nr_hugepages"},
		{"part of a hugepage", "--hugepages 1G --memory 1500", func(*place) {}, "no multiple of 1G", "multiple"},
		{"port taken", "", func(p *place) { p.host("proc/net/tcp", listenTable+"   2: 0100007F:1F43 00000000:0000 0A 0 0\n") }, "tcp port 8003 of this host is taken", "--forward OTHER:8003,"},
		{"port taken on all addresses", "--bind 192.0.2.7", func(p *place) {
			p.host("proc/net/tcp6", "  0: 00000000000000000000000000000000:1F42 00000000000000000000000000000000:0000 0A 0 0\n")
		}, "tcp port 8002 of this host is taken", "--bind ADDR"},
		{"udp port taken", "", func(p *place) { p.host("proc/net/udp", "  0: 00000000:14E9 00000000:0000 07 0 0\n") }, "udp port 5353 of this host is taken", "--forward OTHER:5353/udp"},
		{"no tap", "--tap tap0", func(*place) {}, "tap0 is no tap device", "ip tuntap add"},
		{"no bridge", "--bridge br0", func(p *place) { p.host("etc/qemu/bridge.conf", "allow all\n") }, "br0 is no bridge", "ip link add"},
		{"bridge not allowed", "--bridge br0", func(p *place) {
			p.host("sys/class/net/br0/bridge/stp_state", "0\n")
			p.host("etc/qemu/bridge.conf", "allow br01\n")
		}, "bridge.conf does not allow br0", "allow br0"},
		{"no such GPU", "--gpu 82:00.0", gpu(func(*place) {}), "no PCI device 0000:82:00.0", "lspci"},
		{"GPU with the host's driver", "--gpu 81:00.0", gpu(func(p *place) { p.link("sys/bus/pci/devices/0000:81:00.0/driver", "/x/nvidia") }), "0000:81:00.0 is bound to nvidia and not to vfio-pci", "driver_override"},
		{"GPU without driver", "--gpu 81:00.0", gpu(func(p *place) { p.remove("sys/bus/pci/devices/0000:81:00.0/driver") }), "0000:81:00.0 is bound to none and not to vfio-pci", "driver_override"},
		{"no IOMMU", "--gpu 81:00.0", gpu(func(p *place) { p.remove("sys/bus/pci/devices/0000:81:00.0/iommu_group") }), "in no IOMMU group", "amd_iommu=off"},
		{"shared IOMMU group", "--gpu 81:00.0", gpu(func(p *place) {
			p.host("sys/bus/pci/devices/0000:82:00.0/class", "0x020000\n")
			p.link("sys/bus/pci/devices/0000:82:00.0/driver", "/x/mlx5_core")
			p.link("sys/kernel/iommu_groups/42/devices/0000:82:00.0", "../../../../bus/pci/devices/0000:82:00.0")
		}), "0000:82:00.0 shares the IOMMU group", "vfio-pci too"},
		{"no VFIO file", "--gpu 81:00.0", gpu(func(p *place) { p.remove("dev/iommu"); p.remove("dev/vfio") }), "/dev/vfio/42 is not there", "modprobe vfio-pci"},
		{"other vendor", "--gpu 81:00.0", gpu(func(p *place) { p.host("sys/bus/pci/devices/0000:81:00.0/vendor", "0x8086\n") }), "not made by NVIDIA (vendor 0x8086)", "right address"},
		{"QEMU that cannot pass", "--gpu 81:00.0", gpu(set("FAKE_VERSION=10.0.2")), "QEMU 10.0 may be unable to pass devices", "10.1 or later"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPlace(t, testLaunch("snp"))
			tc.spoil(p)
			code, out, errOut := p.run(append(strings.Fields(tc.args), "--check")...)
			findings := regexp.MustCompile(`(?m)^(FAIL|WARN)  .*(\n      .*)*`).FindAllString(out, -1)
			findings = slices.DeleteFunc(findings, func(f string) bool { return strings.Contains(f, "CC mode is not known") })
			if tc.want == "" {
				if code != 0 || len(findings) > 0 || !strings.Contains(out, "this host can start cvm_0123456789ab") {
					t.Errorf("exit %d, %q\n%s%s", code, findings, out, errOut)
				}
				return
			}
			if len(findings) != 1 || !strings.Contains(findings[0], tc.want) || !strings.Contains(findings[0], tc.cure) {
				t.Fatalf("%q, want %q with %q\n%s%s", findings, tc.want, tc.cure, out, errOut)
			}
			if failed := strings.HasPrefix(findings[0], "FAIL"); failed != (code == 1) || failed && !strings.Contains(findings[0], "cause: ") {
				t.Errorf("exit %d: %s", code, findings[0])
			}
		})
	}
}

// All that is wrong is said at once.
func TestChecksListAllFindings(t *testing.T) {
	p := newPlace(t, testLaunch("snp"))
	p.remove("dev/sev")
	p.remove("dev/kvm")
	p.host("sys/module/kvm_amd/parameters/sev_snp", "N\n")
	p.write(filepath.Join(p.dir, Kernel), "x")
	code, out, errOut := p.run("--check", "--memory", "9000")
	if n := strings.Count(out, "FAIL  "); code != 1 || n != 5 || !strings.Contains(errOut, "5 check(s) failed") {
		t.Errorf("exit %d, %d findings:\n%s%s", code, n, out, errOut)
	}
	s := newPlace(t, testLaunch("simulated"))
	s.env = append(s.env, "COFFER_SIMPLATFORM=/nonexistent/sim", "COFFER_SIM_CHIP=", "QEMU=/nonexistent/qemu")
	code, out, _ = s.run("--check")
	for _, want := range []string{"program /nonexistent/sim is not there", "no simulated chip", "/nonexistent/qemu is not there"} {
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("simulated: exit %d, want %q:\n%s", code, want, out)
		}
	}
	good := newPlace(t, testLaunch("simulated"))
	if code, out, errOut := good.run("--check"); code != 0 {
		t.Errorf("simulated: %s%s", out, errOut)
	}
}

// COFFER_SYSROOT is for looking only: a start sees the real host, which here is
// none for SNP, or is at least not the made-up one.
func TestSysrootChangesNoStart(t *testing.T) {
	p := newPlace(t, testLaunch("snp"))
	p.host("proc/sys/kernel/osrelease", "5.0.0-made-up\n")
	p.remove("dev/kvm")
	_, _, errOut := p.run()
	if strings.Contains(errOut, "made-up") {
		t.Errorf("the start looked at it:\n%s", errOut)
	}
	args := filepath.Join(p.root, "args")
	p.env = append(p.env, "CBITPOS=47", "FAKE_ARGS="+args)
	if code, _, errOut := p.run("--no-check"); code != 0 {
		t.Fatal(errOut)
	}
	if b, err := os.ReadFile(args); err != nil || !strings.Contains(string(b), "cbitpos=47,") {
		t.Errorf("%v: %s", err, b)
	}
}

// QEMU's own messages (facts of QEMU 9.1 to 11.1 and of 7.2) get their meaning.
func TestMeanings(t *testing.T) {
	p := newPlace(t, testLaunch("snp"))
	for message, want := range map[string]string{
		"qemu-system-x86_64: -accel kvm: vm-type SEV-SNP not supported by KVM":                                                     "kvm_amd.sev_snp is off",
		"cannot set up private guest memory for sev-snp-guest: KVM required":                                                       "SEV-SNP needs KVM",
		"Could not access KVM kernel module: Permission denied":                                                                    "/dev/kvm is missing or not open",
		"sev_common_kvm_init: cbitpos check failed, host '51' requested '47'":                                                      "unset CBITPOS",
		"sev_common_kvm_init: Failed to open /dev/sev 'No such file or directory'":                                                 "/dev/sev is missing",
		"SEV: kernel specified but guest firmware has no hashes table GUID":                                                        "OVMF.amdsev.fd is another firmware",
		"SEV: guest firmware hashes table area is invalid (base=0x0 size=0x0)":                                                     "OVMF.amdsev.fd is another firmware",
		"sev_snp_launch_finish: SNP_LAUNCH_FINISH ret=-5 fw_error=16 'Bad measurement'":                                            "not those of the ID block",
		"sev_snp_launch_start: SNP_LAUNCH_START ret=-22 fw_error=0 ''":                                                             "refused to start an SNP guest",
		"SEV-SNP: CPUID validation failed for function 0x80000008, index: 0x0.":                                                    "update both",
		"parameter length of 3 not equal to 96":                                                                                    "ID block or host data in this script is damaged",
		"vfio 0000:81:00.0: Cannot set discarding of RAM broken: Device or resource busy":                                          "cannot pass devices to SNP guests: use 10.1",
		"qemu-system-x86_64: unable to find CPU model 'EPYC-v4'":                                                                   "too old for the CPU model EPYC-v4",
		"qemu-system-x86_64: -object sev-snp-guest,id=sev0: invalid object type: sev-snp-guest":                                    "knows no SEV-SNP",
		"-netdev user,id=n0,hostfwd=tcp::8002-:8002: Could not set up host forwarding rule 'tcp::8002-:8002'":                      "taken by another program",
		`-device virtio-blk-pci,drive=d: Failed to get "write" lock`:                                                               "another QEMU uses the drives",
		"failed to parse default acl file `/etc/qemu/bridge.conf'\nqemu-system-x86_64: -netdev bridge,id=n0: bridge helper failed": "bridge.conf",
		"-netdev tap,id=n0: could not configure /dev/net/tun (tap0): Operation not permitted":                                      "tap device cannot be opened",
		"vfio 0000:81:00.0: group 42 is not viable":                                                                                "another device of the GPU's IOMMU group",
		"vfio_dma_map: VFIO_MAP_DMA failed: Cannot allocate memory":                                                                "limit of locked memory",
		"-device vfio-pci,host=0000:81:00.0: vfio 0000:81:00.0: error getting device":                                              "--check with the same options",
		"cannot set up guest memory 'ram1': Cannot allocate memory":                                                                "not enough memory",
		"block I/O error: No space left on device":                                                                                 "is full",
		"Could not open 'crypt_root.qcow2': No such file or directory":                                                             "a drive is missing",
		"hw/pci/msix.c:229: msix_table_mmio_write: Assertion `addr + size <= dev->msix_entries_nr * 16' failed.":                   "a defect of QEMU 7.2",
	} {
		q := *p
		q.env = append(slices.Clone(p.env), "FAKE_RC=3", "FAKE_MESSAGE="+message)
		code, out, errOut := q.run("--no-check")
		if code != 3 || out != "guest console\n" || !strings.Contains(errOut, message) {
			t.Errorf("%s: exit %d, %q %q", message, code, out, errOut)
		}
		if n := strings.Count(errOut, "that means: "); n != 1 || !strings.Contains(errOut[strings.Index(errOut, "that means: "):], want) {
			t.Errorf("%s: want once %q:\n%s", message, want, errOut)
		}
	}
	p.env = append(p.env, "FAKE_RC=4", "FAKE_MESSAGE=something new")
	if code, _, errOut := p.run("--no-check"); code != 4 || strings.Contains(errOut, "that means") {
		t.Errorf("an unknown message: exit %d, %s", code, errOut)
	}
	p.env = append(p.env, "FAKE_RC=0", "FAKE_MESSAGE=warning: KVM required some day")
	if code, _, errOut := p.run("--no-check"); code != 0 || strings.Contains(errOut, "that means") {
		t.Errorf("a good end: exit %d, %s", code, errOut)
	}
}

// started runs the script with a guest that lives, and returns when it does.
func (p *place) started(args ...string) (cmd *exec.Cmd, out *bytes.Buffer) {
	p.t.Helper()
	cmd = exec.CommandContext(p.t.Context(), filepath.Join(p.dir, LaunchVM), args...)
	cmd.Env = p.env
	r, w := io.Pipe()
	out = &bytes.Buffer{}
	seen := make(chan bool)
	go func() {
		buf, told := make([]byte, 4096), false
		for {
			n, err := r.Read(buf)
			out.Write(buf[:n])
			if !told && strings.Contains(out.String(), "guest console") {
				told = true
				close(seen)
			}
			if err != nil {
				return
			}
		}
	}()
	cmd.Stdout, cmd.Stderr = w, w
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	select {
	case <-seen:
	case <-time.After(time.Minute):
		cmd.Process.Kill()
		p.t.Fatalf("no guest came up: %s", out)
	}
	return cmd, out
}

func TestOrderlyStop(t *testing.T) {
	for _, platform := range []string{"snp", "simulated"} {
		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
			p := newPlace(t, testLaunch(platform))
			p.env = append(p.env, "FAKE_GUEST=obeys", "TMPDIR="+t.TempDir())
			cmd, out := p.started("--no-check")
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "monitor: system_powerdown") {
				t.Errorf("%s, %v: %v\n%s", platform, sig, err, out)
			}
		}
	}
}

func TestStopThatTheGuestIgnores(t *testing.T) {
	for name, tc := range map[string]struct {
		patience string
		signals  int
		want     string
	}{
		"patience ends": {"1", 1, "did not stop within 1 s"},
		"asked twice":   {"1000", 2, "Once more stops it at once"},
	} {
		p := newPlace(t, testLaunch("snp"))
		tmp := t.TempDir()
		p.env = append(p.env, "FAKE_GUEST=deaf", "TMPDIR="+tmp)
		cmd, out := p.started("--no-check", "--stop-timeout", tc.patience)
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		for n := 0; ; n++ {
			if n < tc.signals || tc.signals > 1 { // two signals at once may be taken as one
				cmd.Process.Signal(syscall.SIGTERM)
			}
			select {
			case <-ended:
			case <-time.After(200 * time.Millisecond):
				if n < 300 {
					continue
				}
				t.Fatalf("%s: it runs on: %s", name, out)
			}
			break
		}
		if cmd.ProcessState.ExitCode() != 128+9 || !strings.Contains(out.String(), tc.want) {
			t.Errorf("%s: %v\n%s", name, cmd.ProcessState, out)
		}
		if left, _ := os.ReadDir(tmp); len(left) > 0 {
			t.Errorf("%s: left behind: %v", name, left)
		}
	}
}

// Two bundles run side by side; one folder runs once.
func TestSideBySide(t *testing.T) {
	a, b := newPlace(t, testLaunch("snp")), newPlace(t, testLaunch("snp"))
	var ends []func()
	for _, p := range []*place{a, b} {
		p.env = append(p.env, "FAKE_GUEST=obeys")
		cmd, out := p.started("--no-check")
		ends = append(ends, func() {
			cmd.Process.Signal(syscall.SIGTERM)
			if err := cmd.Wait(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	if code, _, errOut := a.run("--no-check"); code != 1 || !strings.Contains(errOut, "runs from this folder already") {
		t.Errorf("a second start: exit %d, %s", code, errOut)
	}
	for _, end := range ends {
		end()
	}
	l, m := testLaunch("snp"), testLaunch("snp")
	m.CVMID = "cvm_0123456789ac"
	mac := regexp.MustCompile(`\nMAC=(\S+)`)
	one, _ := LaunchScript(l)
	two, _ := LaunchScript(m)
	if first, second := mac.FindSubmatch(one), mac.FindSubmatch(two); first == nil || bytes.Equal(first[1], second[1]) {
		t.Errorf("MAC addresses %s and %s", first, second)
	}
}

// A killed script takes QEMU with it.
func TestNoOrphan(t *testing.T) {
	testenv.LookTool(t, "setpriv")
	p := newPlace(t, testLaunch("snp"))
	p.env = append(p.env, "FAKE_GUEST=deaf", "TMPDIR="+t.TempDir())
	cmd, out := p.started("--no-check")
	cmd.Process.Kill()
	cmd.Wait() // returns once QEMU has closed its outputs
	if strings.Contains(out.String(), "did not stop") || errors.Is(cmd.Err, exec.ErrWaitDelay) {
		t.Error(out)
	}
	lock, err := os.Open(filepath.Join(p.dir, LaunchVM))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	for range 100 { // it holds the lock while it lives
		if err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("QEMU lives: %v", err)
}

func TestConsoleLogIsKept(t *testing.T) {
	p := newPlace(t, testLaunch("snp"))
	p.write(filepath.Join(p.dir, "console.log"), "the boot before")
	p.run("--no-check")
	if b, err := os.ReadFile(filepath.Join(p.dir, "console.log.1")); err != nil || string(b) != "the boot before" {
		t.Errorf("%q, %v", b, err)
	}
}

// Changed files start with a warning: the KBS refuses them. All else stops it.
func TestStartChecks(t *testing.T) {
	p := newPlace(t, testLaunch("simulated"))
	p.write(filepath.Join(p.dir, Initrd), "changed")
	code, out, errOut := p.run("--memory", "256")
	if code != 0 || !strings.Contains(out, "guest console") || !strings.Contains(errOut, "FAIL  initrd.img is not the bundle's") {
		t.Errorf("exit %d: %s%s", code, out, errOut)
	}
	os.Remove(filepath.Join(p.dir, Applog))
	if code, out, errOut := p.run("--memory", "256"); code != 1 || out != "" || !strings.Contains(errOut, "1 check(s) failed; --no-check starts it all the same") {
		t.Errorf("exit %d: %s%s", code, out, errOut)
	}
}

func TestScriptIsPortable(t *testing.T) {
	for _, platform := range []string{"snp", "simulated"} {
		l := testLaunch(platform)
		l.IDBlocks = []SignedIDBlock{{"EPYC-v4", 2, "QQ==", "QQ=="}}
		script, err := LaunchScript(l)
		if err != nil {
			t.Fatal(err)
		}
		for _, check := range [][]string{{"dash", "-n"}, {"shellcheck", "-s", "sh", "-S", "warning", "-"}} {
			cmd := exec.Command(testenv.LookTool(t, check[0]), check[1:]...)
			cmd.Stdin = bytes.NewReader(script)
			if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
				t.Errorf("%s, %s: %v\n%s", platform, check[0], err, out)
			}
		}
	}
}

func TestLaunchScriptRefusesQuotes(t *testing.T) {
	l := testLaunch("snp")
	l.Cmdline = "a'b"
	if _, err := LaunchScript(l); err == nil || !strings.Contains(err.Error(), "shell script") {
		t.Error(err)
	}
}

// Where QEMU knows SEV-SNP, it knows every property that the script uses but
// the two that its help leaves out.
func TestQEMUKnowsTheProperties(t *testing.T) {
	help, err := exec.Command(testenv.LookTool(t, "qemu-system-x86_64"), "-object", "sev-snp-guest,help").Output()
	if err != nil {
		t.Skip("this QEMU is older than SEV-SNP (9.1)")
	}
	for _, name := range []string{"policy", "kernel-hashes", "id-block", "id-auth"} {
		if !regexp.MustCompile(`(?m)^ *` + name + `=`).Match(help) {
			t.Errorf("no property %s:\n%s", name, help)
		}
	}
}
