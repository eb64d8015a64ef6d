package helper_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"coffer/internal/gpu/helper"
)

// TestHardware asks the NVML of a machine with an NVIDIA GPU what it is. It reads
// only: no mode is changed, and no report is fetched. `make test-gpu-hw` runs it.
func TestHardware(t *testing.T) {
	library := os.Getenv("COFFER_GPU_LIBRARY")
	if library == "" {
		t.Skip("COFFER_GPU_LIBRARY does not name the libnvidia-ml.so.1 of a machine with a GPU")
	}
	program := filepath.Join(t.TempDir(), "gpu-helper")
	build := exec.Command("go", "build", "-o", program, "coffer/cmd/gpu-helper")
	build.Env = append(os.Environ(), "CGO_ENABLED=1", "CGO_CFLAGS=-O1 -Wno-deprecated-declarations")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	h := &helper.Helper{Path: program, Library: library}
	devices, err := h.Devices(t.Context())
	if err != nil || len(devices) == 0 {
		t.Fatalf("%d GPUs, %v", len(devices), err)
	}
	for i, d := range devices {
		t.Logf("GPU %d: %+v", i, d)
		if d.UUID == "" || d.Driver == "" || d.VBIOS == "" {
			t.Errorf("GPU %d: %+v", i, d)
		}
	}
	// Where confidential computing is off these may be refused, by NVML itself.
	var refused *helper.Problem
	settings, err := h.Settings(t.Context())
	if t.Logf("settings %+v, %v", settings, err); err != nil && !errors.As(err, &refused) {
		t.Error(err)
	}
	ready, err := h.Ready(t.Context())
	if t.Logf("ready %t, %v", ready, err); err != nil && !errors.As(err, &refused) {
		t.Error(err)
	}
}
