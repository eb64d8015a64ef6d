// Command probe is a hostile workload: it tries what a guest must not let its
// container do, and says of each attempt how it went, one line each:
//
//	probe: <name> ok|refused|open <detail>
//
// Its first argument names what to do; see the scenarios of the guest.
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) < 2 {
		os.Exit(2)
	}
	args := os.Args[2:]
	switch os.Args[1] {
	case "network":
		network(args)
	case "confinement":
		confinement()
	case "all":
		confinement()
		network(args)
		signal.Ignore(syscall.SIGTERM)
		say("done", "ok", "")
		select {}
	case "applog":
		applog()
	case "tick":
		tick(args)
	case "serve":
		serve()
	case "exit":
		say("exit", "ok", args[0])
		code, _ := strconv.Atoi(args[0])
		os.Exit(code)
	}
}

// tick is a workload that says that it lives. orders are pairs: at which tick to
// have which program killed, or "flood" for more than the console takes at once.
func tick(orders []string) {
	for i := 1; ; i++ {
		say("tick", "ok", strconv.Itoa(i)+" ")
		if len(orders) > 1 && orders[0] == strconv.Itoa(i) {
			if orders[1] == "flood" { // of the console
				for range 64 {
					say("flood", "ok", strings.Repeat("x", 400))
				}
			} else {
				os.WriteFile("/applog/order", []byte(orders[1]), 0o644)
				os.Rename("/applog/order", "/applog/kill")
			}
			orders = orders[2:]
		}
		time.Sleep(time.Second)
	}
}

func say(name, status, detail string) { fmt.Printf("probe: %s %s %s\n", name, status, detail) }

// want says whether an attempt that must fail did.
func want(name string, err error) {
	if err == nil {
		say(name, "open", "")
		return
	}
	say(name, "refused", err.Error())
}

const patience = 5 * time.Second

// network takes host ports: TCP and UDP that are allowed, then the same denied.
// At each of them a server of the host's answers with what it is sent.
func network(ports []string) {
	listenAll()
	echo := func(name, proto, addr string, allowed bool) {
		began := time.Now()
		conn, err := net.DialTimeout(proto, addr, patience)
		if err == nil {
			conn.SetDeadline(time.Now().Add(patience))
			_, err = conn.Write([]byte("hello"))
			if err == nil {
				_, err = conn.Read(make([]byte, 16))
			}
			conn.Close()
		}
		switch {
		case allowed && err == nil:
			say(name, "ok", "")
		case allowed:
			say(name, "failed", err.Error())
		case err != nil && time.Since(began) > patience/2:
			say(name, "silent", err.Error()) // dropped and not rejected
		default:
			want(name, err)
		}
	}
	echo("tcp-out-allowed", "tcp", "10.0.2.2:"+ports[0], true)
	echo("udp-out-allowed", "udp", "10.0.2.2:"+ports[1], true)
	echo("tcp-out", "tcp", "10.0.2.2:"+ports[2], false)
	echo("udp-out", "udp", "10.0.2.2:"+ports[3], false)
	echo("dns-out", "udp", "10.0.2.2:53", false)
	echo("tcp6-out-allowed", "tcp", "[fec0::2]:"+ports[0], true)
	echo("udp6-out-allowed", "udp", "[fec0::2]:"+ports[1], true)
	echo("tcp6-out", "tcp", "[fec0::2]:"+ports[2], false)
	echo("udp6-out", "udp", "[fec0::2]:"+ports[3], false)
	echo("loopback", "tcp", "127.0.0.1:8003", true)

	for _, s := range []struct {
		name             string
		family, typ, pro int
	}{
		{"packet-socket", unix.AF_PACKET, unix.SOCK_RAW, 0x0300},
		{"packet-dgram-socket", unix.AF_PACKET, unix.SOCK_DGRAM, 0x0300},
		{"raw-socket", unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP},
		{"raw6-socket", unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6},
		{"ping-socket", unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP},
		{"ping6-socket", unix.AF_INET6, unix.SOCK_DGRAM, unix.IPPROTO_ICMPV6},
		{"vsock", unix.AF_VSOCK, unix.SOCK_STREAM, 0},
	} {
		fd, err := unix.Socket(s.family, s.typ, s.pro)
		if err == nil {
			unix.Close(fd)
		}
		want(s.name, err)
	}
	want("interface-flags", promiscuous())
	resolvers()
}

