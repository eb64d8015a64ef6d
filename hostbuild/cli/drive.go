package cli

import (
	"fmt"

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
				fmt.Fprintf(a.Stdout, "%06o %5d %5d %12d  %s\n", e.Mode, e.UID, e.GID, e.Size, e.Name)
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
	return group("drive", "Look into a bundle's plain drives, without root", ls, cat)
}
