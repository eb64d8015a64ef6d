package xts

import (
	"bytes"
	"crypto/aes"
	"encoding/hex"
	"math/rand/v2"
	"testing"

	xxts "golang.org/x/crypto/xts"
)

func random(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// The oracle is golang.org/x/crypto/xts, one call per sector.
func TestSameBytesAsOracle(t *testing.T) {
	key := random(1, KeySize)
	c, err := New(key)
	if err != nil {
		t.Fatal(err)
	}
	oracle, err := xxts.NewCipher(aes.NewCipher, key)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for _, size := range []int{512, 4096} {
		for range 100 {
			n := 1 + r.IntN(4)
			off := r.Int64N(1<<40) * int64(size)
			plain := random(2, n*size)
			want := make([]byte, len(plain))
			for i := range n {
				at := off + int64(i*size)
				oracle.Encrypt(want[i*size:(i+1)*size], plain[i*size:(i+1)*size], uint64(at)/512)
			}
			got := bytes.Clone(plain)
			c.Encrypt(got, off, size)
			if !bytes.Equal(got, want) {
				t.Fatalf("sector size %d, offset %d: other bytes than the oracle's", size, off)
			}
			portable := Cipher{data: c.data, tweak: c.tweak}
			slow := bytes.Clone(plain)
			portable.Encrypt(slow, off, size)
			if !bytes.Equal(slow, want) {
				t.Fatalf("sector size %d, offset %d: other bytes without the processor's help", size, off)
			}
			c.Decrypt(got, off, size)
			if !bytes.Equal(got, plain) {
				t.Fatalf("sector size %d, offset %d: decryption gives other bytes", size, off)
			}
		}
	}
}

// IEEE Std 1619-2007, vector 10: XTS-AES-256, data unit ff, 512 bytes 00..ff twice.
func TestIEEEVector(t *testing.T) {
	key, _ := hex.DecodeString("2718281828459045235360287471352662497757247093699959574966967627" +
		"3141592653589793238462643383279502884197169399375105820974944592")
	c, err := New(key)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 512)
	for i := range data {
		data[i] = byte(i)
	}
	c.Encrypt(data, 0xff*512, 512)
	if got := hex.EncodeToString(data[:16]); got != "1c3b3a102f770386e4836c99e370cf9b" {
		t.Errorf("first block %s", got)
	}
}

func TestNewRefusesOtherKeySizes(t *testing.T) {
	for _, n := range []int{0, 32, 63, 65} {
		if _, err := New(make([]byte, n)); err == nil {
			t.Errorf("key of %d bytes accepted", n)
		}
	}
}

func TestPartSectorsPanic(t *testing.T) {
	c, _ := New(random(1, KeySize))
	for name, f := range map[string]func(){
		"length": func() { c.Encrypt(make([]byte, 4095), 0, 4096) },
		"offset": func() { c.Encrypt(make([]byte, 4096), 512, 4096) },
		"size":   func() { c.Encrypt(make([]byte, 100), 0, 100) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			f()
		})
	}
}

func BenchmarkEncrypt(b *testing.B) {
	c, _ := New(random(1, KeySize))
	buf := make([]byte, 1<<20)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		c.Encrypt(buf, 0, 4096)
	}
}
