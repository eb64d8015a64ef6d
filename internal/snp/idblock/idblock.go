// Package idblock signs SEV-SNP ID blocks: the owner's statement which launch
// digest and policy a guest has. The firmware refuses to start a guest whose
// digest or policy differ from its ID block, and puts the digest of the signing
// key into every attestation report (Report.IDKeyDigest).
//
// A host can leave the block out, so it is no substitute for checking the
// measurement: a verifier that wants it must look at the key's digest.
//
// Layouts: AMD "SEV Secure Nested Paging Firmware ABI" (56860), structures
// ID_BLOCK and ID_AUTH_INFO; sizes as QEMU's sev-snp-guest takes them.
package idblock

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

// Sizes of the two structures.
const (
	Size     = 96
	AuthSize = 4096
)

const (
	version         = 1
	algoECDSAP384   = 1 // ECDSA on P-384 with SHA-384
	curveP384       = 2
	fieldSize       = 72   // a coordinate or a half of a signature, little endian
	publicKeySize   = 1028 // curve, QX, QY, zeros
	offsetBlockSig  = 0x40
	offsetIDKey     = 0x240
	offsetIDKeySig  = 0x680
	offsetAuthorKey = 0x880
)

// ErrKey is wrapped by ParseKey's errors.
var ErrKey = errors.New("not an ECDSA private key on P-384")

// Block is what the owner states.
type Block struct {
	LaunchDigest [48]byte
	FamilyID     [16]byte // this and the next two appear in the report as they are
	ImageID      [16]byte
	GuestSVN     uint32
	Policy       uint64 // the launch's policy, exactly
}

// Marshal returns the Size bytes of the block.
func (b Block) Marshal() []byte {
	out := append(make([]byte, 0, Size), b.LaunchDigest[:]...)
	out = append(out, b.FamilyID[:]...)
	out = append(out, b.ImageID[:]...)
	out = binary.LittleEndian.AppendUint32(out, version)
	out = binary.LittleEndian.AppendUint32(out, b.GuestSVN)
	return binary.LittleEndian.AppendUint64(out, b.Policy)
}

// Sign returns the block and its authentication of AuthSize bytes, without an
// author key. The same block and key give the same bytes (RFC 6979).
func Sign(b Block, key *ecdsa.PrivateKey) (block, auth []byte, err error) {
	id, err := publicKey(&key.PublicKey)
	if err != nil {
		return nil, nil, err
	}
	block = b.Marshal()
	auth = make([]byte, AuthSize)
	binary.LittleEndian.PutUint32(auth, algoECDSAP384)
	binary.LittleEndian.PutUint32(auth[4:], algoECDSAP384) // of an author key, which there is none of
	if err := putSignature(auth[offsetBlockSig:], key, block); err != nil {
		return nil, nil, fmt.Errorf("sign the ID block: %w", err)
	}
	copy(auth[offsetIDKey:], id)
	return block, auth, nil
}

// Authorize puts an author key into the authentication that Sign has made: it
// vouches for the ID key.
func Authorize(auth []byte, author *ecdsa.PrivateKey) error {
	public, err := publicKey(&author.PublicKey)
	if err != nil {
		return err
	}
	if err := putSignature(auth[offsetIDKeySig:], author, auth[offsetIDKey:][:publicKeySize]); err != nil {
		return fmt.Errorf("sign the ID key: %w", err)
	}
	copy(auth[offsetAuthorKey:], public)
	return nil
}

func putSignature(dst []byte, key *ecdsa.PrivateKey, data []byte) error {
	digest := sha512.Sum384(data)
	der, err := key.Sign(nil, digest[:], crypto.SHA384)
	if err != nil {
		return err
	}
	var sig struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &sig); err != nil {
		return err
	}
	putLittleEndian(dst, sig.R)
	putLittleEndian(dst[fieldSize:], sig.S)
	return nil
}

// KeyDigest is what reports of guests with a block of this key hold as IDKeyDigest.
func KeyDigest(key *ecdsa.PublicKey) ([48]byte, error) {
	b, err := publicKey(key)
	return sha512.Sum384(b), err
}

func publicKey(key *ecdsa.PublicKey) ([]byte, error) {
	if key.Curve != elliptic.P384() {
		return nil, ErrKey
	}
	point, err := key.Bytes() // 4, X, Y
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	const coordinate = 48
	out := make([]byte, publicKeySize)
	binary.LittleEndian.PutUint32(out, curveP384)
	putLittleEndian(out[4:], new(big.Int).SetBytes(point[1:][:coordinate]))
	putLittleEndian(out[4+fieldSize:], new(big.Int).SetBytes(point[1+coordinate:]))
	return out, nil
}

func putLittleEndian(dst []byte, n *big.Int) {
	b := n.FillBytes(make([]byte, fieldSize))
	slices.Reverse(b)
	copy(dst, b)
}

// ParseKey reads a private key from PEM: PKCS#8, or SEC 1 as `openssl ecparam
// -name secp384r1 -genkey` writes it, parameters before it included.
func ParseKey(data []byte) (*ecdsa.PrivateKey, error) {
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return nil, fmt.Errorf("%w: no PEM block of a private key", ErrKey)
		}
		var key any
		var err error
		switch block.Type {
		case "EC PARAMETERS":
			continue
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		default:
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrKey, err)
		}
		if k, ok := key.(*ecdsa.PrivateKey); ok && k.Curve == elliptic.P384() {
			return k, nil
		}
		return nil, ErrKey
	}
}
