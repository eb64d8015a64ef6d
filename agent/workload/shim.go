package workload

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
)

// shimExit waits for the run's end and asks its shim how it ended: the shim knows
// it whether containerd is there or not, and a containerd that starts forgets the
// runs that ended while it was away. An error means that the shim cannot be asked.
func shimExit(ctx context.Context, taskDir, id string) (Exit, error) {
	text, err := os.ReadFile(filepath.Join(taskDir, "bootstrap.json"))
	if err != nil {
		return Exit{}, err
	}
	var shim struct{ Address, Protocol string }
	if err := json.Unmarshal(text, &shim); err != nil {
		return Exit{}, fmt.Errorf("the shim's bootstrap.json: %w", err)
	}
	path, ok := strings.CutPrefix(shim.Address, "unix://")
	if !ok || shim.Protocol != "ttrpc" {
		return Exit{}, fmt.Errorf("the shim speaks %q at %q", shim.Protocol, shim.Address)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		return Exit{}, err
	}
	c := ttrpc.NewClient(conn)
	defer c.Close()
	r, err := task.NewTTRPCTaskClient(c).Wait(ctx, &task.WaitRequest{ID: id})
	if err != nil {
		return Exit{}, err
	}
	return Exit{Code: int(r.ExitStatus)}, nil
}
