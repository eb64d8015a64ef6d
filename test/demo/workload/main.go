// Command workload is the demo's container: it prints a file of /user_config,
// writes to /applog and works on until it is stopped.
package main

import (
	"fmt"
	"os"
	"time"
)

func main() {
	greeting, err := os.ReadFile("/user_config/demo/greeting.txt")
	if err != nil {
		fmt.Println("cannot read the configuration:", err)
		os.Exit(1)
	}
	fmt.Printf("hello from the workload: %s", greeting)
	if err := os.WriteFile("/applog/demo.txt", []byte("written by the workload\n"), 0o644); err != nil {
		fmt.Println("cannot write the log:", err)
		os.Exit(1)
	}
	for n := 1; ; n++ {
		fmt.Println("work unit", n, "done")
		time.Sleep(5 * time.Second)
	}
}
