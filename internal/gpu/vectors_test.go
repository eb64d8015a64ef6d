package gpu_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"coffer/internal/gpu"
	"coffer/internal/gpu/certs"
	"coffer/internal/gpu/rim"
	"coffer/internal/gpu/spdm"
)

// vectors is where the samples of public NVIDIA repositories lie: beside the
// repository, never in it.
const vectors = "../../../shared/vectors/gpu"

func needVectors(t testing.TB) {
	t.Helper()
	if _, err := os.Stat(vectors); errors.Is(err, os.ErrNotExist) {
		t.Skip("the samples of vectors/gpu are not here; they are used from beside the repository and never copied")
	}
}

func readVector(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(vectors, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// row is a row of expected.json.
type row struct {
	Name, ReportFile, ChainFile, ReportSHA256, Kind                     string
	ReportBytes, TrailingZeroBytes, ChainPEMBytes, NCerts               int
	NumberOfBlocks, RecordLength, OpaqueLength                          int
	OpaqueOrder                                                         []spdm.FieldType
	RequestNonce, ResponseNonce, Driver, VBIOS, DriverRIMID, VBIOSRIMID string
	NVDEC0, PPCIE, FeatureFlag, FWID, FWIDExt, ChainVerifyNow           string
	JSONNonceMatches                                                    *bool
	Signature, ChainStructuralFiveCertsRootPinned                       bool
	RIMs                                                                map[string][]int
}

func readRows(t testing.TB) []row {
	t.Helper()
	needVectors(t)
	var all struct{ Reports []row }
	if err := json.Unmarshal(readVector(t, "expected.json"), &all); err != nil {
		t.Fatal(err)
	}
	return all.Reports
}

var element = regexp.MustCompile(`\[(\d+)\]$`)

// read returns the report and chain of a row, and the nonce beside them where the
// file names one.
func (r row) read(t testing.TB) (report, chain []byte, nonce string) {
	t.Helper()
	file := readVector(t, r.ReportFile)
	if r.ChainFile != "" {
		report, err := hex.DecodeString(strings.Join(strings.Fields(string(file)), ""))
		if err != nil {
			t.Fatal(err)
		}
		return report, readVector(t, r.ChainFile), ""
	}
	var list []struct {
		Nonce                 string
		Evidence, Certificate []byte
	}
	if err := json.Unmarshal(file, &list); err != nil {
		t.Fatal(err)
	}
	i, _ := strconv.Atoi(element.FindStringSubmatch(r.Name)[1])
	return list[i].Evidence, list[i].Certificate, list[i].Nonce
}

func (r row) evidence(t testing.TB) (gpu.Evidence, [32]byte) {
	report, chain, _ := r.read(t)
	nonce, err := hex.DecodeString(r.RequestNonce)
	if err != nil {
		t.Fatal(err)
	}
	return gpu.Evidence{Report: report, Chain: chain}, [32]byte(nonce)
}

// TestVectors compares what is read of every sample with what an independent
// implementation found.
func TestVectors(t *testing.T) {
	for _, want := range readRows(t) {
		t.Run(want.Name, func(t *testing.T) {
			raw, pem, jsonNonce := want.read(t)
			if sum := sha256.Sum256(raw); hex.EncodeToString(sum[:]) != want.ReportSHA256 || len(raw) != want.ReportBytes || len(pem) != want.ChainPEMBytes {
				t.Fatal("these are other files than those expected.json speaks of")
			}
			report, err := spdm.Parse(raw)
			if err != nil {
				t.Fatal(err)
			}
			hexField := func(f spdm.FieldType) string {
				v, _ := report.Field(f)
				return hex.EncodeToString(v)
			}
			var order []spdm.FieldType
			opaque := 0
			for _, f := range report.Opaque {
				order, opaque = append(order, f.Type), opaque+4+len(f.Value)
			}
			vbios, err := report.VBIOS()
			driver, _ := report.Text(spdm.DriverVersion)
			for name, pair := range map[string][2]any{
				"blocks":         {len(report.Measurements), want.NumberOfBlocks},
				"record":         {len(report.Measurements) * 55, want.RecordLength},
				"opaque length":  {opaque, want.OpaqueLength},
				"opaque order":   {fmt.Sprint(order), fmt.Sprint(want.OpaqueOrder)},
				"nonce":          {hex.EncodeToString(report.Nonce[:]), want.RequestNonce},
				"response nonce": {hex.EncodeToString(report.ResponderNonce[:]), want.ResponseNonce},
				"padding":        {report.Padded, want.TrailingZeroBytes == 1},
				"driver":         {driver, want.Driver},
				"VBIOS":          {vbios, want.VBIOS},
				"NVDEC0":         {hexField(spdm.NVDEC0Status), want.NVDEC0},
				"PPCIE":          {hexField(spdm.PPCIEStatus), want.PPCIE},
				"feature flag":   {hexField(spdm.FeatureFlag), want.FeatureFlag},
				"JSON's nonce":   {want.JSONNonceMatches == nil || *want.JSONNonceMatches == (jsonNonce == want.RequestNonce), true},
			} {
				if pair[0] != pair[1] {
					t.Errorf("%s: %v, want %v", name, pair[0], pair[1])
				}
			}
			checkChain(t, want, report, pem)
			checkIDs(t, want)
			skip := -1
			if want.NVDEC0 == "55" {
				skip = 35
			}
			for file, indices := range want.RIMs {
				r, err := rim.Parse(readVector(t, file))
				if err != nil {
					t.Fatal(err)
				}
				var got []int
				for _, m := range gpu.Compare(report.Measurements, r, gpu.Driver, skip) {
					got = append(got, m.Index)
				}
				if !slices.Equal(got, indices) {
					t.Errorf("against %s differ %v, want %v", file, got, indices)
				}
			}
		})
	}
}

func checkChain(t *testing.T, want row, report *spdm.Report, pem []byte) {
	t.Helper()
	chain, err := certs.ParsePEM(pem)
	if err != nil || len(chain) != want.NCerts {
		t.Fatalf("%d certificates, want %d: %v", len(chain), want.NCerts, err)
	}
	if err := report.VerifySignature(chain[0].PublicKey.(*ecdsa.PublicKey)); (err == nil) != want.Signature {
		t.Errorf("signature: %v, want %t", err, want.Signature)
	}
	at := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	_, err = certs.VerifyDevice(chain, certs.DeviceRoot(), at)
	if (err == nil) != want.ChainStructuralFiveCertsRootPinned {
		t.Errorf("chain: %v, want %t", err, want.ChainStructuralFiveCertsRootPinned)
	}
	// Go's own path building is laxer; what we accept it must accept.
	roots, others := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(certs.DeviceRoot())
	for _, c := range chain[1:] {
		others.AddCert(c)
	}
	_, goErr := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: others, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if (goErr == nil) != (want.ChainVerifyNow == "ok") || err == nil && goErr != nil {
		t.Errorf("Go's path building: %v, want %s", goErr, want.ChainVerifyNow)
	}
	fwid, err := certs.FWID(chain[0])
	named, inReport := report.Field(spdm.FWID)
	got := "mismatch"
	switch {
	case err != nil:
		got = "no-extension"
	case !inReport:
		got = "absent-in-report"
	case bytes.Equal(named, fwid[:]):
		got = "match"
	}
	if got != want.FWID {
		t.Errorf("FWID: %s, want %s", got, want.FWID)
	}
}

// noRIMs has no RIM, and remembers what it was asked for.
type noRIMs struct{ asked []string }

func (n *noRIMs) RIMs(_ context.Context, id string) ([]rim.File, error) {
	n.asked = append(n.asked, id)
	return nil, rim.ErrNotFound
}

func checkIDs(t *testing.T, want row) {
	t.Helper()
	if !want.Signature || !want.ChainStructuralFiveCertsRootPinned || want.Kind != "gpu" {
		return
	}
	evidence, nonce := want.evidence(t)
	r, err := verifier(&noRIMs{}, "2026-11-01").Verify(t.Context(), evidence, nonce)
	if gpu.CodeOf(err) != "driver-rim-missing" || r.DriverRIM.ID != want.DriverRIMID || r.VBIOSRIM.ID != want.VBIOSRIMID {
		t.Errorf("RIMs %s and %s, want %s and %s: %v", r.DriverRIM.ID, r.VBIOSRIM.ID, want.DriverRIMID, want.VBIOSRIMID, err)
	}
}

func verifier(rims rim.Source, date string) *gpu.Verifier {
	at, err := time.Parse(time.DateOnly, date)
	if err != nil {
		panic(err)
	}
	return &gpu.Verifier{
		DeviceRoot: certs.DeviceRoot(), RIMRoot: certs.RIMRoot(), RIMs: rims, Now: func() time.Time { return at },
		Policy: gpu.Policy{OCSP: gpu.OCSPOff, AllowMissingFWID: true, AllowPPCIE: true},
	}
}

// fileRIMs is RIMs by id.
type fileRIMs map[string][]string

func (f fileRIMs) RIMs(_ context.Context, id string) (files []rim.File, err error) {
	for _, name := range f[id] {
		file, err := rim.ReadFile(filepath.Join(vectors, name))
		if err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	if files == nil {
		err = rim.ErrNotFound
	}
	return files, err
}

// TestVectorVerdicts puts every sample through all checks at a time at which its
// RIMs are valid.
func TestVectorVerdicts(t *testing.T) {
	const (
		driver545  = "NV_GPU_DRIVER_GH100_545.00"
		vbios5E01  = "NV_GPU_VBIOS_1010_0200_882_96005E0001"
		vbios5E04  = "NV_GPU_VBIOS_1010_0205_862_96005E0004"
		switchBIOS = "NV_SWITCH_BIOS_5612_0002_890_9610550001"

		testDriver = "nvtrust-08a50685e/Driver_RIM_test_no_gpu.swidtag"
		testVBIOS  = "nvtrust-08a50685e/1010_0200_882_96005E0001_test_no_gpu.swidtag"
		prodVBIOS  = "nvtrust-08a50685e/1010_0200_882_96005E0001_PROD.swidtag"
	)
	rows := map[string]row{}
	for _, r := range readRows(t) {
		rows[r.Name] = r
	}
	seen := map[string]bool{}
	for _, m := range []struct {
		row, date string
		rims      fileRIMs
		policy    func(*gpu.Policy)
		code      gpu.Code
		indices   []int
	}{
		{row: "golden", date: "2024-06-01", rims: fileRIMs{driver545: {testDriver}, vbios5E01: {testVBIOS}}},
		{row: "golden", date: "2024-06-01", rims: fileRIMs{driver545: {testDriver}, vbios5E01: {prodVBIOS, testVBIOS}}},
		{row: "golden", date: "2024-06-01", rims: fileRIMs{driver545: {testDriver}, vbios5E01: {prodVBIOS}}, code: "measurement-mismatch", indices: []int{1, 2, 3, 9}},
		{row: "golden", date: "2024-06-01", rims: fileRIMs{driver545: {testVBIOS}, vbios5E01: {testDriver}}, code: "driver-rim-version"},
		{row: "golden", date: "2024-06-01", rims: fileRIMs{driver545: {"nvtrust-head/rims/g520_0200_885_9600740001_PROD.swidtag"}}, code: "driver-rim-version"},
		{row: "golden", date: "2026-11-22", rims: fileRIMs{driver545: {testDriver}, vbios5E01: {testVBIOS}}, code: "driver-rim-expired"},
		{row: "golden", date: "2023-06-01", rims: fileRIMs{driver545: {testDriver}, vbios5E01: {testVBIOS}}, code: "driver-rim-expired"},
		{row: "golden", date: "2024-06-01", policy: func(p *gpu.Policy) { p.AllowMissingFWID = false }, code: "fwid-missing"},
		{row: "sdk-hopper", date: "2026-11-01", rims: fileRIMs{"NV_GPU_DRIVER_GH100_535.86.09": {"attestation-sdk/rims/NV_GPU_DRIVER_GH100_535.86.09_measurement_mismatch.xml"}}, code: "driver-rim-digest"},
		{row: "sdk-hopper-expired-rim", date: "2025-01-01", rims: fileRIMs{"NV_GPU_DRIVER_GH100_570.124.03": {"attestation-sdk/rims/NV_GPU_DRIVER_GH100_570.124.03_expired.xml"}, vbios5E04: {"nvtrust-head/rims/1010_0205_862_96005E0004_PROD.swidtag"}}, code: "driver-rim-digest"},
		{row: "sdk-blackwell", date: "2026-11-01", rims: fileRIMs{"NV_GPU_CC_DRIVER_GB100_575.32": {"attestation-sdk/rims/incorrect_cert_chain_driver_rim.xml"}}, code: "driver-rim-version"},
		{row: "nvtrust-head", date: "2026-11-01", code: "driver-rim-missing"},
		{row: "trustee-chain-case1", date: "2026-11-01", code: "driver-rim-missing"},
		{row: "trustee-chain-case2-root-only", date: "2026-11-01", code: "chain-structure"},
		{row: "trustee-chain-case3-missing-intermediate", date: "2026-11-01", code: "chain-structure"},
		{row: "sdk-switch", date: "2026-11-01", rims: fileRIMs{switchBIOS: {"attestation-sdk/rims/switchVBIOSRim_NV_SWITCH_BIOS_5612_0002_890_9610550001.xml"}}},
		{row: "sdk-switch", date: "2026-04-01", rims: fileRIMs{switchBIOS: {"attestation-sdk/rims/NV_SWITCH_BIOS_5612_0002_890_9610550001_invalid_signature.xml"}}, code: "vbios-rim-digest"},
		{row: "sdk-switch-bad-signature", date: "2026-11-01", code: "report-signature"},
		{row: "evidence_hopper_590_12.json[0]", date: "2026-11-01", code: "driver-rim-missing"},
		{row: "evidence_hopper_590_12.json[0]", date: "2026-11-01", policy: func(p *gpu.Policy) { p.AllowPPCIE = false }, code: "report-mode"},
		{row: "hopper_evidence.json[0]", date: "2026-11-01", policy: func(p *gpu.Policy) { p.AllowPPCIE = false }, code: "report-mode"},
		{row: "hopper_evidence_cert_hold.json[0]", date: "2026-11-01", code: "driver-rim-missing"},
		{row: "multi_switch_ls10.json[0]", date: "2026-11-01", code: "vbios-rim-missing"},
		{row: "multi_switch_ls10.json[1]", date: "2026-11-01", code: "vbios-rim-missing"},
		{row: "multi_switch_ls10.json[2]", date: "2026-11-01", code: "vbios-rim-missing"},
		{row: "multi_switch_ls10.json[3]", date: "2026-11-01", code: "vbios-rim-missing"},
		{row: "switch_evidence_ls10.json[0]", date: "2026-11-01", rims: fileRIMs{switchBIOS: {"attestation-sdk/rims/switchVBIOSRim_NV_SWITCH_BIOS_5612_0002_890_9610550001.xml"}}},
	} {
		seen[m.row] = true
		t.Run(m.row+" "+m.date+" "+string(m.code), func(t *testing.T) {
			r, ok := rows[m.row]
			if !ok {
				t.Fatal("no such row")
			}
			v := verifier(m.rims, m.date)
			if m.policy != nil {
				m.policy(&v.Policy)
			}
			evidence, nonce := r.evidence(t)
			result, err := v.Verify(t.Context(), evidence, nonce)
			if got := gpu.CodeOf(err); got != m.code || result.Verified != (m.code == "") {
				t.Fatalf("code %q, want %q: %v", got, m.code, err)
			}
			var indices []int
			for _, mismatch := range result.Mismatches {
				indices = append(indices, mismatch.Index)
			}
			if !slices.Equal(indices, m.indices) {
				t.Errorf("mismatches %v, want %v", indices, m.indices)
			}
		})
	}
	for name := range rows {
		if !seen[name] {
			t.Errorf("no verdict is tested for %s", name)
		}
	}
}

// TestNRASClaims compares our claims with those NVIDIA's service gave for the same
// report, as far as they do not depend on RIMs that only the service has.
func TestNRASClaims(t *testing.T) {
	needVectors(t)
	var nras map[string]map[string]any
	if err := json.Unmarshal(readVector(t, "attestation-sdk/eat/hopperClaimsv3_decoded.json"), &nras); err != nil {
		t.Fatal(err)
	}
	want := nras["GPU-0"]
	for _, r := range readRows(t) {
		if r.Name != "nvtrust-head" {
			continue
		}
		evidence, nonce := r.evidence(t)
		result, _ := verifier(&noRIMs{}, "2025-06-11").Verify(t.Context(), evidence, nonce)
		claims := result.Claims()
		for _, name := range []string{
			"ueid", "hwmodel", "eat_nonce", "x-nvidia-gpu-driver-version", "x-nvidia-gpu-vbios-version", "x-nvidia-gpu-arch-check",
			"x-nvidia-gpu-attestation-report-parsed", "x-nvidia-gpu-attestation-report-nonce-match",
			"x-nvidia-gpu-attestation-report-signature-verified", "x-nvidia-gpu-attestation-report-cert-chain-fwid-match",
		} {
			if claims[name] != want[name] {
				t.Errorf("claim %s is %v, NRAS says %v", name, claims[name], want[name])
			}
		}
		for name := range want {
			if _, ok := claims[name]; !ok && !slices.Contains([]string{"iss", "iat", "exp", "nbf", "jti"}, name) {
				t.Errorf("NRAS has the claim %s, we have not", name)
			}
		}
		return
	}
	t.Error("expected.json has no row nvtrust-head")
}

// TestGoldenFlips flips a bit of every byte of a golden report and cuts it
// everywhere. Nothing but the original may pass.
func TestGoldenFlips(t *testing.T) {
	rows := readRows(t)
	evidence, nonce := rows[0].evidence(t)
	v := verifier(fileRIMs{
		rows[0].DriverRIMID: {"nvtrust-08a50685e/Driver_RIM_test_no_gpu.swidtag"},
		rows[0].VBIOSRIMID:  {"nvtrust-08a50685e/1010_0200_882_96005E0001_test_no_gpu.swidtag"},
	}, "2024-06-01")
	if _, err := v.Verify(t.Context(), evidence, nonce); err != nil {
		t.Fatal(err)
	}
	noneAccepted(t, v, evidence, nonce)
}

// noneAccepted fails where a report with a flipped bit, or a piece of it, passes.
func noneAccepted(t *testing.T, v *gpu.Verifier, evidence gpu.Evidence, nonce [32]byte) {
	t.Helper()
	good := evidence.Report
	codes := map[gpu.Code]int{}
	for i := range good {
		bad := slices.Clone(good)
		bad[i] ^= 1
		evidence.Report = bad
		_, err := v.Verify(t.Context(), evidence, nonce)
		codes[gpu.CodeOf(err)]++
	}
	for i := range good {
		evidence.Report = good[:i]
		_, err := v.Verify(t.Context(), evidence, nonce)
		if err == nil {
			t.Errorf("a report of %d of %d bytes was accepted", i, len(good))
		}
	}
	if codes[""] > 0 || len(codes) < 3 {
		t.Errorf("of %d flips these were found: %v", len(good), codes)
	}
	t.Logf("%d flips: %v", len(good), codes)
}
