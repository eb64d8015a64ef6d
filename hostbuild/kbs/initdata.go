package kbs

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/pelletier/go-toml/v2"
)

// initData is text that a guest's host bound to the report's HOST_DATA.
type initData struct {
	hostData [32]byte          // digest of the text, padded or cut
	claims   map[string]string // its table [data]
}

// parseInitData reads the member init-data of an attestation: null or absent,
// or {"format":"toml","body":TEXT} where TEXT has version, algorithm and [data].
func parseInitData(raw json.RawMessage) (*initData, error) {
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	m, err := members(raw)
	if err != nil {
		return nil, fmt.Errorf("init-data: %w", err)
	}
	var format, body string
	if err := errors.Join(member(m, "format", &format), member(m, "body", &body)); err != nil {
		return nil, fmt.Errorf("init-data: %w", err)
	}
	if format != "toml" {
		return nil, fmt.Errorf("init-data: format %.20q: must be toml", format)
	}
	var doc struct {
		Version   *string            `toml:"version"`
		Algorithm string             `toml:"algorithm"`
		Data      *map[string]string `toml:"data"`
	}
	if err := toml.Unmarshal([]byte(body), &doc); err != nil {
		return nil, fmt.Errorf("init-data: %w", err)
	}
	if doc.Version == nil || doc.Data == nil {
		return nil, errors.New("init-data: version or the table [data] is missing")
	}
	d := &initData{claims: *doc.Data}
	switch doc.Algorithm {
	case "sha256":
		d.hostData = sha256.Sum256([]byte(body))
	case "sha384":
		sum := sha512.Sum384([]byte(body))
		copy(d.hostData[:], sum[:])
	case "sha512":
		sum := sha512.Sum512([]byte(body))
		copy(d.hostData[:], sum[:])
	default:
		return nil, fmt.Errorf("init-data: algorithm %.20q: must be sha256, sha384 or sha512", doc.Algorithm)
	}
	return d, nil
}
