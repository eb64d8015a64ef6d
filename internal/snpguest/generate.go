package snpguest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"slices"
	"strconv"
	"strings"

	"coffer/internal/measure"
)

// maxFirmware bounds a firmware file.
const maxFirmware = 64 << 20

func readFirmware(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Size() > maxFirmware {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxFirmware)
	}
	return os.ReadFile(path)
}

// output prints a digest, and writes it to the file that an option names.
func (r *run) output(text string, a *args, fileOption string) error {
	if file, given := a.options[fileOption]; given {
		if err := os.WriteFile(file, []byte(text), 0o666); err != nil {
			return err
		}
	}
	r.printf("%s\n", text)
	return nil
}

func generateMeasurement(r *run, a *args) error {
	if err := a.want(0, 0, ""); err != nil {
		return err
	}
	in, err := measureInput(a)
	if err != nil {
		return err
	}
	res, err := measure.Digest(*in)
	if err != nil {
		return fmt.Errorf("Error calculating the measurement:%w", err)
	}
	text := hex.EncodeToString(res.LaunchDigest[:])
	if a.or("output-format", "hex") == "hex" {
		text = "0x" + text
	} else { // of the hexadecimal text, not of the digest: virtee's way
		text = base64.StdEncoding.EncodeToString([]byte(text))
	}
	return r.output(text, a, "measurement-file")
}

func measureInput(a *args) (*measure.Input, error) {
	if !a.has("ovmf") {
		return nil, usageError("the following required arguments were not provided: --ovmf <ovmf>")
	}
	if !a.has("kernel") && (a.has("initrd") || a.has("append")) {
		return nil, usageError("the following required arguments were not provided: --kernel <kernel>")
	}
	vcpus, err := number(a, "vcpus", 1, 32)
	if err != nil {
		return nil, err
	}
	// virtee's program trims the command line, which QEMU does not.
	in := &measure.Input{VCPUs: int(vcpus), Cmdline: strings.TrimSpace(a.or("append", ""))}
	if in.CPUSignature, err = cpuSignature(a); err != nil {
		return nil, err
	}
	if text, given := a.options["guest-features"]; given {
		if in.GuestFeatures, err = strconv.ParseUint(strings.TrimPrefix(text, "0x"), base(text), 64); err != nil {
			return nil, usagef("invalid value '%s' for '--guest-features'", text)
		}
	}
	switch vmm := strings.ToLower(a.or("vmm-type", "qemu")); vmm {
	case "qemu":
	case "ec2":
		in.VMM = measure.EC2
	case "krun":
		in.VMM = measure.KRUN
	default:
		return nil, fmt.Errorf("Invalid VCPU type value provided: %s", a.or("vmm-type", ""))
	}
	if in.OVMF, err = readFirmware(a.or("ovmf", "")); err != nil {
		return nil, fmt.Errorf("Error calculating the measurement:%w", err)
	}
	if text, given := a.options["ovmf-hash"]; given {
		sum, err := hex.DecodeString(text)
		if err != nil || len(sum) != sha512.Size384 {
			return nil, fmt.Errorf("the OVMF hash %q is not %d hex characters", text, 2*sha512.Size384)
		}
		in.AfterOVMF = (*[48]byte)(sum)
	}
	for _, f := range []struct {
		option string
		have   *bool
		sum    *[32]byte
	}{{"kernel", &in.HasKernel, &in.Kernel}, {"initrd", &in.HasInitrd, &in.Initrd}} {
		if path, given := a.options[f.option]; given {
			if *f.sum, err = measure.HashFile(path); err != nil {
				return nil, fmt.Errorf("Error calculating the measurement:%w", err)
			}
			*f.have = true
		}
	}
	return in, nil
}

func base(number string) int {
	if strings.HasPrefix(number, "0x") {
		return 16
	}
	return 10
}

