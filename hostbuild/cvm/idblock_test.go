package cvm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coffer/hostbuild/bundle"
	"coffer/internal/snp/idblock"
)

func TestSignShapes(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "id.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	m := &bundle.Manifest{CVMID: "cvm_0123456789ab", LaunchDigests: []bundle.LaunchDigest{
		{CPU: "EPYC-v4", VCPUs: 2, Digest: strings.Repeat("ab", 48)}, {CPU: "EPYC-v4", VCPUs: 1, Digest: strings.Repeat("cd", 48)}}}
	blocks, err := signShapes(m, file)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := idblock.KeyDigest(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if len(blocks) != 2 || m.IDBlock == nil || m.IDBlock.KeyDigest != hex.EncodeToString(digest[:]) || m.IDBlock.ImageID != hex.EncodeToString([]byte(m.CVMID)) {
		t.Fatalf("%d blocks, %+v", len(blocks), m.IDBlock)
	}
	for i, b := range blocks {
		want := idblock.Block{ImageID: [16]byte([]byte(m.CVMID)), Policy: 0x30000}
		hex.Decode(want.LaunchDigest[:], []byte(m.LaunchDigests[i].Digest))
		block, err := base64.StdEncoding.DecodeString(b.Block)
		if err != nil || !bytes.Equal(block, want.Marshal()) || b.VCPUs != m.LaunchDigests[i].VCPUs {
			t.Errorf("%+v: %x, %v", b, block, err)
		}
		if auth, err := base64.StdEncoding.DecodeString(b.Auth); err != nil || len(auth) != idblock.AuthSize {
			t.Errorf("auth of %d bytes, %v", len(auth), err)
		}
	}

	without := &bundle.Manifest{LaunchDigests: m.LaunchDigests}
	if blocks, err := signShapes(without, ""); blocks != nil || err != nil || without.IDBlock != nil {
		t.Errorf("without a key: %v, %v", blocks, err)
	}
	for path, want := range map[string]error{file + "x": os.ErrNotExist, os.DevNull: idblock.ErrKey} {
		if _, err := signShapes(m, path); !errors.Is(err, want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
