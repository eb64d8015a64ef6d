package stages

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/anatol/luks.go"
	"golang.org/x/sys/unix"

	"coffer/internal/boot"
	"coffer/internal/guestconfig"
)

// The only parameters that a crypt_root has. A LUKS2 header names others freely,
// and what it names would go into dm-crypt's table: a header edited by the host
// can mount a root of the host's choice. So the header is pinned by its digest,
// is parsed from a private copy, and must say exactly this besides.
const (
	cipher     = "aes-xts-plain64"
	keySize    = 64   // bytes; two AES-256 keys
	sectorSize = 4096 // bytes
	afStripes  = 4000
	keyslotID  = "0"
)

// The LUKS2 on-disk format: a binary header and a JSON text.
const (
	headerSize = 16384
	jsonStart  = 4096
)

// openDisk finds crypt_root, unlocks it and returns the device of its payload.
func openDisk(ctx context.Context, d guestconfig.Disk, passphrase []byte) (string, error) {
	dev, header, err := findDisk(ctx, "/sys/block", "/dev", d)
	if err != nil {
		return "", err
	}
	v, err := unseal(header, d, passphrase)
	if err != nil {
		return "", fmt.Errorf("%s: %w", dev, err)
	}
	v.BackingDevice, v.StorageSize, v.Flags = dev, uint64(d.PayloadSize), nil
	if err := v.SetupMapper("cryptroot"); err != nil {
		return "", boot.Fail(boot.CodeLUKSParams, fmt.Errorf("%s: set up dm-crypt: %w", dev, err))
	}
	return dmDevice("cryptroot")
}

// unseal opens the header's copy with the passphrase. The volume holds the
// volume key: never print it.
func unseal(header []byte, d guestconfig.Disk, passphrase []byte) (*luks.Volume, error) {
	if err := checkHeader(header, d); err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("luks", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("copy of the LUKS header: %w", err)
	}
	mem := os.NewFile(uintptr(fd), "luks")
	defer mem.Close()
	if _, err := mem.Write(header); err != nil {
		return nil, fmt.Errorf("copy of the LUKS header: %w", err)
	}
	dev, err := luks.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, boot.Fail(boot.CodeLUKSHeader, fmt.Errorf("LUKS header: %w", err))
	}
	defer dev.Close()
	v, err := dev.UnsealVolume(0, passphrase)
	if err != nil {
		return nil, boot.Fail(boot.CodeLUKSKey, fmt.Errorf("unlock with the KBS's key: %w", err))
	}
	return v, checkVolume(v, d)
}

// checkVolume looks at what would go into dm-crypt's table.
func checkVolume(v *luks.Volume, d guestconfig.Disk) error {
	if v.StorageEncryption != cipher || v.StorageSectorSize != sectorSize || v.StorageIvTweak != 0 || v.StorageOffset != uint64(d.DataOffset) {
		return boot.Fail(boot.CodeLUKSParams, fmt.Errorf("LUKS volume has cipher %q, sectors of %d, iv_tweak %d, offset %d; want %q, %d, 0, %d",
			v.StorageEncryption, v.StorageSectorSize, v.StorageIvTweak, v.StorageOffset, cipher, sectorSize, d.DataOffset))
	}
	return nil
}

// checkHeader compares the header with its pin and with the parameters above.
func checkHeader(header []byte, d guestconfig.Disk) error {
	sum := sha256.Sum256(header)
	if got := hex.EncodeToString(sum[:]); got != d.HeaderSHA256 || int64(len(header)) != d.DataOffset {
		return boot.Fail(boot.CodeLUKSHeader, fmt.Errorf("LUKS header has SHA-256 %s, the guest config pins %s: this disk is not of this bundle or was changed", got, d.HeaderSHA256))
	}
	if err := checkParams(header, d.DataOffset); err != nil {
		return boot.Fail(boot.CodeLUKSParams, fmt.Errorf("LUKS header: %w", err))
	}
	return nil
}

// metadata is the JSON text of a LUKS2 header, as far as ours has it.
type metadata struct {
	Keyslots map[string]keyslot         `json:"keyslots"`
	Tokens   map[string]json.RawMessage `json:"tokens"`
	Segments map[string]segment         `json:"segments"`
	Digests  map[string]keyDigest       `json:"digests"`
	Config   struct {
		JSONSize     string `json:"json_size"`
		KeyslotsSize string `json:"keyslots_size"`
	} `json:"config"`
}

type keyslot struct {
	Type    string `json:"type"`
	KeySize int    `json:"key_size"`
	AF      struct {
		Type    string `json:"type"`
		Stripes int    `json:"stripes"`
		Hash    string `json:"hash"`
	} `json:"af"`
	Area struct {
		Type       string `json:"type"`
		Offset     string `json:"offset"`
		Size       string `json:"size"`
		Encryption string `json:"encryption"`
		KeySize    int    `json:"key_size"`
	} `json:"area"`
	KDF kdf `json:"kdf"`
}

type kdf struct {
	Type       string `json:"type"`
	Hash       string `json:"hash"`
	Iterations int    `json:"iterations"`
	Salt       string `json:"salt"`
}