// cpuSignature is CPUID(1).EAX of the CPU that the options name in one of three ways.
func cpuSignature(a *args) (uint32, error) {
	parts := []string{"vcpu-family", "vcpu-model", "vcpu-stepping"}
	given := 0
	for _, p := range parts {
		if a.has(p) {
			given++
		}
	}
	switch {
	case a.has("vcpu-type") && (a.has("vcpu-sig") || given > 0) || a.has("vcpu-sig") && given > 0:
		return 0, usageError("the vCPU is named in more than one way")
	case a.has("vcpu-type"):
		name := a.or("vcpu-type", "")
		for _, m := range measure.CPUModels() {
			if strings.EqualFold(m, name) {
				return measure.CPUSignature(m)
			}
		}
		return 0, fmt.Errorf("Invalid VCPU type value provided: %s", name)
	case a.has("vcpu-sig"):
		sig, err := number(a, "vcpu-sig", 0, 31)
		if err == nil {
			err = knownSignature(uint32(sig))
		}
		return uint32(sig), err
	case given == len(parts):
		var v [3]uint32
		for i, p := range parts {
			n, err := number(a, p, 0, 31)
			if err != nil {
				return 0, err
			}
			v[i] = uint32(n)
		}
		sig := measure.Signature(v[0], v[1], v[2])
		return sig, knownSignature(sig)
	case given > 0:
		return 0, usageError("--vcpu-family, --vcpu-model and --vcpu-stepping go together")
	}
	return 0, usageError("the following required arguments were not provided: --vcpu-type <vcpu-type>")
}

func knownSignature(sig uint32) error {
	if slices.ContainsFunc(measure.CPUModels(), func(m string) bool {
		known, err := measure.CPUSignature(m)
		return err == nil && known == sig
	}) {
		return nil
	}
	return fmt.Errorf("Invalid VCPU signature provided: %d", sig)
}

func generateOVMFHash(r *run, a *args) error {
	if err := a.want(0, 0, ""); err != nil {
		return err
	}
	if !a.has("ovmf") {
		return usageError("the following required arguments were not provided: --ovmf <ovmf>")
	}
	image, err := readFirmware(a.or("ovmf", ""))
	var o *measure.OVMF
	if err == nil {
		o, err = measure.ParseOVMF(image)
	}
	if err != nil {
		return fmt.Errorf("Error calculating the measurement:%w", err)
	}
	sum := o.Digest()
	text := hex.EncodeToString(sum[:])
	if a.or("output-format", "hex") != "hex" {
		text = base64.StdEncoding.EncodeToString([]byte(text))
	}
	return r.output(text, a, "hash-file")
}

// Sizes of the firmware ABI's ECDSA structures.
const (
	pointSize = 72
	sigSize   = 512
	keySize   = 1028
)

func littleEndian(v *big.Int) []byte {
	b := v.FillBytes(make([]byte, pointSize))
	slices.Reverse(b)
	return b
}

// keyBytes is a public key as the firmware hashes it: curve, x, y, zeros.
func keyBytes(k *ecdsa.PublicKey) ([]byte, error) {
	p, err := k.Bytes() // 4, x, y
	if err != nil {
		return nil, err
	}
	b := binary.LittleEndian.AppendUint32(make([]byte, 0, keySize), 2) // P-384
	half := (len(p) - 1) / 2
	b = append(b, littleEndian(new(big.Int).SetBytes(p[1:1+half]))...)
	b = append(b, littleEndian(new(big.Int).SetBytes(p[1+half:]))...)
	return b[:keySize], nil
}

func signBytes(k *ecdsa.PrivateKey, data []byte) ([]byte, error) {
	digest := sha512.Sum384(data)
	r, s, err := ecdsa.Sign(rand.Reader, k, digest[:])
	if err != nil {
		return nil, err
	}
	b := append(make([]byte, 0, sigSize), littleEndian(r)...)
	return append(b, littleEndian(s)...)[:sigSize], nil
}

