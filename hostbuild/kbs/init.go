package kbs

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"coffer/hostbuild/policy"
)

// Files of a server's folder.
const (
	caCertFile     = "ca.pem" // what clients pin
	caKeyFile      = "ca.key"
	serverCertFile = "server.pem"
	serverKeyFile  = "server.key"
	adminKeyFile   = "admin.key" // PKCS#8, Ed25519: signs the tokens of administrators
	adminPubFile   = "admin.pub"
	tokenKeyFile   = "token.key"
	tokenCertFile  = "token.pem"
	sessionKeyFile = "session.key" // made by the first start
	policyFile     = "resource-policy.rego"
	referenceFile  = "reference-values.json"
	repositoryDir  = "repository"
	vcekDir        = "vcek"
)

const (
	caLife     = 10 * 365 * 24 * time.Hour
	serverLife = 2 * 365 * 24 * time.Hour
	// backdate lets a guest whose clock is behind verify a new certificate.
	backdate = 24 * time.Hour
)

// Init makes dir, the folder of a new server: CA, server certificate for
// o.Hosts, admin key, token signer and a policy that denies everything. dir must
// not exist, or be empty. Nothing else in o counts but Now.
func Init(dir string, o Options) error {
	if len(o.Hosts) == 0 {
		return errors.New("kbs init: no host: name the names or IP addresses that clients will use")
	}
	now := time.Now
	if o.Now != nil {
		now = o.Now
	}
	files, err := newFiles(o.Hosts, now())
	if err != nil {
		return fmt.Errorf("kbs init: %w", err)
	}
	if err := install(dir, files); err != nil {
		return fmt.Errorf("kbs init %s: %w", dir, err)
	}
	return nil
}

// install makes dir with files in one step.
func install(dir string, files map[string][]byte) error {
	dir = filepath.Clean(dir)
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".kbs-init-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	for _, sub := range []string{repositoryDir, vcekDir} {
		if err := os.Mkdir(filepath.Join(tmp, sub), 0o700); err != nil {
			return err
		}
	}
	for name, data := range files {
		if err := writeFile(filepath.Join(tmp, name), data); err != nil {
			return err
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) { // os.Remove would take a file, too
		return fmt.Errorf("it is there already, and is not an empty folder: %w", err)
	}
	return os.Rename(tmp, dir)
}

func newFiles(hosts []string, now time.Time) (map[string][]byte, error) {
	caKey, err := newP256()
	if err != nil {
		return nil, err
	}
	ca := &x509.Certificate{
		Subject: pkix.Name{CommonName: "Coffer KBS CA"}, BasicConstraintsValid: true, IsCA: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: now.Add(-backdate), NotAfter: now.Add(caLife),
	}
	server := &x509.Certificate{
		Subject:  pkix.Name{CommonName: hosts[0]},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(serverLife),
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			server.IPAddresses = append(server.IPAddresses, ip)
		} else {
			server.DNSNames = append(server.DNSNames, h)
		}
	}
	// Without a name, the token signer's certificate serves no TLS.
	token := &x509.Certificate{
		Subject:  pkix.Name{CommonName: "Coffer KBS token signer"},
		KeyUsage: x509.KeyUsageDigitalSignature, NotBefore: now.Add(-backdate), NotAfter: now.Add(caLife),
	}
	files := map[string][]byte{policyFile: policy.Render(nil)}
	for _, c := range []struct {
		cert      *x509.Certificate
		certName  string
		keyName   string
		authority bool
	}{{ca, caCertFile, caKeyFile, true}, {server, serverCertFile, serverKeyFile, false}, {token, tokenCertFile, tokenKeyFile, false}} {
		key := caKey
		if !c.authority {
			if key, err = newP256(); err != nil {
				return nil, err
			}
		}
		if c.cert.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
			return nil, err
		}
		der, err := x509.CreateCertificate(rand.Reader, c.cert, ca, key.Public(), caKey)
		if err != nil {
			return nil, err
		}
		files[c.certName] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		if files[c.keyName], err = privatePEM(key); err != nil {
			return nil, err
		}
	}
	pub, admin, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	if files[adminKeyFile], err = privatePEM(admin); err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	files[adminPubFile] = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})
	return files, nil
}

func privatePEM(key any) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// newP256 makes a key whose coordinates have no leading zero byte: Trustee's
// older verifiers refuse every token of such a signer.
func newP256() (*ecdsa.PrivateKey, error) {
	for {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		if x, y, err := coordinates(&key.PublicKey); err != nil {
			return nil, err
		} else if x[0] != 0 && y[0] != 0 {
			return key, nil
		}
	}
}

// coordinates returns x and y of a P-256 key, 32 bytes each.
func coordinates(key *ecdsa.PublicKey) (x, y []byte, err error) {
	b, err := key.Bytes() // 4, x, y
	if err != nil {
		return nil, nil, err
	}
	if len(b) != 65 {
		return nil, nil, errors.New("not a P-256 key")
	}
	return b[1:33], b[33:], nil
}
