package cli

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"coffer/hostbuild/disk"
)

func (a *App) drive() *cobra.Command {
	ls := &cobra.Command{
		Use:     "ls DRIVE.qcow2 [FOLDER]",
		Short:   "List a folder of a drive",
		Example: "  hostbuild drive ls applog.qcow2",
		Args:    usage(cobra.RangeArgs(1, 2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir := "/"
			if len(args) == 2 {
				dir = args[1]
			}
			entries, err := disk.ListDrive(cmd.Context(), args[0], dir)
			if err != nil {
				return err
			}
			for _, e := range entries {
				fmt.Fprintf(a.Stdout, "%06o %5d %5d %12d  %s\n", e.Mode, e.UID, e.GID, e.Size, visible(e.Name))
			}
			return nil
		},
	}
	cat := &cobra.Command{
		Use:     "cat DRIVE.qcow2 FILE",
		Short:   "Print a file of a drive",
		Example: "  hostbuild drive cat applog.qcow2 /workload.log",
		Args:    usage(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return disk.ReadDrive(cmd.Context(), args[0], a.Stdout, args[1])
		},
	}
	put := &cobra.Command{
		Use:   "put DRIVE.qcow2 FILE-OR-FOLDER NAME",
		Short: "Copy a file or folder into a drive",
		Long: `Copies a file or folder of this host into a drive, as NAME or, where NAME is a folder
of the drive, into it. What is there is replaced, file by file. All belongs to 0:0,
with the permissions it has here. The VM must not run.`,
		Example: "  hostbuild drive put user_data.qcow2 ./dataset /",
		Args:    usage(cobra.ExactArgs(3)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return disk.PutDrive(cmd.Context(), args[0], args[1], args[2], time.Now())
		},
	}
	get := &cobra.Command{
		Use:   "get DRIVE.qcow2 FILE-OR-FOLDER DEST",
		Short: "Copy a file or folder out of a drive",
		Long: `Copies a file or folder of a drive to DEST on this host, which must not be there.
Links, devices and the like stay behind: a drive may come from a host that nobody trusts.`,
		Example: "  hostbuild drive get applog.qcow2 / ./applog",
		Args:    usage(cobra.ExactArgs(3)),
		RunE: func(cmd *cobra.Command, args []string) error {
			skipped, err := disk.GetDrive(cmd.Context(), args[0], args[1], args[2])
			for _, s := range skipped {
				fmt.Fprintf(a.Stderr, "warning: %q is neither a file nor a folder: left out\n", s)
			}
			return err
		},
	}
	resize := &cobra.Command{
		Use:     "resize DRIVE.qcow2 GB",
		Short:   "Make a drive and its file system larger or smaller",
		Example: "  hostbuild drive resize user_data.qcow2 200",
		Args:    usage(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := driveSize(args[1])
			if err != nil {
				return err
			}
			return disk.ResizeDrive(cmd.Context(), args[0], size)
		},
	}
	var label string
	create := &cobra.Command{
		Use:   "new DRIVE.qcow2 GB [NAME=FILE-OR-FOLDER ...]",
		Short: "Make a plain drive",
		Long: `Makes a drive with an ext4 over the whole of it, as the bundles have them, and copies
files and folders of this host into it under the names given.`,
		Example: "  hostbuild drive new user_data.qcow2 200 train=./dataset",
		Args:    usage(cobra.MinimumNArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			p := disk.DriveParams{Out: args[0], Label: label, Trees: map[string]string{}, Time: time.Now()}
			var err error
			if p.Size, err = driveSize(args[1]); err != nil {
				return err
			}
			for _, arg := range args[2:] {
				name, path, ok := strings.Cut(arg, "=")
				if !ok || name == "" || path == "" {
					return fmt.Errorf("%w: %q is not NAME=FILE-OR-FOLDER", errUsage, arg)
				}
				p.Trees[name] = path
			}
			if _, err := os.Lstat(p.Out); err == nil {
				return fmt.Errorf("%s is there already", p.Out)
			}
			return disk.BuildDrive(cmd.Context(), p)
		},
	}
	create.Flags().StringVar(&label, "label", "user_data", "label of the file system")
	return group("drive", "Look into a bundle's plain drives and fill them, without root", ls, cat, get, put, resize, create)
}

// driveSize reads a number of GB.
func driveSize(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 1 || n > 65536 {
		return 0, fmt.Errorf("%w: %q is not a size in GB from 1 to 65536", errUsage, s)
	}
	return n << 30, nil
}
