package kbsclient

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/json"
	"errors"
	"fmt"

	"coffer/internal/strict"
)

// jwe is a resource as the KBS sends it: RFC 7516, flattened JSON form.
type jwe struct {
	Protected    string `json:"protected"`
	EncryptedKey string `json:"encrypted_key"`
	IV           string `json:"iv"`
	Ciphertext   string `json:"ciphertext"`
	Tag          string `json:"tag"`
}

// jweHeader is the protected header. Its other members are ignored, except for
// those that would change how the message is decrypted.
type jweHeader struct {
	Alg string `json:"alg"`
	Enc string `json:"enc"`
	EPK epk    `json:"epk"`

	Crit json.RawMessage `json:"crit"`
	Zip  json.RawMessage `json:"zip"`
	APU  json.RawMessage `json:"apu"`
	APV  json.RawMessage `json:"apv"`
}

type epk struct {
	Kty string `json:"kty"`
	Crv string `json:"crv"`
	X   string `json:"x"`
	Y   string `json:"y"`
}

// point is the uncompressed form of the key.
func (e epk) point() ([]byte, error) {
	x, errX := b64url.DecodeString(e.X)
	y, errY := b64url.DecodeString(e.Y)
	if errX != nil || errY != nil || e.Kty != "EC" || e.Crv != "P-256" || len(x) != 32 || len(y) != 32 {
		return nil, errors.New("epk is no P-256 key")
	}
	return append(append([]byte{4}, x...), y...), nil
}

// decryptJWE gives the plaintext of a resource that was encrypted to key by
// key's own algorithm and A256GCM, and refuses every other.
func decryptJWE(body []byte, key teeKey) ([]byte, error) {
	var m jwe
	if err := strict.JSON(body, &m); err != nil {
		return nil, fmt.Errorf("JWE: %w", err)
	}
	header, err := parseJWEHeader(m.Protected)
	if err != nil {
		return nil, err
	}
	if header.Alg != key.alg() || header.Enc != "A256GCM" {
		return nil, fmt.Errorf("JWE: alg %q, enc %q; asked for %s, A256GCM", printable(header.Alg), printable(header.Enc), key.alg())
	}
	encryptedKey, err := b64url.DecodeString(m.EncryptedKey)
	if err != nil {
		return nil, fmt.Errorf("JWE: encrypted_key: %w", err)
	}
	iv, err := b64url.DecodeString(m.IV)
	if err != nil || len(iv) != 12 {
		return nil, errors.New("JWE: iv is not 12 bytes in base64url")
	}
	sealed, err := b64url.DecodeString(m.Ciphertext)
	if err != nil {
		return nil, fmt.Errorf("JWE: ciphertext: %w", err)
	}
	tag, err := b64url.DecodeString(m.Tag)
	if err != nil || len(tag) != 16 {
		return nil, errors.New("JWE: tag is not 16 bytes in base64url")
	}
	cek, err := key.unwrap(header, encryptedKey)
	if err != nil {
		return nil, fmt.Errorf("JWE: %w", err)
	}
	defer clear(cek)
	if len(cek) != 32 {
		return nil, fmt.Errorf("JWE: content key of %d bytes", len(cek))
	}
	block, err := aes.NewCipher(cek)
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	// The AAD is the header as it came, not as we would write it.
	plain, err := gcm.Open(nil, iv, append(sealed, tag...), []byte(m.Protected))
	if err != nil {
		return nil, fmt.Errorf("JWE: %w", err)
	}
	return plain, nil
}

func parseJWEHeader(protected string) (*jweHeader, error) {
	raw, err := b64url.DecodeString(protected)
	if err != nil {
		return nil, fmt.Errorf("JWE: protected header: %w", err)
	}
	h := &jweHeader{}
	if err := json.Unmarshal(raw, h); err != nil {
		return nil, fmt.Errorf("JWE: protected header: %w", err)
	}
	if h.Crit != nil || h.Zip != nil || h.APU != nil || h.APV != nil {
		return nil, errors.New("JWE: crit, zip, apu or apv in the protected header")
	}
	return h, nil
}
