package kbsclient

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"reflect"
	"testing"
)

// vectors are digests and messages that a running Trustee agreed with.
type vectors struct {
	TEEPrivateD  string `json:"tee_private_d_hex"`
	Nonce        string
	UpstreamUnit struct{ Canonical, SHA384 string } `json:"upstream_unit_vector"`
	Device       struct {
		Canonical, SHA384 string
		NvidiaNonce       string `json:"nvidia_spdm_nonce_hex"`
		SampleDevice      string `json:"sampledevice_report_data_b64"`
	}
	PrimaryNoDevices struct {
		Canonical, SHA384 string
		SNP               string          `json:"snp_report_data_hex"`
		Sample            string          `json:"sample_report_data_b64"`
		Body              json.RawMessage `json:"sample_attest_body"`
	} `json:"primary_no_devices"`
	PrimaryWithDevice struct {
		Additional        string `json:"additional_evidence"`
		Canonical, SHA384 string
		Sample            string `json:"sample_report_data_b64"`
	} `json:"primary_with_sampledevice"`
	InitData struct {
		TOML, SHA384 string
		HostData     string `json:"snp_host_data_hex"`
	} `json:"init_data"`
	JWE struct {
		ProtectedJSON string `json:"protected_json"`
		Z, KEK, CEK   string
		Response      json.RawMessage
		Plaintext     string
	}
	AdminJWT struct{ JWT string } `json:"admin_jwt"`
}

func loadVectors(t testing.TB) *vectors {
	t.Helper()
	text, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	v := &vectors{}
	if err := json.Unmarshal(text, v); err != nil {
		t.Fatal(err)
	}
	return v
}

func (v *vectors) key(t testing.TB) *ecKey {
	t.Helper()
	k, err := newECKey(unhex(t, v.TEEPrivateD))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestCanonicalVectors(t *testing.T) {
	v := loadVectors(t)
	pub := v.key(t).public()
	for _, tc := range []struct {
		name              string
		data              object
		canonical, sha384 string
	}{
		{"device", object{"nonce": v.Nonce, "tee-pubkey": pub}, v.Device.Canonical, v.Device.SHA384},
		{"primary", object{"additional-evidence": "", "nonce": v.Nonce, "tee-pubkey": pub},
			v.PrimaryNoDevices.Canonical, v.PrimaryNoDevices.SHA384},
		{"primary with device", object{"additional-evidence": v.PrimaryWithDevice.Additional, "nonce": v.Nonce, "tee-pubkey": pub},
			v.PrimaryWithDevice.Canonical, v.PrimaryWithDevice.SHA384},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := appendCanonical(nil, tc.data)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != tc.canonical {
				t.Errorf("canonical form\n got %s\nwant %s", got, tc.canonical)
			}
			sum, err := digest(tc.data)
			if err != nil {
				t.Fatal(err)
			}
			if hex.EncodeToString(sum[:]) != tc.sha384 {
				t.Errorf("digest %x, want %s", sum, tc.sha384)
			}
		})
	}
	// Trustee's own unit test has a number, which our encoder refuses.
	if sum := sha512.Sum384([]byte(v.UpstreamUnit.Canonical)); hex.EncodeToString(sum[:]) != v.UpstreamUnit.SHA384 {
		t.Error("upstream's unit vector does not hash to its digest")
	}
	if _, err := appendCanonical(nil, object{"b": 1}); err == nil {
		t.Error("a number was encoded")
	}
}

