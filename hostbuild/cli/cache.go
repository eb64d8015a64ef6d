package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"coffer/hostbuild/cache"
)

func (a *App) cache() *cobra.Command {
	var gb int64
	prune := &cobra.Command{
		Use:   "prune",
		Short: "Remove cached layers",
		Long: `Removes the layers in cache_dir of the settings that were not used for the longest time,
until --keep-gb are left: by default all of them. A build that runs is not disturbed.`,
		Example: "  hostbuild cache prune --keep-gb 5",
		Args:    usage(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if gb < 0 {
				return fmt.Errorf("%w: --keep-gb %d", errUsage, gb)
			}
			s, err := a.settings()
			if err != nil {
				return err
			}
			if s.CacheDir == "" {
				return errors.New("the settings name no cache_dir")
			}
			c, err := cache.Open(s.CacheDir)
			if err != nil {
				return err
			}
			p, err := c.Prune(gb << 30)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.Stdout, "removed %d layers, %d MB; kept %d, %d MB\n", p.Removed, p.Freed/1e6, p.Kept, p.Left/1e6)
			return nil
		},
	}
	prune.Flags().Int64Var(&gb, "keep-gb", 0, "GB that may stay")
	return group("cache", "The cache of converted layers", prune)
}
