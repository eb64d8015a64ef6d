package stages

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/anatol/luks.go"
	"golang.org/x/crypto/xts"

	"coffer/internal/boot"
	"coffer/internal/guestconfig"
	"coffer/internal/testenv"
)

const (
	testOffset  = 32768 + 258048
	testPayload = 8 * sectorSize
)

var testPassphrase = bytes.Repeat([]byte("0123456789abcdef"), 8)

// object digs into the metadata.
type object = map[string]any

func at(m object, path ...string) object {
	for _, p := range path {
		m = m[p].(object)
	}
	return m
}

// makeHeader writes a LUKS2 header after the on-disk format's text, on its own
// and not by the builder's writer. edit may spoil the metadata before it is
// checksummed, as a host does.
func makeHeader(t testing.TB, volumeKey []byte, edit func(object)) []byte {
	t.Helper()
	salt := bytes.Repeat([]byte{7}, 32)
	derive := func(secret []byte, n int) []byte {
		k, err := pbkdf2.Key(sha256.New, string(secret), salt, 1000, n)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	kdf := object{"type": "pbkdf2", "hash": "sha256", "iterations": 1000, "salt": base64.StdEncoding.EncodeToString(salt)}
	m := object{
		"keyslots": object{"0": object{
			"type": "luks2", "key_size": keySize,
			"af":   object{"type": "luks1", "stripes": afStripes, "hash": "sha256"},
			"area": object{"type": "raw", "offset": "32768", "size": "258048", "encryption": cipher, "key_size": keySize},
			"kdf":  kdf,
		}},
		"tokens": object{},
		"segments": object{"0": object{
			"type": "crypt", "offset": "290816", "size": "dynamic", "iv_tweak": "0", "encryption": cipher, "sector_size": sectorSize,
		}},
		"digests": object{"0": object{
			"type": "pbkdf2", "keyslots": []string{"0"}, "segments": []string{"0"}, "hash": "sha256", "iterations": 1000,
			"salt": kdf["salt"], "digest": base64.StdEncoding.EncodeToString(derive(volumeKey, 32)),
		}},
		"config": object{"json_size": "12288", "keyslots_size": "258048"},
	}
	if edit != nil {
		edit(m)
	}
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}

	header := make([]byte, testOffset)
	for i, magic := range []string{"LUKS\xba\xbe", "SKUL\xba\xbe"} {
		h := header[i*headerSize : (i+1)*headerSize]
		copy(h, magic)
		binary.BigEndian.PutUint16(h[6:], 2)
		binary.BigEndian.PutUint64(h[8:], headerSize)
		binary.BigEndian.PutUint64(h[16:], 1)
		copy(h[24:], "crypt_root")
		copy(h[72:], "sha256")
		copy(h[168:], "6d7a1f5e-0000-4000-8000-000000000001")
		binary.BigEndian.PutUint64(h[256:], uint64(i*headerSize))
		copy(h[jsonStart:], text)
		sum := sha256.Sum256(h)
		copy(h[448:], sum[:])
	}

	// The keyslot: the volume key, split into stripes, encrypted in sectors of 512.
	area := header[32768 : 32768+keySize*afStripes]
	d := make([]byte, keySize)
	for s := range afStripes - 1 {
		stripe := area[s*keySize : (s+1)*keySize]
		for i := range stripe { // any filling will do
			stripe[i] = byte(i*31 + s*17)
			d[i] ^= stripe[i]
		}
		d = diffuse(d)
	}
	for i := range d {
		area[(afStripes-1)*keySize+i] = d[i] ^ volumeKey[i]
	}
	c, err := xts.NewCipher(aes.NewCipher, derive(testPassphrase, keySize))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(area)/512; i++ {
		sector := area[i*512 : (i+1)*512]
		c.Encrypt(sector, sector, uint64(i))
	}
	return header
}

func diffuse(d []byte) (out []byte) {
	for i := range len(d) / sha256.Size {
		block := binary.BigEndian.AppendUint32(nil, uint32(i))
		sum := sha256.Sum256(append(block, d[i*sha256.Size:(i+1)*sha256.Size]...))
		out = append(out, sum[:]...)
	}
	return out
}

