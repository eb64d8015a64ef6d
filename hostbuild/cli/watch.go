package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"coffer/hostbuild/watch"
)

const watchPoll = 250 * time.Millisecond

func (a *App) watch() *cobra.Command {
	return &cobra.Command{
		Use:   "watch CONSOLE.LOG",
		Short: "Show a guest's boot: phases with their times, the last attestation round, the end",
		Long: `Follows the console.log that launch_vm.sh writes, waits for it where it is not there yet,
and ends when the guest is off. On a terminal it is a table, else a line an event. - reads
standard input to its end. The exit code is 1 where the guest failed.

The console is the host's, who can write there what he likes: it is for finding faults.`,
		Example: "  hostbuild watch cvm_0123456789ab/console.log",
		Args:    usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			var s watch.State
			var screen *watch.Screen
			if a.Size != nil {
				screen = &watch.Screen{W: a.Stdout, Size: a.Size}
			}
			show := func(text []byte) bool {
				now := time.Now()
				events := s.Write(text, now)
				if screen != nil {
					screen.Draw(&s, now)
				} else {
					for _, e := range events {
						fmt.Fprintln(a.Stdout, e)
					}
				}
				return s.End == ""
			}
			var err error
			if args[0] == "-" {
				err = watchAll(a.Stdin, show)
			} else {
				err = watch.Follow(cmd.Context(), args[0], watchPoll, show)
			}
			switch {
			case errors.Is(err, context.Canceled):
				return nil // by Ctrl-C
			case err != nil:
				return err
			case s.End == "":
				return errors.New("the console ends before the guest does")
			case s.Failed:
				return errors.New("the guest failed; docs/operations.md has cause and cure of each code")
			}
			return nil
		},
	}
}

// watchAll gives all of r to show.
func watchAll(r io.Reader, show func([]byte) bool) error {
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			show(buf[:n])
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