// readPrivateKey reads a P-384 key: PEM or DER, PKCS #8 or SEC 1.
func readPrivateKey(path string) (*ecdsa.PrivateKey, error) {
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	der := b
	if block, _ := pem.Decode(b); block != nil {
		der = block.Bytes
		defer clear(der)
	}
	k, err := x509.ParseECPrivateKey(der)
	if err != nil {
		var key any
		if key, err = x509.ParsePKCS8PrivateKey(der); err == nil {
			var isEC bool
			if k, isEC = key.(*ecdsa.PrivateKey); !isEC {
				err = errors.New("not an EC key")
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("private key %s: %w", path, err)
	}
	if k.Curve != elliptic.P384() {
		return nil, errors.New("Wrong curve used in the provided private key")
	}
	if _, err := k.ECDH(); err != nil { // the point must lie on the curve
		return nil, fmt.Errorf("private key %s: %w", path, err)
	}
	return k, nil
}

func generateKeyDigest(r *run, a *args) error {
	if err := a.want(1, 1, "<key>"); err != nil {
		return err
	}
	k, err := readPrivateKey(a.positional[0])
	if err != nil {
		return err
	}
	b, err := keyBytes(&k.PublicKey)
	if err != nil {
		return err
	}
	digest := sha512.Sum384(b)
	r.printf("Key Digest:\n")
	return r.output(hex.EncodeToString(digest[:]), a, "key-digest-file")
}

func generateIDBlock(r *run, a *args) error {
	if err := a.want(3, 3, "<id-block-key> <auth-key> <launch-digest>"); err != nil {
		return err
	}
	svn, err := number(a, "svn", 0, 32)
	if err != nil {
		return err
	}
	if _, err := number(a, "version", 1, 32); err != nil {
		return err
	}
	policy := uint64(0x30000)
	if text, given := a.options["policy"]; given {
		if policy, err = strconv.ParseUint(strings.TrimPrefix(text, "0x"), base(text), 64); err != nil {
			return usagef("invalid value '%s' for '--policy <policy>'", text)
		}
	}
	var digest []byte
	if text := a.positional[2]; strings.HasPrefix(text, "0x") {
		digest, err = hex.DecodeString(text[2:])
	} else {
		digest, err = base64.StdEncoding.DecodeString(text)
	}
	if err == nil && len(digest) != sha512.Size384 {
		err = fmt.Errorf("%d bytes, not %d", len(digest), sha512.Size384)
	}
	if err != nil {
		return fmt.Errorf("launch digest: %w", err)
	}
	block := slices.Clone(digest)
	for _, name := range []string{"family-id", "image-id"} {
		id, given := a.options[name]
		if given && len(id) != 16 {
			return fmt.Errorf("Invalid %s Id length!", strings.ToUpper(name[:1])+name[1:len(name)-3])
		}
		block = append(block, make([]byte, 16)...)
		copy(block[len(block)-16:], id)
	}
	le := binary.LittleEndian
	block = le.AppendUint64(le.AppendUint32(le.AppendUint32(block, 1), uint32(svn)), policy)

	auth, err := authBlock(block, a.positional[0], a.positional[1])
	if err != nil {
		return err
	}
	texts := []string{base64.StdEncoding.EncodeToString(block), base64.StdEncoding.EncodeToString(auth)}
	for i, option := range []string{"id-file", "auth-file"} {
		if file, given := a.options[option]; given {
			if err := os.WriteFile(file, []byte(texts[i]), 0o666); err != nil {
				return err
			}
		}
	}
	r.printf("ID-BLOCK:\n%s\nAUTH-BLOCK:\n%s\n", texts[0], texts[1])
	return nil
}

// authBlock is the ID authentication information of an ID block: the firmware
// ABI's ID_AUTH_INFO.
func authBlock(block []byte, idKeyFile, authorKeyFile string) ([]byte, error) {
	idKey, err := readPrivateKey(idKeyFile)
	if err != nil {
		return nil, err
	}
	authorKey, err := readPrivateKey(authorKeyFile)
	if err != nil {
		return nil, err
	}
	idPublic, err := keyBytes(&idKey.PublicKey)
	if err != nil {
		return nil, err
	}
	authorPublic, err := keyBytes(&authorKey.PublicKey)
	if err != nil {
		return nil, err
	}
	blockSig, err := signBytes(idKey, block)
	if err != nil {
		return nil, err
	}
	keySig, err := signBytes(authorKey, idPublic)
	if err != nil {
		return nil, err
	}
	auth := make([]byte, 4096)
	binary.LittleEndian.PutUint32(auth, 1)     // ECDSA P-384 with SHA-384
	binary.LittleEndian.PutUint32(auth[4:], 1) // the author key's, the same
	copy(auth[0x40:], blockSig)
	copy(auth[0x240:], idPublic)
	copy(auth[0x680:], keySig)
	copy(auth[0x880:], authorPublic)
	return auth, nil
}