type segment struct {
	Type       string `json:"type"`
	Offset     string `json:"offset"`
	Size       string `json:"size"`
	IVTweak    string `json:"iv_tweak"`
	Encryption string `json:"encryption"`
	SectorSize int    `json:"sector_size"`
}

type keyDigest struct {
	kdf
	Keyslots []string `json:"keyslots"`
	Segments []string `json:"segments"`
	Digest   string   `json:"digest"`
}

// checkParams accepts only a header of our own making, whatever its digest.
func checkParams(header []byte, dataOffset int64) error {
	if len(header) < headerSize {
		return fmt.Errorf("%d bytes are no header", len(header))
	}
	switch {
	case !bytes.HasPrefix(header, []byte("LUKS\xba\xbe\x00\x02")):
		return errors.New("not LUKS2")
	case binary.BigEndian.Uint64(header[8:]) != headerSize:
		return fmt.Errorf("hdr_size is not %d", headerSize)
	}
	text := header[jsonStart:headerSize]
	if end := bytes.IndexByte(text, 0); end >= 0 {
		text = text[:end]
	}
	var m metadata
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&m); err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("metadata: data after the text")
	}

	slot, ok1 := m.Keyslots[keyslotID]
	seg, ok2 := m.Segments[keyslotID]
	dig, ok3 := m.Digests[keyslotID]
	if !ok1 || !ok2 || !ok3 || len(m.Keyslots) != 1 || len(m.Segments) != 1 || len(m.Digests) != 1 || len(m.Tokens) != 0 {
		return errors.New("want one keyslot, one segment, one digest, all of number 0, and no token")
	}
	ours := []string{keyslotID}
	for _, c := range []struct {
		name string
		ok   bool
	}{
		{"keyslot type", slot.Type == "luks2"},
		{"keyslot key_size", slot.KeySize == keySize},
		{"keyslot af", slot.AF.Type == "luks1" && slot.AF.Stripes == afStripes && slot.AF.Hash == "sha256"},
		{"keyslot area", slot.Area.Type == "raw" && slot.Area.Encryption == cipher && slot.Area.KeySize == keySize},
		{"keyslot kdf", slot.KDF.sound()},
		{"segment type", seg.Type == "crypt"},
		{"segment encryption", seg.Encryption == cipher},
		{"segment offset", seg.Offset == fmt.Sprint(dataOffset)},
		{"segment size", seg.Size == "dynamic"},
		{"segment iv_tweak", seg.IVTweak == "0"},
		{"segment sector_size", seg.SectorSize == sectorSize},
		{"digest", dig.sound() && decodedLen(dig.Digest) == sha256.Size},
		{"digest keyslots and segments", slices.Equal(dig.Keyslots, ours) && slices.Equal(dig.Segments, ours)},
	} {
		if !c.ok {
			return fmt.Errorf("%s is not what this guest was built with", c.name)
		}
	}
	return nil
}

func (k kdf) sound() bool {
	return k.Type == "pbkdf2" && k.Hash == "sha256" && k.Iterations >= 1000 && k.Iterations <= 1_000_000 && decodedLen(k.Salt) >= 16
}

func decodedLen(s string) int {
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		return -1
	}
	return len(b)
}

// diskPatience is how long a disk may take to appear.
const diskPatience = 10 * time.Second

// findDisk returns the disk whose beginning is the pinned header, and that
// beginning, read once. The serial, which the host sets, only says where to
// look first.
func findDisk(ctx context.Context, sysBlock, dev string, d guestconfig.Disk) (string, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, diskPatience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		disks, err := listDisks(sysBlock, d.Serial)
		if err != nil {
			return "", nil, boot.Fail(boot.CodeDiskMissing, err)
		}
		var errs []error
		for _, name := range disks {
			path := filepath.Join(dev, name)
			header, err := readHeader(path, d)
			if err == nil {
				return path, header, nil
			}
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
		if len(errs) > 0 { // the disks are there, and none is ours
			return "", nil, boot.Fail(boot.CodeLUKSHeader, errors.Join(errs...))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", nil, boot.Fail(boot.CodeDiskMissing, errors.New("no virtio disk; is crypt_root.qcow2 attached?"))
		}
	}
}

// listDisks names the virtio disks, those with the serial first.
func listDisks(sysBlock, serial string) ([]string, error) {
	entries, err := os.ReadDir(sysBlock)
	if err != nil {
		return nil, fmt.Errorf("list disks: %w", err)
	}
	var first, rest []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "vd") {
			continue
		}
		b, err := os.ReadFile(filepath.Join(sysBlock, e.Name(), "serial"))
		if err == nil && serial != "" && strings.TrimSpace(string(b)) == serial {
			first = append(first, e.Name())
		} else {
			rest = append(rest, e.Name())
		}
	}
	return append(first, rest...), nil
}

// readHeader reads the first DataOffset bytes once. They are the ones that are
// compared and, from a copy in memory, parsed.
func readHeader(path string, d guestconfig.Disk) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	if want := d.DataOffset + d.PayloadSize; size < want {
		return nil, fmt.Errorf("disk has %d bytes, the guest config says %d", size, want)
	}
	header := make([]byte, d.DataOffset)
	if _, err := f.ReadAt(header, 0); err != nil {
		return nil, fmt.Errorf("read LUKS header: %w", err)
	}
	return header, checkHeader(header, d)
}
