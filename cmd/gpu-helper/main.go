//go:build cgo

// Command gpu-helper asks NVML one question: a request in JSON on standard input,
// an answer in JSON on standard output. See package coffer/internal/gpu/helper.
package main

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"coffer/internal/gpu"
	"coffer/internal/gpu/helper"
)

func main() {
	library := flag.String("library", "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", "NVIDIA's management library, absolute path")
	flag.Parse()
	if err := run(*library, os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "gpu-helper:", err)
		os.Exit(1)
	}
}

func run(library string, in io.Reader, out io.Writer) error {
	if !filepath.IsAbs(library) {
		return fmt.Errorf("--library %q is not an absolute path", library)
	}
	var r helper.Request
	line, err := bufio.NewReader(io.LimitReader(in, 4<<10)).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err != nil {
		return fmt.Errorf("read the request: %w", err)
	}
	a, err := answer(nvml.New(nvml.WithLibraryPath(library)), r)
	var p *helper.Problem
	if errors.As(err, &p) {
		a, err = &helper.Answer{Error: p}, nil
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(a)
}

// symbols are what the calls below need. A call of one that the library lacks ends
// the process: they are looked up first.
var symbols = map[string][]string{
	helper.OpSettings:    {"nvmlSystemGetConfComputeCapabilities", "nvmlSystemGetConfComputeState"},
	helper.OpDevices:     devices,
	helper.OpCollect:     append([]string{"nvmlDeviceGetConfComputeGpuAttestationReport", "nvmlDeviceGetConfComputeGpuCertificate"}, devices...),
	helper.OpReady:       {"nvmlSystemGetConfComputeGpusReadyState"},
	helper.OpSetReady:    {"nvmlSystemSetConfComputeGpusReadyState"},
	helper.OpPersistence: append([]string{"nvmlDeviceSetPersistenceMode"}, devices...),
}

var devices = []string{"nvmlDeviceGetUUID", "nvmlDeviceGetVbiosVersion", "nvmlDeviceGetArchitecture", "nvmlSystemGetDriverVersion"}

func answer(lib nvml.Interface, r helper.Request) (*helper.Answer, error) {
	need, known := symbols[r.Op]
	if !known {
		return nil, fmt.Errorf("unknown operation %q", r.Op)
	}
	if err := check("nvmlInit", lib.Init()); err != nil {
		return nil, err
	}
	defer lib.Shutdown()
	for _, name := range need {
		if err := lib.Extensions().LookupSymbol(name); err != nil {
			return nil, &helper.Problem{Call: name, Text: "the installed library lacks it: another driver version is needed"}
		}
	}
	switch r.Op {
	case helper.OpSettings:
		return settings(lib)
	case helper.OpDevices:
		a := &helper.Answer{}
		err := each(lib, func(_ int, d helper.Device, _ nvml.Device) error {
			a.Devices = append(a.Devices, d)
			return nil
		})
		return a, err
	case helper.OpCollect:
		return collect(lib, r.Nonce)
	case helper.OpReady:
		state, ret := lib.SystemGetConfComputeGpusReadyState()
		ready := state == nvml.CC_ACCEPTING_CLIENT_REQUESTS_TRUE
		return &helper.Answer{Ready: &ready}, check("nvmlSystemGetConfComputeGpusReadyState", ret)
	case helper.OpSetReady:
		state := uint32(nvml.CC_ACCEPTING_CLIENT_REQUESTS_FALSE)
		if r.Ready {
			state = nvml.CC_ACCEPTING_CLIENT_REQUESTS_TRUE
		}
		return &helper.Answer{Done: true}, check("nvmlSystemSetConfComputeGpusReadyState", lib.SystemSetConfComputeGpusReadyState(state))
	}
	err := each(lib, func(i int, _ helper.Device, dev nvml.Device) error {
		return checkDevice("nvmlDeviceSetPersistenceMode", i, dev.SetPersistenceMode(nvml.FEATURE_ENABLED))
	})
	return &helper.Answer{Done: true}, err
}

// settings asks for what newer libraries tell in one call, and without that call
// for what older ones do; those know no multi-GPU mode.
func settings(lib nvml.Interface) (*helper.Answer, error) {
	caps, ret := lib.SystemGetConfComputeCapabilities()
	if err := check("nvmlSystemGetConfComputeCapabilities", ret); err != nil {
		return nil, err
	}
	s := &gpu.Settings{CPU: caps.CpuCaps}
	if lib.Extensions().LookupSymbol("nvmlSystemGetConfComputeSettings") == nil {
		got, ret := lib.SystemGetConfComputeSettings()
		if err := check("nvmlSystemGetConfComputeSettings", ret); err != nil {
			return nil, err
		}
		s.Environment, s.Feature, s.DevTools, s.MultiGPU = got.Environment, got.CcFeature, got.DevToolsMode, got.MultiGpuMode
		return &helper.Answer{Settings: s}, nil
	}
	got, ret := lib.SystemGetConfComputeState()
	s.Environment, s.Feature, s.DevTools = got.Environment, got.CcFeature, got.DevToolsMode
	return &helper.Answer{Settings: s}, check("nvmlSystemGetConfComputeState", ret)
}

func collect(lib nvml.Interface, nonceHex string) (*helper.Answer, error) {
	nonce, err := hex.DecodeString(nonceHex)
	if err != nil || len(nonce) != 32 {
		return nil, fmt.Errorf("nonce %q is not 32 bytes of hex", nonceHex)
	}
	a := &helper.Answer{}
	err = each(lib, func(i int, d helper.Device, dev nvml.Device) error {
		cert, ret := dev.GetConfComputeGpuCertificate()
		if err := checkDevice("nvmlDeviceGetConfComputeGpuCertificate", i, ret); err != nil {
			return err
		}
		report := nvml.ConfComputeGpuAttestationReport{Nonce: [32]uint8(nonce)}
		ret = dev.GetConfComputeGpuAttestationReport(&report)
		if err := checkDevice("nvmlDeviceGetConfComputeGpuAttestationReport", i, ret); err != nil {
			return err
		}
		if n, m := int(report.AttestationReportSize), int(cert.AttestationCertChainSize); n > len(report.AttestationReport) || m > len(cert.AttestationCertChain) {
			return &helper.Problem{Call: "nvmlDeviceGetConfComputeGpuAttestationReport", Device: &i, Text: fmt.Sprintf("a report of %d and a chain of %d bytes do not fit", n, m)}
		}
		a.Evidence = append(a.Evidence, helper.Evidence{
			Device: d, Report: report.AttestationReport[:report.AttestationReportSize], Chain: cert.AttestationCertChain[:cert.AttestationCertChainSize],
		})
		return nil
	})
	return a, err
}

// each calls do for every GPU.
func each(lib nvml.Interface, do func(i int, d helper.Device, dev nvml.Device) error) error {
	driver, ret := lib.SystemGetDriverVersion()
	if err := check("nvmlSystemGetDriverVersion", ret); err != nil {
		return err
	}
	n, ret := lib.DeviceGetCount()
	if err := check("nvmlDeviceGetCount", ret); err != nil {
		return err
	}
	if n > gpu.MaxDevices {
		return &helper.Problem{Call: "nvmlDeviceGetCount", Text: fmt.Sprintf("%d GPUs are more than %d", n, gpu.MaxDevices)}
	}
	for i := range n {
		dev, ret := lib.DeviceGetHandleByIndex(i)
		if err := checkDevice(helper.CallHandle, i, ret); err != nil {
			return err
		}
		d := helper.Device{Driver: driver}
		if d.UUID, ret = dev.GetUUID(); ret != nvml.SUCCESS {
			return checkDevice("nvmlDeviceGetUUID", i, ret)
		}
		if d.VBIOS, ret = dev.GetVbiosVersion(); ret != nvml.SUCCESS {
			return checkDevice("nvmlDeviceGetVbiosVersion", i, ret)
		}
		arch, ret := dev.GetArchitecture()
		if err := checkDevice("nvmlDeviceGetArchitecture", i, ret); err != nil {
			return err
		}
		switch arch {
		case nvml.DEVICE_ARCH_HOPPER:
			d.Arch = gpu.Hopper
		case nvml.DEVICE_ARCH_BLACKWELL:
			d.Arch = gpu.Blackwell
		default:
			d.Arch = fmt.Sprintf("architecture %d", arch)
		}
		if err := do(i, d, dev); err != nil {
			return err
		}
	}
	return nil
}

func check(call string, ret nvml.Return) error {
	if ret == nvml.SUCCESS {
		return nil
	}
	return &helper.Problem{Call: call, Return: int(ret), Text: ret.Error()}
}

func checkDevice(call string, i int, ret nvml.Return) error {
	if ret == nvml.SUCCESS {
		return nil
	}
	return &helper.Problem{Call: call, Device: &i, Return: int(ret), Text: ret.Error()}
}
