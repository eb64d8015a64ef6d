package snpguest

import (
	"crypto/ecdsa"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"coffer/internal/measure"
	"coffer/internal/snp/idblock"
	"coffer/internal/strict"
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

// readPrivateKey reads a P-384 key: PEM or DER, PKCS #8 or SEC 1.
func readPrivateKey(path string) (*ecdsa.PrivateKey, error) {
	b, err := strict.ReadFile(path, maxFile)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	k, err := idblock.ParseKey(b)
	for _, kind := range []string{"EC PRIVATE KEY", "PRIVATE KEY"} {
		if block, _ := pem.Decode(b); err != nil && block == nil {
			text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b})
			k, err = idblock.ParseKey(text)
			clear(text)
		}
	}
	if err != nil {
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
	digest, err := idblock.KeyDigest(&k.PublicKey)
	if err != nil {
		return err
	}
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
	b := idblock.Block{GuestSVN: uint32(svn), Policy: 0x30000}
	if text, given := a.options["policy"]; given {
		if b.Policy, err = strconv.ParseUint(strings.TrimPrefix(text, "0x"), base(text), 64); err != nil {
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
	copy(b.LaunchDigest[:], digest)
	for _, f := range []struct {
		name, option string
		id           *[16]byte
	}{{"Family", "family-id", &b.FamilyID}, {"Image", "image-id", &b.ImageID}} {
		id, given := a.options[f.option]
		if given && len(id) != len(f.id) {
			return fmt.Errorf("Invalid %s Id length!", f.name)
		}
		copy(f.id[:], id)
	}
	idKey, err := readPrivateKey(a.positional[0])
	if err != nil {
		return err
	}
	authorKey, err := readPrivateKey(a.positional[1])
	if err != nil {
		return err
	}
	block, auth, err := idblock.Sign(b, idKey)
	if err != nil {
		return err
	}
	if err := idblock.Authorize(auth, authorKey); err != nil {
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
