package ext4

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"time"
)

// ErrDamaged says that a file system needs a repair that may lose data.
var ErrDamaged = errors.New("the file system is damaged: `e2fsck` it by hand")

// Check brings the file system in the file at image into a clean state: it replays
// the journal that a machine which was cut off leaves, and repairs what is safe to.
func Check(ctx context.Context, image string) error {
	err := run(ctx, time.Now(), nil, nil, "e2fsck", "-f", "-p", image)
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		if exit.ExitCode() == 1 { // errors, corrected
			return nil
		}
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}

// Resize makes the file system in the file at image, which is clean, size bytes
// large. The file is as large as the larger of the two sizes.
func Resize(ctx context.Context, image string, size int64) error {
	return run(ctx, time.Now(), nil, nil, "resize2fs", image, strconv.FormatInt(size/1024, 10)+"K")
}
