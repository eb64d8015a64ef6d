package kbsclient

import (
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
)

// HostData is the value that an SNP guest's HOST_DATA must have for the KBS to
// accept toml as its init-data: the digest of the text, cut or padded with
// zeros to 32 bytes. algorithm must be the one that the text itself names.
func HostData(algorithm, toml string) (hostData [32]byte, err error) {
	switch algorithm {
	case "sha256":
		hostData = sha256.Sum256([]byte(toml))
	case "sha384":
		sum := sha512.Sum384([]byte(toml))
		copy(hostData[:], sum[:])
	case "sha512":
		sum := sha512.Sum512([]byte(toml))
		copy(hostData[:], sum[:])
	default:
		return hostData, fmt.Errorf("init-data: unknown hash algorithm %q", algorithm)
	}
	return hostData, nil
}
