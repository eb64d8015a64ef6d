// Package vault gives a folder of an ext4 file system a key of its own: what is in
// its files, and their names, can be read only with it. The rest of the file system
// stays as it is.
//
// It is Linux's fscrypt, policy version 2: AES-256-XTS for content, AES-256-CTS for
// names, each file with a key that the kernel derives. Like the disk's encryption
// below it keeps secrets and finds no change. It does not know where the key is from.
package vault

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// KeySize is the size of a key in bytes.
const KeySize = unix.FSCRYPT_MAX_KEY_SIZE

// ErrOther is a folder that has another key, or none and files in it.
var ErrOther = errors.New("the folder was not made with this key")

// Key reads a key from the text that a KBS keeps, hexadecimal. The caller wipes both.
func Key(text []byte) ([]byte, error) {
	key := make([]byte, KeySize)
	if len(text) != hex.EncodedLen(KeySize) {
		return nil, fmt.Errorf("the key of /vault has %d characters, want %d", len(text), hex.EncodedLen(KeySize))
	}
	if _, err := hex.Decode(key, text); err != nil {
		return nil, errors.New("the key of /vault is not hexadecimal")
	}
	return key, nil
}

// Open opens the folder dir with key, and makes it if it is not there. The kernel
// keeps the key until the file system is unmounted; the caller wipes its own.
func Open(dir string, key []byte) error {
	if len(key) != KeySize {
		return fmt.Errorf("%s: a key of %d bytes, want %d", dir, len(key), KeySize)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	id, err := addKey(filepath.Dir(dir), key)
	if err != nil {
		return fmt.Errorf("%s: give the kernel its key: %w", dir, err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	want := unix.FscryptPolicyV2{
		Version: unix.FSCRYPT_POLICY_V2, Contents_encryption_mode: unix.FSCRYPT_MODE_AES_256_XTS,
		Filenames_encryption_mode: unix.FSCRYPT_MODE_AES_256_CTS, Flags: unix.FSCRYPT_POLICY_FLAGS_PAD_32, Master_key_identifier: id,
	}
	// This changes nothing where the folder has the very policy already.
	switch err := ioctl(f, unix.FS_IOC_SET_ENCRYPTION_POLICY, unsafe.Pointer(&want)); {
	case errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOTEMPTY):
		return fmt.Errorf("%s: %w", dir, ErrOther)
	case err != nil:
		return fmt.Errorf("%s: set its encryption: %w", dir, err)
	}
	return os.Chmod(dir, 0o1777) // only the container sees it
}

// addKey gives a key to the file system of dir, and returns its name.
func addKey(dir string, key []byte) (id [unix.FSCRYPT_KEY_IDENTIFIER_SIZE]byte, err error) {
	f, err := os.Open(dir)
	if err != nil {
		return id, err
	}
	defer f.Close()
	var arg struct {
		unix.FscryptAddKeyArg
		raw [KeySize]byte
	}
	defer func() { clear(arg.raw[:]) }()
	arg.Key_spec.Type, arg.Raw_size = unix.FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER, KeySize
	copy(arg.raw[:], key)
	if err := ioctl(f, unix.FS_IOC_ADD_ENCRYPTION_KEY, unsafe.Pointer(&arg)); err != nil {
		return id, err
	}
	copy(id[:], arg.Key_spec.U[:])
	return id, nil
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
