// Snpguest stands for virtee's snpguest in a Coffer guest. See package snpguest.
package main

import (
	"os"
	"time"

	"coffer/internal/snpguest"
)

func main() {
	os.Exit(snpguest.Run(os.Args[1:], snpguest.Env{Stdout: os.Stdout, Stderr: os.Stderr, Socket: snpguest.SocketPath, Now: time.Now()}))
}