func resolvers() {
	b, err := os.ReadFile("/etc/resolv.conf")
	say("resolv.conf", map[bool]string{true: "ok", false: "failed"}[err == nil], strings.ReplaceAll(string(b), "\n", ";"))
}

// serve answers, and tells again and again which resolvers there are.
func serve() {
	listenAll()
	for ; ; time.Sleep(time.Second) {
		resolvers()
	}
}

// listenAll listens at a port that is allowed and at one that is not.
func listenAll() {
	for _, port := range []int{8002, 8003} {
		listen("tcp", port)
		listenUDP(port)
	}
	say("listening", "ok", "")
}

func listen(proto string, port int) {
	l, err := net.Listen(proto, fmt.Sprintf(":%d", port))
	if err != nil {
		say(fmt.Sprintf("listen-%d", port), "failed", err.Error())
		return
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 64)
				if n, err := c.Read(b); err == nil {
					c.Write(b[:n])
				}
			}()
		}
	}()
}

func listenUDP(port int) {
	c, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port))
	if err != nil {
		say(fmt.Sprintf("listen-udp-%d", port), "failed", err.Error())
		return
	}
	go func() {
		b := make([]byte, 64)
		for {
			if n, from, err := c.ReadFrom(b); err == nil {
				c.WriteTo(b[:n], from)
			}
		}
	}()
}

// promiscuous tries to change an interface.
func promiscuous() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_PROMISC)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCSIFFLAGS, uintptr(unsafe.Pointer(ifr)))
	if errno != 0 {
		return errno
	}
	return nil
}