func pin(header []byte) guestconfig.Disk {
	sum := sha256.Sum256(header)
	return guestconfig.Disk{
		Serial: "crypt_root", HeaderSHA256: hex.EncodeToString(sum[:]), DataOffset: int64(len(header)), PayloadSize: testPayload,
	}
}

var testVolumeKey = bytes.Repeat([]byte{0xa5, 0x5a, 0x01, 0x80}, 16)

// What a host that edits the header can write (each with a valid checksum).
func evilHeaders() map[string]func(object) {
	return map[string]func(object){
		"table text in the segment's cipher": func(m object) {
			at(m, "segments", "0")["encryption"] = cipher + " " + strings.Repeat("00", 64) + " 0 /dev/vda 2048 1 sector_size:4096"
		},
		"null cipher in the segment":   func(m object) { at(m, "segments", "0")["encryption"] = "cipher_null-ecb" },
		"null cipher by the capi name": func(m object) { at(m, "segments", "0")["encryption"] = "capi:ecb(cipher_null)-plain64" },
		"other cipher in the segment":  func(m object) { at(m, "segments", "0")["encryption"] = "aes-cbc-plain64" },
		"null cipher in the keyslot":   func(m object) { at(m, "keyslots", "0", "area")["encryption"] = "cipher_null-ecb" },
		"keyslot of no key":            emptyKey,
		"volume key of half the size":  func(m object) { at(m, "keyslots", "0")["key_size"] = 32 },
		"segment of a given size":      func(m object) { at(m, "segments", "0")["size"] = "4096" },
		"segment elsewhere":            func(m object) { at(m, "segments", "0")["offset"] = "294912" },
		"sectors of 512":               func(m object) { at(m, "segments", "0")["sector_size"] = 512 },
		"shifted iv":                   func(m object) { at(m, "segments", "0")["iv_tweak"] = "8" },
		"linear segment":               func(m object) { at(m, "segments", "0")["type"] = "linear" },
		"segment flags":                func(m object) { at(m, "segments", "0")["flags"] = []string{"backup"} },
		"integrity":                    func(m object) { at(m, "segments", "0")["integrity"] = object{"type": "none"} },
		"a second segment":             func(m object) { at(m, "segments")["1"] = at(m, "segments")["0"] },
		"a second keyslot":             func(m object) { at(m, "keyslots")["1"] = at(m, "keyslots")["0"] },
		"keyslot of another number":    func(m object) { k := at(m, "keyslots"); k["3"] = k["0"]; delete(k, "0") },
		"a token":                      func(m object) { at(m, "tokens")["0"] = object{"type": "luks2-keyring", "keyslots": []string{"0"}} },
		"argon2 with time 0": func(m object) {
			at(m, "keyslots", "0")["kdf"] = object{"type": "argon2id", "time": 0, "memory": 1, "cpus": 1, "salt": "AAAA"}
		},
		"a thousand million iterations":   func(m object) { at(m, "keyslots", "0", "kdf")["iterations"] = 1_000_000_000 },
		"one iteration":                   func(m object) { at(m, "digests", "0")["iterations"] = 1 },
		"empty digest":                    func(m object) { at(m, "digests", "0")["digest"] = "" },
		"digest longer than the hash":     func(m object) { at(m, "digests", "0")["digest"] = strings.Repeat("A", 128) },
		"digest of no keyslot":            func(m object) { at(m, "digests", "0")["keyslots"] = []string{} },
		"persistent flag":                 func(m object) { at(m, "config")["flags"] = []string{"allow-discards"} },
		"requirement: online reencrypt":   func(m object) { at(m, "config")["requirements"] = object{"mandatory": []string{"online-reencrypt-v2"}} },
		"another type where a text stood": func(m object) { at(m, "segments", "0")["offset"] = 290816 },
	}
}

// emptyKey makes any passphrase right: the volume key is of no bytes, and the
// digest is that of no bytes.
func emptyKey(m object) {
	at(m, "keyslots", "0")["key_size"] = 0
	k, _ := pbkdf2.Key(sha256.New, "", bytes.Repeat([]byte{7}, 32), 1000, 32)
	at(m, "digests", "0")["digest"] = base64.StdEncoding.EncodeToString(k)
}

