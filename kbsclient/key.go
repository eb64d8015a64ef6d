package kbsclient

import (
	"crypto"
	"crypto/aes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"

	josecipher "github.com/go-jose/go-jose/v4/cipher"
)

var b64url = base64.RawURLEncoding.Strict()

// teeKey is the key of a handshake: the KBS encrypts resources to it.
type teeKey interface {
	// alg is the only JWE algorithm accepted with this key.
	alg() string
	// public is the tee-pubkey with exactly the members that the KBS hashes.
	public() object
	// unwrap decrypts the content key of a JWE.
	unwrap(h *jweHeader, encryptedKey []byte) ([]byte, error)
	wipe()
}

// ecKey is a P-256 key. It keeps the scalar instead of an ecdh.PrivateKey, which
// cannot be wiped.
type ecKey struct {
	scalar [32]byte
	x, y   [32]byte
}

const algEC = "ECDH-ES+A256KW"

func generateECKey(random io.Reader) (*ecKey, error) {
	var scalar [32]byte
	defer clear(scalar[:])
	for range 64 { // a scalar out of range is a matter of 1 in 2^32
		if _, err := io.ReadFull(random, scalar[:]); err != nil {
			return nil, fmt.Errorf("random bytes for the handshake's key: %w", err)
		}
		if k, err := newECKey(scalar[:]); err == nil {
			return k, nil
		}
	}
	return nil, errors.New("the random source gives no key")
}

func newECKey(scalar []byte) (*ecKey, error) {
	priv, err := ecdh.P256().NewPrivateKey(scalar)
	if err != nil {
		return nil, err
	}
	k := &ecKey{}
	copy(k.scalar[:], scalar)
	point := priv.PublicKey().Bytes() // 4 || x || y
	copy(k.x[:], point[1:33])
	copy(k.y[:], point[33:])
	return k, nil
}

func (k *ecKey) alg() string { return algEC }

func (k *ecKey) public() object {
	return object{
		"alg": algEC, "crv": "P-256", "kty": "EC",
		"x": b64url.EncodeToString(k.x[:]), "y": b64url.EncodeToString(k.y[:]),
	}
}

// unwrap is ECDH-ES with the Concat KDF (RFC 7518, 4.6) and AES key wrap.
func (k *ecKey) unwrap(h *jweHeader, encryptedKey []byte) ([]byte, error) {
	point, err := h.EPK.point()
	if err != nil {
		return nil, err
	}
	peer, err := ecdh.P256().NewPublicKey(point)
	if err != nil {
		return nil, fmt.Errorf("epk: %w", err)
	}
	priv, err := ecdh.P256().NewPrivateKey(k.scalar[:])
	if err != nil {
		return nil, errors.New("the session is closed")
	}
	z, err := priv.ECDH(peer)
	if err != nil {
		return nil, err
	}
	defer clear(z)
	kek := concatKDF(z)
	defer clear(kek)
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	return josecipher.KeyUnwrap(block, encryptedKey)
}

// concatKDF derives the 256-bit key that wraps the content key. Trustee sends
// neither apu nor apv.
func concatKDF(z []byte) []byte {
	prefixed := func(s string) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
	}
	kek := make([]byte, 32)
	kdf := josecipher.NewConcatKDF(crypto.SHA256, z, prefixed(algEC), prefixed(""), prefixed(""),
		binary.BigEndian.AppendUint32(nil, 256), nil)
	_, _ = io.ReadFull(kdf, kek) // never fails
	return kek
}

func (k *ecKey) wipe() { clear(k.scalar[:]) }

const algRSA = "RSA-OAEP-256"

// rsaKey exists for Trustee's own tool, which takes such keys from files.
type rsaKey struct{ *rsa.PrivateKey }

func (k rsaKey) alg() string { return algRSA }

func (k rsaKey) public() object {
	return object{
		"alg": algRSA, "kty": "RSA",
		"n": b64url.EncodeToString(k.N.Bytes()), "e": b64url.EncodeToString(big.NewInt(int64(k.E)).Bytes()),
	}
}

func (k rsaKey) unwrap(_ *jweHeader, encryptedKey []byte) ([]byte, error) {
	return rsa.DecryptOAEP(sha256.New(), nil, k.PrivateKey, encryptedKey, nil)
}

func (rsaKey) wipe() {}

// TEEKey is a handshake key that the caller keeps, to present a session's token
// later or in another process.
type TEEKey struct{ key teeKey }

// ParseTEEKey reads a P-256 key in PKCS#8 PEM or an RSA key in PKCS#1 PEM.
func ParseTEEKey(text []byte) (*TEEKey, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("TEE key: no PEM block found")
	}
	defer clear(block.Bytes)
	switch block.Type {
	case "RSA PRIVATE KEY":
		key, err := x509.ParsePKCS1PrivateKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("TEE key: %w", err)
		}
		return &TEEKey{rsaKey{key}}, nil
	case "PRIVATE KEY":
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("TEE key: %w", err)
		}
		ec, ok := key.(*ecdsa.PrivateKey)
		if !ok || ec.Curve != elliptic.P256() {
			return nil, errors.New("TEE key: in PKCS#8 only P-256 keys are known")
		}
		scalar, err := ec.Bytes()
		if err != nil {
			return nil, fmt.Errorf("TEE key: %w", err)
		}
		defer clear(scalar)
		k, err := newECKey(scalar)
		if err != nil {
			return nil, fmt.Errorf("TEE key: %w", err)
		}
		return &TEEKey{k}, nil
	}
	return nil, fmt.Errorf("TEE key: PEM block %q; want PRIVATE KEY (P-256) or RSA PRIVATE KEY", block.Type)
}
