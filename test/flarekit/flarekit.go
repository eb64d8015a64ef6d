// Package flarekit makes startup kits in the form of `nvflare provision` 2.9.0,
// for tests without the real package. `make test-nvflare` has the real one.
package flarekit

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// Kit says what a kit is like.
type Kit struct {
	Role        string            // "server" (default) or "client"
	Authorizers map[string]string // id to class; nil: snp_authorizer alone
	NoCC        bool              // as after a wrong compute_env
	SignFirst   bool              // SignatureBuilder before CCBuilder, as the deployment guide has it
}

// SNP is the class of the CPU's authorizer, GPU that of the GPU's.
const (
	SNP = "nvflare.app_opt.confidential_computing.snp_authorizer.SNPAuthorizer"
	GPU = "nvflare.app_opt.confidential_computing.gpu_authorizer.GPUAuthorizer"
)

// Make makes a kit in the folder dir, which must not be there.
func (k Kit) Make(dir string) error {
	if k.Role == "" {
		k.Role = "server"
	}
	if k.Authorizers == nil {
		k.Authorizers = map[string]string{"snp_authorizer": SNP}
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	root, err := certificate(key)
	if err != nil {
		return err
	}
	for _, d := range []string{"local", "startup", "transfer"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	files := []struct {
		name string
		mode fs.FileMode
		text string
	}{
		{"readme.txt", 0o644, "A kit.\n"},
		{"local/resources.json.default", 0o644, "{}\n"},
		{"startup/fed_" + k.Role + ".json", 0o644, `{"format_version": 2, "servers": [{"service": {"target": "server1:8002"}}]}` + "\n"},
		{"startup/rootCA.pem", 0o644, root},
		{"startup/" + k.Role + ".key", 0o600, "not a key\n"},
		{"startup/sub_start.sh", 0o755, "#!/usr/bin/env bash\n"},
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f.name), []byte(f.text), f.mode); err != nil {
			return err
		}
	}
	steps := []func() error{func() error { return k.addCC(dir) }, func() error { return Sign(dir, key) }}
	if k.SignFirst {
		steps[0], steps[1] = steps[1], steps[0]
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (k Kit) addCC(dir string) error {
	if k.NoCC {
		return nil
	}
	component := func(id, class string, args any) error {
		b, err := json.MarshalIndent(map[string]any{"components": []any{map[string]any{"id": id, "path": class, "args": args}}}, "", "  ")
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, "local", id+"__p_resources.json"), b, 0o644)
	}
	verifiers := []string{}
	for id, class := range k.Authorizers {
		verifiers = append(verifiers, id)
		if err := component(id, class, map[string]any{}); err != nil {
			return err
		}
	}
	return component("cc_manager", "nvflare.app_opt.confidential_computing.cc_manager.CCManager", map[string]any{"cc_verifier_ids": verifiers, "verify_frequency": 120})
}

func certificate(key *rsa.PrivateKey) (string, error) {
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "example_project"}, NotAfter: time.Unix(4e9, 0), IsCA: true}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), nil
}

// Sign writes a signature.json into each folder, as NVFlare's sign_folders does.
func Sign(dir string, key *rsa.PrivateKey) error {
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		entries, err := os.ReadDir(name)
		if err != nil {
			return err
		}
		signatures := map[string]string{}
		for _, e := range entries {
			content := []byte(e.Name())
			if !e.IsDir() {
				if content, err = os.ReadFile(filepath.Join(name, e.Name())); err != nil {
					return err
				}
			}
			sum := sha256.Sum256(content)
			sig, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, sum[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto})
			if err != nil {
				return fmt.Errorf("sign: %w", err)
			}
			signatures[e.Name()] = base64.StdEncoding.EncodeToString(sig)
		}
		b, err := json.Marshal(signatures)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(name, "signature.json"), b, 0o644)
	})
}
