// Package ext4 makes and reads ext4 file systems in plain files with the tools
// of e2fsprogs (mke2fs, debugfs): no root, no mount, no loop device.
//
// It also knows which blocks of a fresh file system count (Live): those that
// must be there for the kernel and e2fsck. All others may hold anything.
package ext4

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// BlockSize of the file systems made here.
const BlockSize = 4096

// ErrNoTool says that e2fsprogs is not installed.
var ErrNoTool = errors.New("install the package e2fsprogs")

// Options of a file system.
type Options struct {
	Label string    // at most 16 bytes
	UUID  string    // empty: random
	Time  time.Time // of its making
	// BytesPerInode sets the number of inodes; 0 is mke2fs's own choice.
	BytesPerInode int
	FileKeys      bool // folders can have keys of their own (fscrypt)
}

// features are given in full, so that the build host's mke2fs.conf has no say.
// resize_inode is missing: resize2fs, which works offline here, does without.
const features = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"

// Make puts an empty file system on the whole of the file at path, whose size is
// a multiple of BlockSize, and which reads as zero. Inode tables and journal are
// left to be filled by the kernel. The root directory belongs to 0:0, mode 0755.
func Make(ctx context.Context, path string, o Options) error {
	extended := "nodiscard,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"
	features := features
	if o.FileKeys {
		features += ",encrypt"
	}
	args := []string{"-q", "-F", "-t", "ext4", "-b", strconv.Itoa(BlockSize), "-I", "256", "-m", "0", "-O", features, "-L", o.Label}
	if o.UUID != "" {
		args = append(args, "-U", o.UUID)
		extended += ",hash_seed=" + o.UUID
	}
	if o.BytesPerInode > 0 {
		args = append(args, "-i", strconv.Itoa(o.BytesPerInode))
	}
	args = append(args, "-E", extended, path)
	return run(ctx, o.Time, nil, nil, "mke2fs", args...)
}

// run runs a tool of e2fsprogs.
func run(ctx context.Context, now time.Time, stdin io.Reader, stdout io.Writer, tool string, args ...string) error {
	path, err := find(tool)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	seconds := strconv.FormatInt(max(now.Unix(), 1), 10)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "MKE2FS_CONFIG=/dev/null", "DEBUGFS_PAGER=cat",
		"E2FSPROGS_FAKE_TIME=" + seconds, "SOURCE_DATE_EPOCH=" + seconds}
	cmd.WaitDelay = 5 * time.Second
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, &stderr
	err = cmd.Run()
	msg := strings.TrimSpace(stderr.String())
	if tool == "debugfs" {
		// Its exit status is 0 whatever happens, but all it has to say when
		// nothing does is its banner.
		if first, rest, _ := strings.Cut(msg, "\n"); strings.HasPrefix(first, "debugfs 1.") {
			msg = rest
		}
		if first, rest, _ := strings.Cut(msg, "\n"); strings.HasSuffix(first, ": catastrophic mode - not reading inode or group bitmaps") { // -c
			msg = rest
		}
		if err == nil && msg != "" {
			err = errors.New("failed")
		}
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", tool, ctx.Err())
	case strings.Contains(msg, "Could not allocate") || strings.Contains(msg, "No space left"):
		err = ErrFull
	case strings.Contains(msg, "File not found"):
		err = fs.ErrNotExist
	}
	if len(msg) > 500 {
		msg = "..." + msg[len(msg)-500:]
	}
	return fmt.Errorf("%s: %w: %s", tool, err, strings.ReplaceAll(msg, "\n", "; "))
}

// find looks in PATH, and where a user's PATH does not reach.
func find(tool string) (string, error) {
	if path, err := exec.LookPath(tool); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		path := filepath.Join(dir, tool)
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", fmt.Errorf("program %s not found: %w", tool, ErrNoTool)
}