// confinement tries what the container must not be able to.
func confinement() {
	want("user-namespace", unix.Unshare(unix.CLONE_NEWUSER))
	want("mount", unix.Mount("tmpfs", "/tmp", "tmpfs", 0, ""))
	want("mknod", unix.Mknod("/tmp/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	want("set-time", unix.Settimeofday(&unix.Timeval{Sec: 1}))
	want("load-module", unix.FinitModule(0, "", 0))
	want("kexec", kexec())
	want("reboot", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
	want("kernel-log", kernelLog())
	want("bpf", bpf())
	want("swap", swapon())
	for _, path := range []string{"/dev/sev-guest", "/dev/mem", "/dev/kmsg", "/dev/port", "/sys/kernel/config/tsm", "/proc/kcore", "/sys/firmware/acpi/tables/DSDT"} {
		f, err := os.Open(path)
		if err == nil {
			if n, rerr := f.Read(make([]byte, 16)); n == 0 {
				if _, derr := f.Readdirnames(1); derr != nil {
					err = errors.Join(rerr, derr)
				}
			}
			f.Close()
		}
		want("open"+strings.ReplaceAll(path, "/", "-"), err)
	}
	f, err := os.OpenFile("/proc/sysrq-trigger", os.O_WRONLY, 0)
	if err == nil {
		f.Close()
	}
	want("sysrq", err)
	if b, err := os.ReadFile("/sys/class/misc/hw_random/rng_current"); err == nil && strings.TrimSpace(string(b)) != "none" {
		say("host-random", "open", string(b))
	} else {
		say("host-random", "refused", fmt.Sprintf("%q %v", b, err))
	}
	if devices, _ := filepath.Glob("/dev/vd*"); len(devices) > 0 {
		say("disks", "open", fmt.Sprint(devices))
	} else {
		say("disks", "refused", "none in /dev")
	}
	for _, s := range []string{"kernel/modules_disabled", "kernel/kexec_load_disabled", "kernel/dmesg_restrict", "kernel/kptr_restrict", "kernel/yama/ptrace_scope",
		"kernel/unprivileged_bpf_disabled", "kernel/sysrq", "kernel/core_pattern", "kernel/modprobe", "user/max_user_namespaces"} {
		b, err := os.ReadFile("/proc/sys/" + s)
		say("sysctl", "ok", fmt.Sprintf("%s=%q %v", s, strings.TrimSpace(string(b)), err))
		if err == nil {
			want("write-"+s, os.WriteFile("/proc/sys/"+s, []byte("0"), 0))
		}
	}
	swaps, _ := os.ReadFile("/proc/swaps")
	say("swaps", "ok", strconv.Itoa(strings.Count(string(swaps), "\n")-1))
	say("clock", "ok", time.Now().UTC().Format("2006"))

	// What the host has put on its drives.
	_, err = os.Open("/user_data/device")
	want("host-device", err)
	want("host-setuid", setuid("/user_data/setuid"))
	b, err := os.ReadFile("/user_data/link")
	say("host-symlink", "ok", fmt.Sprintf("%q %v", b, err))
	var fs unix.Statfs_t
	if err := unix.Statfs("/user_data", &fs); err == nil {
		say("user_data", "ok", fmt.Sprintf("%.0f GB", float64(fs.Blocks)*float64(fs.Bsize)/1e9))
	}
	hosts, _ := os.ReadFile("/etc/hosts")
	for line := range strings.Lines(string(hosts)) {
		say("hosts", "ok", strings.Join(strings.Fields(line), " "))
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		for _, at := range []string{"/user_config", "/user_data", "/applog", "/vault"} {
			if len(f) > 5 && f[4] == at {
				say("mounted", "ok", at+" "+f[5])
			}
		}
	}
}

func kexec() error {
	_, _, errno := unix.Syscall(unix.SYS_KEXEC_LOAD, 0, 0, 0)
	if errno == 0 {
		return nil
	}
	return errno
}

func kernelLog() error {
	_, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, make([]byte, 1024))
	return err
}

func bpf() error {
	var attr [64]byte
	attr[0], attr[4], attr[8], attr[12] = 2, 4, 4, 1 // an array map
	_, _, errno := unix.Syscall(unix.SYS_BPF, 0, uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
	if errno == 0 {
		return nil
	}
	return errno
}

func swapon() error {
	path, err := unix.BytePtrFromString("/tmp/swap")
	if err != nil {
		return err
	}
	_, _, errno := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(path)), 0, 0)
	if errno == 0 {
		return nil
	}
	return errno
}

// setuid runs a setuid-root copy of this program as nobody; it must not become root.
func setuid(path string) error {
	pid, err := syscall.ForkExec(path, []string{path, "exit", "0"}, &syscall.ProcAttr{
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}},
	})
	if err != nil {
		return err
	}
	var status syscall.WaitStatus
	euid := ""
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err == nil {
		_, rest, _ := strings.Cut(string(b), "Uid:")
		if f := strings.Fields(rest); len(f) > 1 {
			euid = f[1]
		}
	}
	syscall.Wait4(pid, &status, 0, nil)
	if euid == "0" {
		return nil
	}
	return fmt.Errorf("it runs as uid %s", euid)
}

// applog fills /applog, then floods the log, and lives on.
func applog() {
	if f, err := os.Create("/applog/fill"); err == nil {
		b := make([]byte, 64<<10)
		for {
			if _, err := f.Write(b); err != nil {
				say("fill", "refused", err.Error())
				break
			}
		}
		f.Sync()
		f.Close()
	}
	line := strings.Repeat("x", 199)
	began := time.Now()
	for i := 0; i < 20000; i++ {
		fmt.Println(line)
	}
	say("flood", "ok", time.Since(began).Round(time.Millisecond).String())
	for i := 1; ; i++ {
		say("alive", "ok", strconv.Itoa(i))
		time.Sleep(time.Second)
	}
}
