package idblock

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
)

func newKey(t testing.TB, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func littleEndian(b []byte) *big.Int {
	b = bytes.Clone(b)
	slices.Reverse(b)
	return new(big.Int).SetBytes(b)
}

func TestSign(t *testing.T) {
	key := newKey(t, elliptic.P384())
	b := Block{LaunchDigest: [48]byte{1, 2}, FamilyID: [16]byte{3}, ImageID: [16]byte{4}, GuestSVN: 5, Policy: 0x30000}
	block, auth, err := Sign(b, key)
	if err != nil {
		t.Fatal(err)
	}
	want, err := hex.DecodeString("0102" + zeros(46) + "03" + zeros(15) + "04" + zeros(15) + "01000000" + "05000000" + "0000030000000000")
	if err != nil || !bytes.Equal(block, want) {
		t.Errorf("block %x, want %x", block, want)
	}
	if len(block) != Size || len(auth) != AuthSize {
		t.Fatalf("%d and %d bytes", len(block), len(auth))
	}
	digest := sha512.Sum384(block)
	if !ecdsa.Verify(&key.PublicKey, digest[:], littleEndian(auth[0x40:0x88]), littleEndian(auth[0x88:0xd0])) {
		t.Error("the signature at 0x40 is not the key's")
	}
	id := auth[0x240:][:1028]
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	if id[0] != 2 || littleEndian(id[4:76]).Cmp(new(big.Int).SetBytes(point[1:49])) != 0 || littleEndian(id[76:148]).Cmp(new(big.Int).SetBytes(point[49:])) != 0 {
		t.Error("the key at 0x240 is not the signer's")
	}
	if d, err := KeyDigest(&key.PublicKey); err != nil || d != sha512.Sum384(id) {
		t.Errorf("KeyDigest %x, %v", d, err)
	}
	if !bytes.Equal(auth[0x680:], make([]byte, AuthSize-0x680)) {
		t.Error("there is an author key")
	}
	if _, again, err := Sign(b, key); err != nil || !bytes.Equal(auth, again) {
		t.Error("a second signature differs")
	}
	if _, _, err := Sign(b, newKey(t, elliptic.P256())); !errors.Is(err, ErrKey) {
		t.Errorf("P-256: %v", err)
	}
}

func zeros(n int) string { return hex.EncodeToString(make([]byte, n)) }

func TestParseKey(t *testing.T) {
	key := newKey(t, elliptic.P384())
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, b []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}) }
	pkcs8 := func(key any) []byte {
		b, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return block("PRIVATE KEY", b)
	}
	_, other, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"PKCS#8":          pkcs8(key),
		"SEC 1":           block("EC PRIVATE KEY", sec1),
		"openssl ecparam": append(block("EC PARAMETERS", []byte{6, 5, 0x2b, 0x81, 4, 0, 0x22}), block("EC PRIVATE KEY", sec1)...),
	} {
		if got, err := ParseKey(data); err != nil || !got.Equal(key) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, data := range map[string][]byte{
		"nothing":         nil,
		"P-256":           pkcs8(newKey(t, elliptic.P256())),
		"Ed25519":         pkcs8(other),
		"broken":          block("PRIVATE KEY", []byte("x")),
		"parameters only": block("EC PARAMETERS", []byte{6}),
	} {
		if _, err := ParseKey(data); !errors.Is(err, ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := ParseKey(b); err != nil && !errors.Is(err, ErrKey) {
			t.Errorf("untyped error %v", err)
		}
	})
}

// sev-snp-measure's snp-create-id-block makes the same block, key and digest. It
// insists on an author key, which we leave out.
func TestOracleSnpCreateIDBlock(t *testing.T) {
	tool, err := exec.LookPath("snp-create-id-block")
	if err != nil {
		t.Skip("optional (make test-oracles): snp-create-id-block of sev-snp-measure is not installed")
	}
	key := newKey(t, elliptic.P384())
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "id.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	b := Block{Policy: 0x30000}
	rand.Read(b.LaunchDigest[:])
	out, err := exec.CommandContext(t.Context(), tool, "--measurement", base64.StdEncoding.EncodeToString(b.LaunchDigest[:]), "--idkey", file, "--authorkey", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	field := func(re string) []byte {
		m := regexp.MustCompile(re + `([A-Za-z0-9+/=]+)`).FindSubmatch(out)
		if m == nil {
			t.Fatalf("no %s in %s", re, out)
		}
		v, err := base64.StdEncoding.DecodeString(string(m[1]))
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	block, auth, err := Sign(b, key)
	if err != nil {
		t.Fatal(err)
	}
	theirs := field("id-auth=")
	if !bytes.Equal(block, field("id-block=")) || len(theirs) != len(auth) {
		t.Errorf("block %x; their auth has %d bytes", block, len(theirs))
	}
	if !bytes.Equal(auth[:0x40], theirs[:0x40]) || !bytes.Equal(auth[0x240:0x680], theirs[0x240:0x680]) {
		t.Error("head or key differ")
	}
	digest := sha512.Sum384(block)
	if !ecdsa.Verify(&key.PublicKey, digest[:], littleEndian(theirs[0x40:0x88]), littleEndian(theirs[0x88:0xd0])) {
		t.Error("their signature does not stand where ours does")
	}
	if d, _ := KeyDigest(&key.PublicKey); !bytes.Equal(d[:], field("id_key_hash: ")) {
		t.Errorf("key digest %x", d)
	}
}
