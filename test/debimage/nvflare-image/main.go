// Command nvflare-image makes FOLDER/nvflare.tar.gz, with PYTHON's pip.
package main

import (
	"context"
	"fmt"
	"os"

	"coffer/test/debimage"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: nvflare-image PYTHON FOLDER")
		os.Exit(2)
	}
	if _, err := debimage.NVFlare(context.Background(), os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "nvflare-image:", err)
		os.Exit(1)
	}
}
