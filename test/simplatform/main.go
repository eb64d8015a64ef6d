// Command simplatform plays the SNP firmware for a guest that QEMU runs without
// SNP: it measures the very files that QEMU is given and signs reports with a
// made-up chip. Whatever it signs is worth nothing to a verifier that was not
// given the chip's roots file.
//
//	simplatform new DIR
//	simplatform serve --chip DIR --socket PATH --ovmf F --kernel F [--initrd F] --append S --vcpus N --cpu MODEL
//
// serve prints one line, "simulated launch_digest=<96 hex>", when the socket is
// there. QEMU connects to it:
//
//	-chardev socket,id=sim,path=PATH -device virtio-serial-pci -device virtserialport,chardev=sim,name=coffer.sim
//
// It serves one connection and ends with it, with the process that started it,
// and on SIGTERM.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"coffer/internal/measure"
	"coffer/internal/simport"
	"coffer/internal/snp"
	"coffer/test/simsnp"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	go cancelWithParent(os.Getppid(), cancel) // asked here: the parent may be gone before the goroutine runs
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "simplatform:", err)
		os.Exit(1)
	}
}

// cancelWithParent calls cancel when the parent process has ended. It does not
// watch standard input, which a shell gives to a program in the background as
// /dev/null.
func cancelWithParent(parent int, cancel func()) {
	for os.Getppid() == parent {
		time.Sleep(500 * time.Millisecond)
	}
	cancel()
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	switch {
	case len(args) == 2 && args[0] == "new":
		chip, err := simsnp.New(simsnp.Params{})
		if err != nil {
			return err
		}
		return chip.Save(args[1])
	case len(args) >= 1 && args[0] == "serve":
		return serve(ctx, args[1:], stdout)
	}
	return errors.New("usage: simplatform new DIR | simplatform serve --chip DIR --socket PATH --ovmf F --kernel F --initrd F --append S --vcpus N --cpu MODEL")
}

func serve(ctx context.Context, args []string, stdout io.Writer) error {
	var in measure.Input
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	chipDir := flags.String("chip", "", "`folder` that 'new' made")
	socket := flags.String("socket", "", "`path` of the unix socket to listen on")
	ovmf := flags.String("ovmf", "", "firmware `file`; measured even where QEMU boots another")
	kernel := flags.String("kernel", "", "kernel `file`")
	initrd := flags.String("initrd", "", "initrd `file`")
	flags.StringVar(&in.Cmdline, "append", "", "kernel command line")
	flags.IntVar(&in.VCPUs, "vcpus", 1, "number of vCPUs")
	flags.StringVar(&in.CPU, "cpu", "EPYC-v4", "CPU `model`")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 || *chipDir == "" || *socket == "" || *ovmf == "" || *kernel == "" {
		return errors.New("serve needs --chip, --socket, --ovmf and --kernel, and takes no arguments")
	}

	chip, err := simsnp.Load(*chipDir)
	if err != nil {
		return err
	}
	digest, err := launchDigest(in, *ovmf, *kernel, *initrd)
	if err != nil {
		return fmt.Errorf("measure the launch: %w", err)
	}
	listener, err := listen(ctx, *socket)
	if err != nil {
		return err
	}
	defer listener.Close()
	fmt.Fprintf(stdout, "simulated launch_digest=%x\n", digest)
	return serveOne(ctx, listener, chip, digest)
}

func launchDigest(in measure.Input, ovmf, kernel, initrd string) (digest [48]byte, err error) {
	if in.OVMF, err = os.ReadFile(ovmf); err != nil {
		return digest, err
	}
	in.HasKernel = true
	if in.Kernel, err = measure.HashFile(kernel); err != nil {
		return digest, err
	}
	if in.HasInitrd = initrd != ""; in.HasInitrd {
		if in.Initrd, err = measure.HashFile(initrd); err != nil {
			return digest, err
		}
	}
	r, err := measure.Digest(in)
	if err != nil {
		return digest, err
	}
	return r.LaunchDigest, nil
}

// listen makes a socket for its user only, in the place of one that a killed
// process left behind.
func listen(ctx context.Context, path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	defer syscall.Umask(syscall.Umask(0o077))
	return new(net.ListenConfig).Listen(ctx, "unix", path)
}

// serveOne serves the first connection until it ends or ctx is done.
func serveOne(ctx context.Context, l net.Listener, chip *simsnp.Chip, digest [48]byte) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	conn, err := l.Accept()
	if err == nil {
		defer context.AfterFunc(ctx, func() { conn.Close() })()
		err = simport.Serve(conn, func(data [64]byte, vmpl int) (report, certs []byte, err error) {
			r, err := chip.Report(digest, data, uint32(vmpl))
			if err != nil {
				return nil, nil, err
			}
			list := chip.Certs()
			if os.Getenv("COFFER_SIM_NO_VCEK") != "" { // as hosts that have none do
				list = slices.DeleteFunc(list, func(c snp.Cert) bool { return c.Type == snp.VCEK })
			}
			return r.Marshal(), snp.MarshalCertTable(list), nil
		})
	}
	if ctx.Err() != nil {
		return nil // told to end
	}
	return err
}
