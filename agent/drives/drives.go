// Package drives finds the guest's drives by their virtio serials and mounts
// them. All but scratch are made, and may be changed at any time, by the host:
// they are ext4 and nothing else, never checked or repaired, and without setuid
// files and device nodes. A mount that hangs is given up.
package drives

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Mount is one drive and where it goes.
type Mount struct {
	Serial string // virtio-blk serial
	Device string // instead of a serial
	Target string
	Flags  uintptr
	Data   string
}

// ErrMissing means that no disk has the serial.
var ErrMissing = errors.New("no such drive")

const hostile = unix.MS_NOSUID | unix.MS_NODEV

// An error in a file system that the host made must not stop the kernel,
// whatever its superblock asks for.
const survive = "errors=remount-ro"

// reserve keeps the blocks that ext4 reserves, if any, for the agent's logs: root
// in the container is not this user, and has no CAP_SYS_RESOURCE.
const reserve = ",resuid=65534"

// Host is what launch_vm.sh attaches besides crypt_root. The startup scripts of
// a workload run from /user_config, so it is not noexec.
func Host() []Mount {
	return []Mount{
		{Serial: "applog", Target: "/applog", Flags: hostile | unix.MS_NOEXEC, Data: survive + reserve},
		{Serial: "user_config", Target: "/user_config", Flags: hostile | unix.MS_RDONLY, Data: survive},
		{Serial: "user_data", Target: "/user_data", Flags: hostile, Data: survive},
	}
}

// Scratch is the encrypted part of crypt_root.
func Scratch(device string) Mount {
	return Mount{Device: device, Target: "/scratch", Flags: hostile | unix.MS_NOATIME, Data: "noinit_itable"}
}

// attachWithin is how long a drive may take to appear.
const attachWithin = 5 * time.Second

// Find returns the device with a serial, such as /dev/vdb.
func Find(ctx context.Context, sysBlock, dev, serial string) (string, error) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		names, err := filepath.Glob(filepath.Join(sysBlock, "vd*", "serial"))
		if err != nil {
			return "", err
		}
		var found []string
		for _, n := range names {
			if b, err := os.ReadFile(n); err == nil && strings.TrimRight(string(b), "\x00\n ") == serial {
				found = append(found, filepath.Join(dev, filepath.Base(filepath.Dir(n))))
			}
		}
		switch {
		case len(found) == 1:
			return found[0], nil
		case len(found) > 1:
			return "", fmt.Errorf("drive %s: %d disks have this serial: %v", serial, len(found), found)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", fmt.Errorf("drive %s: %w: no disk has this serial", serial, ErrMissing)
		}
	}
}

// Attach finds and mounts one drive.
func Attach(ctx context.Context, m Mount) error {
	device := m.Device
	if device == "" {
		find, cancel := context.WithTimeout(ctx, attachWithin)
		defer cancel()
		var err error
		if device, err = Find(find, "/sys/block", "/dev", m.Serial); err != nil {
			return err
		}
	}
	done := make(chan error, 1)
	go func() { done <- mount(device, m) }() // the call knows no context
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("mount %s at %s: %w", device, m.Target, ctx.Err())
	}
}

func mount(device string, m Mount) error {
	err := unix.Mount(device, m.Target, "ext4", m.Flags, m.Data)
	if errors.Is(err, unix.EROFS) && m.Flags&unix.MS_RDONLY != 0 {
		// A journal to replay on a disk that cannot be written to.
		err = unix.Mount(device, m.Target, "ext4", m.Flags, m.Data+",noload")
	}
	if err != nil {
		return fmt.Errorf("mount %s (ext4) at %s: %w", device, m.Target, err)
	}
	return nil
}

// Overlay mounts folders over each other at target, read-only, the first on top.
// The lower ones may be the host's: no mark in their attributes leads elsewhere.
func Overlay(target string, layers ...string) error {
	data := "lowerdir=" + strings.Join(layers, ":") + ",redirect_dir=nofollow,metacopy=off"
	if err := unix.Mount("overlay", target, "overlay", hostile|unix.MS_RDONLY, data); err != nil {
		return fmt.Errorf("mount overlay of %v at %s: %w", layers, target, err)
	}
	return nil
}
