package spdm_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"coffer/internal/gpu"
	"coffer/internal/gpu/spdm"
	"coffer/test/gpusim"
)

func TestParse(t *testing.T) {
	for _, arch := range []string{gpu.Hopper, gpu.Blackwell, gpu.LS10} {
		d := gpusim.NewWorld().NewDevice(arch)
		raw := d.NewReport([32]byte{7}).Sign(d.Chain[0].Key)
		r, err := spdm.Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		if vbios, err := r.VBIOS(); err != nil || vbios != d.VBIOS {
			t.Errorf("VBIOS %q, want %q: %v", vbios, d.VBIOS, err)
		}
		if r.Nonce != [32]byte{7} || len(r.Measurements) != len(d.Measurements) || !bytes.Equal(encode(r), raw[:len(raw)-96]) {
			t.Error("the report was not read as it was written")
		}
		if err := r.VerifySignature(&d.Chain[0].Key.PublicKey); err != nil {
			t.Error(err)
		}
		if err := r.VerifySignature(&d.Chain[1].Key.PublicKey); !errors.Is(err, spdm.ErrSignature) {
			t.Errorf("another key: %v", err)
		}
	}
}

func TestText(t *testing.T) {
	d := gpusim.NewWorld().NewDevice(gpu.Hopper)
	for text, want := range map[string]string{
		"570.124.06\x00":   "570.124.06",
		"570\x00\x00\x00":  "570",
		"570":              "570",
		"":                 "",
		"\x00":             "",
		"5\x007":           "",
		"../x":             "",
		"a..b":             "",
		"a/b":              "",
		"a b":              "",
		"\xff":             "",
		"A-b_c.0\x00\x00x": "",
	} {
		report := d.NewReport([32]byte{})
		report.Set(spdm.DriverVersion, []byte(text))
		r, err := spdm.Parse(report.Sign(d.Chain[0].Key))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := r.Text(spdm.DriverVersion); got != want || (err == nil) != (want != "") {
			t.Errorf("%q was read as %q, want %q: %v", text, got, want, err)
		}
	}
}

// encode writes what the signature covers.
func encode(r *spdm.Report) []byte {
	b := append([]byte{0x11, 0xE0, 0x01, 0xFF}, r.Nonce[:]...)
	n := len(r.Measurements)
	b = append(b, 0, 0x11, 0x60, 0, 0, byte(n), byte(n*55), byte(n*55>>8), 0)
	for i, m := range r.Measurements {
		b = append(append(b, byte(i+1), 1, 51, 0, 1, 48, 0), m...)
	}
	b = append(b, r.ResponderNonce[:]...)
	var opaque []byte
	for _, f := range r.Opaque {
		opaque = binary.LittleEndian.AppendUint16(opaque, uint16(f.Type))
		opaque = binary.LittleEndian.AppendUint16(opaque, uint16(len(f.Value)))
		opaque = append(opaque, f.Value...)
	}
	return append(binary.LittleEndian.AppendUint16(b, uint16(len(opaque))), opaque...)
}

// FuzzParse wants every report that is accepted to be made of what was read, all
// of it. Blocks in another order are the one freedom there is.
func FuzzParse(f *testing.F) {
	for _, arch := range []string{gpu.Hopper, gpu.Blackwell, gpu.LS10} {
		d := gpusim.NewWorld().NewDevice(arch)
		report := d.NewReport([32]byte{})
		f.Add(report.Sign(d.Chain[0].Key))
		report.Blocks, report.Tail = report.Blocks[:2], []byte{0}
		f.Add(report.Sign(d.Chain[0].Key))
		report.Opaque = nil
		f.Add(report.Sign(d.Chain[0].Key))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := spdm.Parse(raw)
		if err != nil {
			if !errors.Is(err, spdm.ErrFormat) && !errors.Is(err, spdm.ErrRequest) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		r.VBIOS()
		r.Text(spdm.DriverVersion)
		r.PDIs(spdm.SwitchPDI)
		again := encode(r)
		rest := len(raw) - len(again) - 96
		if rest != 0 && !(rest == 1 && r.Padded) {
			t.Fatalf("%d bytes were read as %d", len(raw), len(again)+96)
		}
		// Sort the blocks of the input as encode does.
		sorted := bytes.Clone(raw[:len(again)])
		for i := range r.Measurements {
			at := 45 + 55*i
			index := int(raw[at]) - 1
			copy(sorted[45+55*index:], raw[at:at+55])
		}
		if !bytes.Equal(sorted, again) {
			t.Fatal("the report was not read as it stands")
		}
	})
}