func TestUnsealGood(t *testing.T) {
	header := makeHeader(t, testVolumeKey, nil)
	v, err := unseal(header, pin(header), testPassphrase)
	if err != nil {
		t.Fatal(err)
	}
	got, err := v.HMAC(5 /* crypto.SHA256 */, []byte("x"))
	if err != nil || len(got) != 32 {
		t.Fatalf("volume key: %v", err)
	}
}

func TestUnsealRefuses(t *testing.T) {
	for name, edit := range evilHeaders() {
		t.Run(name, func(t *testing.T) {
			header := makeHeader(t, testVolumeKey, edit)
			// Even when the evil header is the pinned one.
			_, err := unseal(header, pin(header), testPassphrase)
			if boot.CodeOf(err) != boot.CodeLUKSParams {
				t.Errorf("own digest pinned: %v, want %s", err, boot.CodeLUKSParams)
			}
			good := pin(makeHeader(t, testVolumeKey, nil))
			if _, err := unseal(header, good, testPassphrase); boot.CodeOf(err) != boot.CodeLUKSHeader {
				t.Errorf("good digest pinned: %v, want %s", err, boot.CodeLUKSHeader)
			}
		})
	}
	good := makeHeader(t, testVolumeKey, nil)
	t.Run("wrong key", func(t *testing.T) {
		wrong := bytes.Repeat([]byte("f"), 128)
		_, err := unseal(good, pin(good), wrong)
		if boot.CodeOf(err) != boot.CodeLUKSKey {
			t.Errorf("%v, want %s", err, boot.CodeLUKSKey)
		}
		if strings.Contains(err.Error(), string(wrong)) {
			t.Error("the error holds the key")
		}
	})
	t.Run("header shorter than pinned", func(t *testing.T) {
		d := pin(good)
		d.DataOffset += sectorSize
		if _, err := unseal(good, d, testPassphrase); boot.CodeOf(err) != boot.CodeLUKSHeader {
			t.Errorf("%v, want %s", err, boot.CodeLUKSHeader)
		}
	})
}

// The premises: without our checks, these headers open with luks.go, the one
// with any passphrase. Where this fails, luks.go has become stricter.
func TestPremise(t *testing.T) {
	for _, c := range []struct {
		name, passphrase string
	}{
		{"table text in the segment's cipher", string(testPassphrase)},
		{"keyslot of no key", "anything"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "header")
			if err := os.WriteFile(path, makeHeader(t, testVolumeKey, evilHeaders()[c.name]), 0o600); err != nil {
				t.Fatal(err)
			}
			dev, err := luks.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer dev.Close()
			if _, err := dev.UnsealVolume(0, []byte(c.passphrase)); err != nil {
				t.Errorf("luks.go refuses: %v", err)
			}
		})
	}
}

// The second line of defence: what luks.go read decides, however it read it.
func TestCheckVolume(t *testing.T) {
	good := luks.Volume{StorageEncryption: cipher, StorageSectorSize: sectorSize, StorageOffset: testOffset}
	for _, c := range []struct {
		name string
		edit func(*luks.Volume)
		want boot.Code
	}{
		{"ours", func(*luks.Volume) {}, ""},
		{"cipher", func(v *luks.Volume) { v.StorageEncryption += " 00 0 /dev/vda 0" }, boot.CodeLUKSParams},
		{"sector size", func(v *luks.Volume) { v.StorageSectorSize = 512 }, boot.CodeLUKSParams},
		{"iv_tweak", func(v *luks.Volume) { v.StorageIvTweak = 1 }, boot.CodeLUKSParams},
		{"offset", func(v *luks.Volume) { v.StorageOffset = 0 }, boot.CodeLUKSParams},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := good
			c.edit(&v)
			err := checkVolume(&v, guestconfig.Disk{DataOffset: testOffset})
			if (err == nil) != (c.want == "") || err != nil && boot.CodeOf(err) != c.want {
				t.Errorf("%v, want code %q", err, c.want)
			}
		})
	}
}

