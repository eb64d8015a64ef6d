package gpu_test

import (
	"encoding/hex"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"coffer/internal/gpu"
)

func TestEvidence(t *testing.T) {
	want := []gpu.Evidence{
		{Arch: gpu.Hopper, UUID: "GPU-1", Report: []byte{0x11, 2}, Chain: []byte("pem")},
		{Arch: gpu.Blackwell, Report: []byte{0x11, 3}, Chain: []byte("pem")},
	}
	text, err := gpu.MarshalEvidence(want)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := gpu.ParseEvidence(text); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	// The form that Trustee documents, hex included.
	form := `{"nvidia":{"device_evidence_list":[{"arch":"HOPPER","uuid":"GPU-1","evidence":"` + hex.EncodeToString(want[0].Report) + `","certificate":"cGVt"}]}}`
	if got, err := gpu.ParseEvidence(form); err != nil || !reflect.DeepEqual(got, want[:1]) {
		t.Errorf("%+v, %v", got, err)
	}
	entry := `{"arch":"HOPPER","evidence":"EQI=","certificate":"cGVt"}`
	for _, bad := range []string{
		"", "[]", "{}", `{"nvidia":{}}`, `{"nvidia":{"device_evidence_list":[]}}`, form + "x", form + "{}", `{"sampledevice":{}}`,
		strings.Replace(form, "cGVt", "c", 1), strings.Replace(form, `"evidence":"`, `"evidence":"!`, 1), strings.Replace(form, `"uuid"`, `"other"`, 1),
		`{"nvidia":{"device_evidence_list":[` + strings.Repeat(entry+",", 16) + entry + `]}}`,
	} {
		if got, err := gpu.ParseEvidence(bad); err == nil {
			t.Errorf("%.60s was read as %+v", bad, got)
		}
	}
}

func FuzzParseEvidence(f *testing.F) {
	f.Add(`{"nvidia":{"device_evidence_list":[{"arch":"HOPPER","uuid":"GPU-1","evidence":"EQI=","certificate":"cGVt"}]}}`)
	f.Fuzz(func(t *testing.T, text string) {
		list, err := gpu.ParseEvidence(text)
		if err != nil {
			return
		}
		again, err := gpu.MarshalEvidence(list)
		if err != nil || !json.Valid([]byte(again)) {
			t.Fatal(err)
		}
		if twice, err := gpu.ParseEvidence(again); err != nil || len(twice) != len(list) {
			t.Fatalf("%v", err)
		}
	})
}
