package cvm

import (
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"

	"coffer/hostbuild/bundle"
	"coffer/internal/snp/idblock"
)

// readIDKey reads the owner's key; without a path there is none.
func readIDKey(path string) (*ecdsa.PrivateKey, error) {
	if path == "" {
		return nil, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("id_key: %w", err)
	}
	defer clear(b)
	key, err := idblock.ParseKey(b)
	if err != nil {
		return nil, fmt.Errorf("id_key %s: %w; `openssl ecparam -name secp384r1 -genkey -noout` makes one", path, err)
	}
	return key, nil
}

// signShapes signs an ID block for each launch digest of m, and notes in m what
// reports will hold. Without a key it does nothing.
func signShapes(m *bundle.Manifest, keyFile string) ([]bundle.SignedIDBlock, error) {
	key, err := readIDKey(keyFile)
	if key == nil || err != nil {
		return nil, err
	}
	digest, err := idblock.KeyDigest(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	b := idblock.Block{Policy: bundle.GuestPolicy}
	copy(b.ImageID[:], m.CVMID)
	m.IDBlock = &bundle.IDBlock{KeyDigest: hex.EncodeToString(digest[:]), ImageID: hex.EncodeToString(b.ImageID[:])}
	var out []bundle.SignedIDBlock
	for _, d := range m.LaunchDigests {
		if n, err := hex.Decode(b.LaunchDigest[:], []byte(d.Digest)); err != nil || n != len(b.LaunchDigest) {
			return nil, fmt.Errorf("launch digest %q is none", d.Digest)
		}
		block, auth, err := idblock.Sign(b, key)
		if err != nil {
			return nil, err
		}
		out = append(out, bundle.SignedIDBlock{CPU: d.CPU, VCPUs: d.VCPUs,
			Block: base64.StdEncoding.EncodeToString(block), Auth: base64.StdEncoding.EncodeToString(auth)})
	}
	return out, nil
}