// A header that cryptsetup writes with our parameters is one of ours.
func TestCryptsetupHeader(t *testing.T) {
	tool := testenv.LookTool(t, "cryptsetup")
	dir := t.TempDir()
	img, key, vk := filepath.Join(dir, "img"), filepath.Join(dir, "key"), filepath.Join(dir, "vk")
	const offset = 16 << 20
	for path, data := range map[string][]byte{img: make([]byte, offset+testPayload), key: testPassphrase, vk: testVolumeKey} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command(tool, "luksFormat", "--type", "luks2", "--batch-mode", "--cipher", cipher, "--key-size", "512", "--hash", "sha256",
		"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--sector-size", "4096", "--volume-key-file", vk, "--key-file", key, img).CombinedOutput()
	if err != nil {
		t.Fatalf("cryptsetup: %v: %s", err, out)
	}
	data, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unseal(data[:offset], pin(data[:offset]), testPassphrase); err != nil {
		t.Error(err)
	}
}

func TestFindDisk(t *testing.T) {
	good := makeHeader(t, testVolumeKey, nil)
	spoilt := slices.Clone(good)
	spoilt[len(spoilt)-1] ^= 1 // in the keyslot: no checksum of LUKS covers it
	full := func(header []byte) []byte { return append(slices.Clone(header), make([]byte, testPayload)...) }
	type disk struct {
		serial string // "-": the file is missing
		data   []byte
	}
	for _, c := range []struct {
		name  string
		disks map[string]disk
		want  string
		code  boot.Code
	}{
		{"by its serial", map[string]disk{"vda": {"applog", nil}, "vdb": {"crypt_root\n", full(good)}}, "vdb", ""},
		{"the serial lies", map[string]disk{"vda": {"crypt_root", full(spoilt)}, "vdb": {"applog", full(good)}}, "vdb", ""},
		{"no serials at all", map[string]disk{"vda": {"-", nil}, "vdb": {"-", full(good)}}, "vdb", ""},
		{"two with the serial", map[string]disk{"vda": {"crypt_root", full(spoilt)}, "vdb": {"crypt_root", full(good)}}, "vdb", ""},
		{"one bit changed", map[string]disk{"vda": {"crypt_root", full(spoilt)}}, "", boot.CodeLUKSHeader},
		{"too short", map[string]disk{"vda": {"crypt_root", full(good)[:testOffset+testPayload-1]}}, "", boot.CodeLUKSHeader},
		{"no virtio disk", map[string]disk{"sda": {"crypt_root", full(good)}}, "", boot.CodeDiskMissing},
		{"no disk", nil, "", boot.CodeDiskMissing},
	} {
		t.Run(c.name, func(t *testing.T) {
			sys, dev := t.TempDir(), t.TempDir()
			for name, d := range c.disks {
				must(t, os.Mkdir(filepath.Join(sys, name), 0o755))
				if d.serial != "-" {
					must(t, os.WriteFile(filepath.Join(sys, name, "serial"), []byte(d.serial), 0o644))
				}
				must(t, os.WriteFile(filepath.Join(dev, name), d.data, 0o600))
			}
			ctx := t.Context()
			if c.code == boot.CodeDiskMissing { // do not wait for what never comes
				var cancel context.CancelFunc
				ctx, cancel = context.WithCancel(ctx)
				cancel()
			}
			path, header, err := findDisk(ctx, sys, dev, pin(good))
			if c.code != "" {
				if boot.CodeOf(err) != c.code || err == nil {
					t.Errorf("%v, want %s", err, c.code)
				}
				return
			}
			if err != nil || path != filepath.Join(dev, c.want) || !bytes.Equal(header, good) {
				t.Errorf("found %q, %d bytes, %v; want %s", path, len(header), err, c.want)
			}
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func FuzzCheckParams(f *testing.F) {
	f.Add(makeHeader(f, testVolumeKey, nil)[jsonStart:headerSize])
	for _, edit := range evilHeaders() {
		f.Add(makeHeader(f, testVolumeKey, edit)[jsonStart:headerSize])
	}
	front := makeHeader(f, testVolumeKey, nil)[:jsonStart]
	f.Fuzz(func(t *testing.T, text []byte) {
		header := make([]byte, testOffset)
		copy(header, front)
		copy(header[jsonStart:headerSize], text)
		if checkParams(header, testOffset) != nil {
			return
		}
		// What is accepted names our cipher, and no other.
		if !bytes.Contains(text, []byte(cipher)) {
			t.Errorf("accepted: %q", text)
		}
	})
}
