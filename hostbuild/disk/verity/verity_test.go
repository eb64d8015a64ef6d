package verity

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"coffer/internal/testenv"
)

// The oracle is veritysetup: the same root hash, superblock and tree.
func TestAgainstVeritysetup(t *testing.T) {
	veritysetup := testenv.LookTool(t, "veritysetup")
	salt := bytes.Repeat([]byte{0xab, 0xcd}, 16)
	for _, blocks := range []int64{2, 3, 127, 128, 129, 128*128 - 1, 128 * 128, 128*128 + 1} {
		t.Run(fmt.Sprint(blocks), func(t *testing.T) {
			data := make([]byte, blocks*BlockSize)
			rand.NewChaCha8([32]byte{1}).Read(data)
			var tree bytes.Buffer
			root, err := Write(&tree, Params{
				Salt: salt, UUID: [16]byte{0xaa, 15: 1}, Blocks: blocks,
				Leaves: bytes.NewReader(NewHasher(salt).Append(nil, data)),
			})
			if err != nil {
				t.Fatal(err)
			}
			if int64(tree.Len()) != TreeSize(blocks) {
				t.Errorf("%d bytes, TreeSize says %d", tree.Len(), TreeSize(blocks))
			}
			dir := t.TempDir()
			dataFile, treeFile := filepath.Join(dir, "data"), filepath.Join(dir, "tree")
			if err := os.WriteFile(dataFile, data, 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command(veritysetup, "format", "--salt", hex.EncodeToString(salt), "--uuid", "aa000000-0000-0000-0000-000000000001", dataFile, treeFile).CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if !strings.Contains(string(out), hex.EncodeToString(root[:])) {
				t.Errorf("root hash %x, veritysetup says\n%s", root, out)
			}
			want, err := os.ReadFile(treeFile)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(tree.Bytes(), want) {
				t.Errorf("another tree than veritysetup's: %d bytes, want %d", tree.Len(), len(want))
			}
		})
	}
}

func TestRefused(t *testing.T) {
	for name, p := range map[string]Params{
		"one block":  {Salt: make([]byte, SaltSize), Blocks: 1, Leaves: bytes.NewReader(make([]byte, HashSize))},
		"short salt": {Salt: make([]byte, 31), Blocks: 2, Leaves: bytes.NewReader(make([]byte, 2*HashSize))},
	} {
		if _, err := Write(new(bytes.Buffer), p); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func BenchmarkLeaves(b *testing.B) {
	h, data := NewHasher(make([]byte, SaltSize)), make([]byte, 1<<20)
	var out []byte
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		out = h.Append(out[:0], data)
	}
}
