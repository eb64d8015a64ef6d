package nfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// errTarget means that the drive has no folder to mount at.
var errTarget = errors.New("no folder to mount at")

// Kernel is the real Sys.
type Kernel struct{}

// Share lets mounts below the drive show up in containers that have it.
func Share(drive string) error {
	if err := unix.Mount("", drive, "", unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the mounts of %s: %w", drive, err)
	}
	return nil
}

// target opens the folder Dir of the drive itself, not what a link leads to.
func target(drive string) (*os.File, error) {
	root, err := os.OpenRoot(drive)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errTarget, err)
	}
	defer root.Close()
	if err := root.Mkdir(Dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%w: %w", errTarget, err)
	}
	fd, err := unix.Open(filepath.Join(drive, Dir), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", errTarget, Dir, err)
	}
	return os.NewFile(uintptr(fd), Dir), nil
}

// Mount mounts without setuid files and devices, as user_data itself.
func (Kernel) Mount(drive, source, data string) error {
	dir, err := target(drive)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Mount(source, "/proc/self/fd/"+strconv.Itoa(int(dir.Fd())), "nfs", unix.MS_NOSUID|unix.MS_NODEV, data)
}

// Check asks the server for the file system's numbers.
func (Kernel) Check(drive string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Join(drive, Dir), &st); err != nil {
		return err
	}
	if st.Type != unix.NFS_SUPER_MAGIC {
		return errors.New("it is not mounted any more")
	}
	return nil
}

// Unmount lets the mount go even while it is in use.
func (Kernel) Unmount(drive string) error {
	err := unix.Unmount(filepath.Join(drive, Dir), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // nothing is mounted
		return nil
	}
	return err
}
