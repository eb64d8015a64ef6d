// Package nfs mounts the export that a site names in ext_mount.conf, in the root
// of its user_data drive, at user_data/mnt, and keeps it mounted.
//
// File, drive, names and server are the host's or the site's: the file is parsed
// strictly, no symlink of the drive is followed, and whoever holds up a call
// holds up nothing but the mount. What lies on the server is as plain to the
// host as user_data itself.
//
// Mounts are hard: while the server is away, who reads or writes waits, and goes
// on when it is back. A server that has forgotten its clients is mounted anew.
package nfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"coffer/internal/guestconfig"
)

// File is where a site names its export, and Dir where it is mounted; both in
// the root of user_data.
const (
	File = "ext_mount.conf"
	Dir  = "mnt"
)

// Port is the server's, also that of its mount protocol where it speaks version 3.
const Port = 2049

// maxFile bounds the file in bytes.
const maxFile = 4096

// Export is what is mounted.
type Export struct {
	Host string // a name or an address
	Path string // absolute
}

func (e Export) String() string {
	if strings.Contains(e.Host, ":") {
		return "[" + e.Host + "]:" + e.Path
	}
	return e.Host + ":" + e.Path
}

var exportPath = regexp.MustCompile(`^/[A-Za-z0-9._/@+=:~-]*$`)

// Parse reads ext_mount.conf: one line server:/export. Blank lines and lines that
// begin with # do not count. An IPv6 address stands in brackets.
func Parse(text []byte) (*Export, error) {
	if len(text) > maxFile {
		return nil, fmt.Errorf("more than %d bytes", maxFile)
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			found = append(found, line)
		}
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("%d lines, want one: server:/export", len(found))
	}
	host, dir, ok := strings.Cut(found[0], ":/")
	if !ok {
		return nil, fmt.Errorf("%.100q is not server:/export", found[0])
	}
	dir = "/" + dir
	if in, ok := strings.CutPrefix(host, "["); ok {
		in, ok = strings.CutSuffix(in, "]")
		a, err := netip.ParseAddr(in)
		if !ok || err != nil || !a.Is6() || a.Zone() != "" {
			return nil, fmt.Errorf("%.100q is not an IPv6 address in brackets", host)
		}
		host = a.String()
	} else if !guestconfig.ValidHostName(host) {
		return nil, fmt.Errorf("%.100q is not a server's name or address", host)
	}
	if len(dir) > 1024 || !exportPath.MatchString(dir) || path.Clean(dir) != strings.TrimSuffix(dir, "/") && dir != "/" {
		return nil, fmt.Errorf("%.100q is not the clean path of an export", dir)
	}
	return &Export{Host: host, Path: path.Clean(dir)}, nil
}

// Read reads the file of a drive. It returns nil where there is none.
func Read(drive string) (*Export, error) {
	// Not os.Root, which follows a link that stays within.
	f, err := os.OpenFile(filepath.Join(drive, File), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	return Parse(bytes.TrimPrefix(text, []byte("\xef\xbb\xbf")))
}

// options are mount data to try, newest protocol first. The address is numeric:
// there is no helper in user space to look it up.
func options(addr netip.Addr) []string {
	const common = "proto=tcp,sec=sys,timeo=100,retrans=3"
	var out []string
	for _, version := range []string{"4.2", "4.1", "4.0"} {
		out = append(out, fmt.Sprintf("vers=%s,addr=%s,port=%d,%s", version, addr, Port, common))
	}
	// No lock manager; the mount protocol on the same port, else where rpcbind says.
	v3 := fmt.Sprintf("vers=3,addr=%s,mountaddr=%s,port=%d,mountproto=tcp,nolock,%s", addr, addr, Port, common)
	return append(out, fmt.Sprintf("%s,mountport=%d", v3, Port), v3)
}

// Keeper keeps one export mounted.
type Keeper struct {
	Export Export
	Drive  string // the mount point of user_data
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	Printf func(format string, a ...any)
	Sys    Sys
}

// Sys is what is done to the machine.
type Sys interface {
	// Mount mounts at the folder Dir of the drive. It may hang.
	Mount(drive, source, data string) error
	// Check asks for the mounted file system. It may hang while the server is away.
	Check(drive string) error
	// Unmount lets the mount go, at once.
	Unmount(drive string) error
}

// Times of the keeper.
const (
	retryFirst = time.Second
	retryMax   = time.Minute
	checkEvery = 30 * time.Second
	lookupTime = 15 * time.Second
	callTime   = 2 * time.Minute // what hangs longer is reported, and waited for
)

// Run mounts, and mounts again what is lost, until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	defer k.Sys.Unmount(k.Drive)
	for ctx.Err() == nil {
		if !k.mount(ctx) {
			return
		}
		if err := k.watch(ctx); err != nil {
			k.Printf("nfs %s is lost: %v", k.Export, err)
			if err := k.Sys.Unmount(k.Drive); err != nil {
				k.Printf("nfs unmount: %v", err)
			}
		}
	}
}

// mount tries until it has mounted.
func (k *Keeper) mount(ctx context.Context) bool {
	var said string
	for wait := retryFirst; ; wait = min(2*wait, retryMax) {
		data, err := k.try(ctx)
		if err == nil {
			k.Printf("nfs %s is mounted at %s/%s options=%q", k.Export, k.Drive, Dir, data)
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		if err.Error() != said { // once, until it changes
			said = err.Error()
			k.Printf("nfs %s is not mounted: %v", k.Export, err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return false
		}
	}
}

func (k *Keeper) try(ctx context.Context) (data string, err error) {
	look, cancel := context.WithTimeout(ctx, lookupTime)
	defer cancel()
	addrs, err := k.Lookup(look, k.Export.Host)
	if err != nil {
		return "", err
	}
	if len(addrs) == 0 {
		return "", fmt.Errorf("%s has no address", k.Export.Host)
	}
	addr := addrs[0].Unmap()
	source := Export{addr.String(), k.Export.Path}.String()
	var old error // what version 3 ended in
	for _, data = range options(addr) {
		next := k.call(ctx, "mount", func() error { return k.Sys.Mount(k.Drive, source, data) })
		if next == nil {
			return data, nil
		}
		if ctx.Err() != nil || errors.Is(next, errTarget) {
			return "", next
		}
		if err == nil {
			err = next
		}
		if strings.HasPrefix(data, "vers=3,") {
			old = next
		}
		if errors.Is(next, unix.ECONNREFUSED) || errors.Is(next, unix.EHOSTUNREACH) || errors.Is(next, unix.ENETUNREACH) ||
			errors.Is(next, unix.ETIMEDOUT) || errors.Is(next, unix.EACCES) {
			break // whatever the version
		}
	}
	if old != nil {
		err = fmt.Errorf("NFS 4: %w; NFS 3, its mount protocol at port %d or where port 111 says: %w", err, Port, old)
	}
	return "", err
}

// watch returns when the mount has become useless, and why.
func (k *Keeper) watch(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(checkEvery):
		}
		err := k.call(ctx, "the server", func() error { return k.Sys.Check(k.Drive) })
		if err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// call waits for a call that knows no context. While the server is away it
// waits on: the mount is a hard one, and the kernel goes on by itself.
func (k *Keeper) call(ctx context.Context, what string, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	late := time.NewTimer(callTime)
	defer late.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-late.C:
			k.Printf("nfs %s: %s has not answered for %s", k.Export, what, callTime)
		}
	}
}
