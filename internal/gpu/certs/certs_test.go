package certs_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"strings"
	"testing"

	"coffer/internal/gpu"
	"coffer/internal/gpu/certs"
	"coffer/test/gpusim"
)

// TestRoots compares the built-in roots with the digests NVIDIA's documents give.
func TestRoots(t *testing.T) {
	for name, m := range map[string]struct{ got, want string }{
		"device": {fingerprint(certs.DeviceRoot().Raw), "102BF659D5419614C9D8E6AECEBC80454EB26B1DF6A769AC720B9A690B167B48"},
		"RIM":    {fingerprint(certs.RIMRoot().Raw), "12977B5115ACB0381179279FFFEB5A8C4D264971EBB32298023A465FA41DF5D1"},
	} {
		if m.got != m.want {
			t.Errorf("%s root is %s, want %s", name, m.got, m.want)
		}
	}
}

func fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return strings.ToUpper(hex.EncodeToString(sum[:]))
}

func TestDevice(t *testing.T) {
	w := gpusim.NewWorld()
	for arch, chip := range map[string]string{gpu.Hopper: "GH100", gpu.Blackwell: "GB100", gpu.LS10: "LS10"} {
		d := w.NewDevice(arch)
		chain, err := certs.ParsePEM(gpusim.PEM(d.Chain))
		if err != nil {
			t.Fatal(err)
		}
		got, err := certs.VerifyDevice(chain, w.DeviceRoot.Cert, gpusim.Now)
		if err != nil || got.Chip != chip || got.FWID != d.FWID || got.Serial != chain[0].SerialNumber.String() || !strings.HasSuffix(got.Model, "BROM") {
			t.Errorf("%s: %+v, %v", arch, got, err)
		}
	}
}

func TestParsePEM(t *testing.T) {
	one := gpusim.PEM([]*gpusim.Authority{gpusim.NewRoot("x")})
	key := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: []byte{1}})
	headed := bytes.Replace(one, []byte("-----\n"), []byte("-----\na: b\n\n"), 1)
	for _, m := range []struct {
		name string
		text []byte
		want int // certificates, -1: refused
	}{
		{"nothing", nil, 0},
		{"one", one, 1},
		{"no newline at the end", bytes.TrimSpace(one), 1},
		{"NULs at the end", append(bytes.Clone(one), 0, 0, 0), 1},
		{"two and empty lines", bytes.Join([][]byte{one, []byte("\r\n\n"), one}, nil), 2},
		{"text before", append([]byte("x\n"), one...), -1},
		{"text between", bytes.Join([][]byte{one, one}, []byte("x\n")), -1},
		{"text after", append(bytes.Clone(one), 'x'), -1},
		{"a key", append(bytes.Clone(one), key...), -1},
		{"headers", headed, -1},
		{"cut", one[:len(one)/2], -1},
		{"too much", bytes.Repeat(one, 100), -1},
	} {
		chain, err := certs.ParsePEM(m.text)
		if (err != nil) != (m.want < 0) || err == nil && len(chain) != m.want {
			t.Errorf("%s: %d certificates, %v", m.name, len(chain), err)
		}
		if err != nil && !errors.Is(err, certs.ErrStructure) {
			t.Errorf("%s: untyped error %v", m.name, err)
		}
	}
}

func FuzzChain(f *testing.F) {
	w := gpusim.NewWorld()
	for _, arch := range []string{gpu.Hopper, gpu.Blackwell} {
		f.Add(gpusim.PEM(w.NewDevice(arch).Chain))
	}
	f.Add(gpusim.PEM(w.RIMChain))
	f.Fuzz(func(t *testing.T, text []byte) {
		chain, err := certs.ParsePEM(text)
		if err != nil {
			return
		}
		for _, c := range chain {
			certs.FWID(c)
		}
		// The roots of this run are new, so that no chain of another can pass.
		if _, err := certs.VerifyDevice(chain, certs.DeviceRoot(), gpusim.Now); err == nil {
			t.Fatal("a chain of made-up roots passed as NVIDIA's")
		}
	})
}
