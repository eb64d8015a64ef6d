//go:build !cgo

package main

import (
	"fmt"
	"os"
)

// NVML is a C library. Without cgo this program says so, so that `go vet ./...`
// works where there is no C compiler.
func main() {
	fmt.Fprintln(os.Stderr, "gpu-helper: built without cgo, cannot speak to NVML")
	os.Exit(1)
}