func TestReportDataVectors(t *testing.T) {
	v := loadVectors(t)
	pub := v.key(t).public()
	device, err := deviceDigest(v.Nonce, pub)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(device[:32]); got != v.Device.NvidiaNonce {
		t.Errorf("SPDM nonce %s, want %s", got, v.Device.NvidiaNonce)
	}
	if got := base64.StdEncoding.EncodeToString(device[:]); got != v.Device.SampleDevice {
		t.Errorf("sampledevice report_data %s, want %s", got, v.Device.SampleDevice)
	}
	primary, err := primaryDigest("", v.Nonce, pub)
	if err != nil {
		t.Fatal(err)
	}
	var padded [64]byte
	copy(padded[:], primary[:])
	if got := hex.EncodeToString(padded[:]); got != v.PrimaryNoDevices.SNP {
		t.Errorf("SNP report_data %s, want %s", got, v.PrimaryNoDevices.SNP)
	}
	composite, err := primaryDigest(v.PrimaryWithDevice.Additional, v.Nonce, pub)
	if err != nil {
		t.Fatal(err)
	}
	if got := base64.StdEncoding.EncodeToString(composite[:]); got != v.PrimaryWithDevice.Sample {
		t.Errorf("composite report_data %s, want %s", got, v.PrimaryWithDevice.Sample)
	}
}

func TestAttestBodyVector(t *testing.T) {
	v := loadVectors(t)
	var req attestRequest
	req.RuntimeData.Nonce, req.RuntimeData.TEEPubKey = v.Nonce, v.key(t).public()
	req.TEEEvidence.Primary = json.RawMessage(`{"svn":"1","report_data":"` + v.PrimaryNoDevices.Sample + `"}`)
	body, err := json.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := generic(t, body), generic(t, v.PrimaryNoDevices.Body); !reflect.DeepEqual(got, want) {
		t.Errorf("body\n got %s\nwant %s", body, v.PrimaryNoDevices.Body)
	}
}

func generic(t testing.TB, text []byte) (v any) {
	t.Helper()
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestJWEVector(t *testing.T) {
	v := loadVectors(t)
	key := v.key(t)
	if kek := concatKDF(unhex(t, v.JWE.Z)); hex.EncodeToString(kek) != v.JWE.KEK {
		t.Errorf("KEK %x, want %s", kek, v.JWE.KEK)
	}
	var m jwe
	if err := json.Unmarshal(v.JWE.Response, &m); err != nil {
		t.Fatal(err)
	}
	header, err := parseJWEHeader(m.Protected)
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := b64url.DecodeString(m.EncryptedKey)
	if err != nil {
		t.Fatal(err)
	}
	cek, err := key.unwrap(header, wrapped)
	if err != nil {
		t.Fatal(err)
	}
	if hex.EncodeToString(cek) != v.JWE.CEK {
		t.Errorf("CEK %x, want %s", cek, v.JWE.CEK)
	}
	plain, err := decryptJWE(v.JWE.Response, key)
	if err != nil {
		t.Fatal(err)
	}
	if string(plain) != v.JWE.Plaintext {
		t.Errorf("plaintext %q, want %q", plain, v.JWE.Plaintext)
	}
	key.wipe()
	if _, err := decryptJWE(v.JWE.Response, key); err == nil {
		t.Error("a wiped key decrypts")
	}
}

func TestHostDataVector(t *testing.T) {
	v := loadVectors(t)
	got, err := HostData("sha384", v.InitData.TOML)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:], unhex(t, v.InitData.HostData)) {
		t.Errorf("HOST_DATA %x, want %s", got, v.InitData.HostData)
	}
	if _, err := HostData("md5", v.InitData.TOML); err == nil {
		t.Error("md5 accepted")
	}
}

// Ed25519 is deterministic: the token of Trustee's own tool comes out byte for byte.
func TestAdminTokenVector(t *testing.T) {
	v := loadVectors(t)
	seed := sha256.Sum256([]byte("admin"))
	token, err := signToken(ed25519.NewKeyFromSeed(seed[:]),
		adminClaims{IssuedAt: 1763839000, Expires: 1763846200, NotBefore: 1763839000})
	if err != nil {
		t.Fatal(err)
	}
	if token != v.AdminJWT.JWT {
		t.Errorf("token %s, want %s", token, v.AdminJWT.JWT)
	}
}
