package kbs

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"

	josecipher "github.com/go-jose/go-jose/v4/cipher"
)

const (
	algECDH   = "ECDH-ES+A256KW"
	algRSA    = "RSA-OAEP-256"
	maxRSA    = 1024 // bytes of a modulus: 8192 bits
	minRSA    = 256
	cekLength = 32
)

// b64 is the base64 of JOSE.
var b64 = base64.RawURLEncoding.Strict()

// teeKey is the public key to which an answer is encrypted.
type teeKey struct {
	KTY string `json:"kty"`
	ALG string `json:"alg"`
	CRV string `json:"crv,omitempty"`
	X   string `json:"x,omitempty"`
	Y   string `json:"y,omitempty"`
	N   string `json:"n,omitempty"`
	E   string `json:"e,omitempty"`
}

// flattened is a JWE in flattened JSON form.
type flattened struct {
	Protected    string `json:"protected"`
	EncryptedKey string `json:"encrypted_key"`
	IV           string `json:"iv"`
	Ciphertext   string `json:"ciphertext"`
	Tag          string `json:"tag"`
}

// encrypt seals plaintext to the key. The protected header is written by hand:
// Trustee's client decrypts only if its members stand in this very order (alg,
// enc, then by name), because it rebuilds the header to authenticate it.
func (k teeKey) encrypt(plaintext []byte) ([]byte, error) {
	var cek [cekLength]byte
	rand.Read(cek[:])
	defer clear(cek[:])
	var protected string
	var wrapped []byte
	var err error
	switch {
	case k.KTY == "EC" && k.ALG == algECDH && k.CRV == "P-256":
		protected, wrapped, err = k.wrapECDH(cek[:])
	case k.KTY == "RSA" && k.ALG == algRSA:
		protected, wrapped, err = k.wrapRSA(cek[:])
	default:
		err = fmt.Errorf("tee-pubkey kty %q, alg %q, crv %q: must be EC, %s, P-256 or RSA, %s", k.KTY, k.ALG, k.CRV, algECDH, algRSA)
	}
	if err != nil {
		return nil, err
	}
	var iv [12]byte
	rand.Read(iv[:])
	return seal(protected, wrapped, cek[:], iv[:], plaintext)
}

func seal(header string, wrapped, cek, iv, plaintext []byte) ([]byte, error) {
	block, err := aes.NewCipher(cek)
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	protected := b64.EncodeToString([]byte(header))
	sealed := gcm.Seal(nil, iv, plaintext, []byte(protected))
	n := len(sealed) - gcm.Overhead()
	return json.Marshal(flattened{protected, b64.EncodeToString(wrapped), b64.EncodeToString(iv),
		b64.EncodeToString(sealed[:n]), b64.EncodeToString(sealed[n:])})
}

func (k teeKey) wrapECDH(cek []byte) (header string, wrapped []byte, err error) {
	x, errX := b64.DecodeString(k.X)
	y, errY := b64.DecodeString(k.Y)
	if errX != nil || errY != nil || len(x) != 32 || len(y) != 32 {
		return "", nil, errors.New("tee-pubkey: x and y must be 32 bytes in base64url without padding")
	}
	pub, err := ecdh.P256().NewPublicKey(append(append([]byte{4}, x...), y...))
	if err != nil {
		return "", nil, fmt.Errorf("tee-pubkey: %w", err)
	}
	eph, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return "", nil, err
	}
	z, err := eph.ECDH(pub)
	if err != nil {
		return "", nil, err
	}
	defer clear(z)
	kek := deriveKEK(z)
	defer clear(kek)
	block, err := aes.NewCipher(kek)
	if err != nil {
		return "", nil, err
	}
	e := eph.PublicKey().Bytes() // 4, x, y
	header = fmt.Sprintf(`{"alg":"%s","enc":"A256GCM","epk":{"crv":"P-256","kty":"EC","x":"%s","y":"%s"}}`,
		algECDH, b64.EncodeToString(e[1:33]), b64.EncodeToString(e[33:]))
	wrapped, err = josecipher.KeyWrap(block, cek)
	return header, wrapped, err
}

// deriveKEK is the Concat KDF of RFC 7518 4.6 for ECDH-ES+A256KW without party
// information: one round of SHA-256.
func deriveKEK(z []byte) []byte {
	h := sha256.New()
	h.Write([]byte{0, 0, 0, 1})
	h.Write(z)
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(algECDH))))
	h.Write([]byte(algECDH))
	h.Write(make([]byte, 8))                          // no apu, no apv
	h.Write(binary.BigEndian.AppendUint32(nil, 8*32)) // bits
	return h.Sum(nil)
}

func (k teeKey) wrapRSA(cek []byte) (header string, wrapped []byte, err error) {
	n, errN := b64.DecodeString(k.N)
	e, errE := b64.DecodeString(k.E)
	if errN != nil || errE != nil || len(n) < minRSA || len(n) > maxRSA || len(e) == 0 || len(e) > 4 {
		return "", nil, fmt.Errorf("tee-pubkey: n must be %d to %d bytes and e at most 4, in base64url without padding", minRSA, maxRSA)
	}
	pub := &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}
	wrapped, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, pub, cek, nil)
	if err != nil {
		return "", nil, fmt.Errorf("tee-pubkey: %w", err)
	}
	return fmt.Sprintf(`{"alg":"%s","enc":"A256GCM"}`, algRSA), wrapped, nil
}
