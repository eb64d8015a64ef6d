package disk

import (
	"bytes"
	"compress/gzip"
	"os"
	"testing"
)

// BenchmarkBuildRoot builds crypt_root from a gzip'd archive: the one that
// COFFER_BENCH_ARCHIVE names, or a made-up one of 128 MiB. MB/s counts the
// compressed bytes; compare with `gunzip -c ARCHIVE | sha256sum`.
func BenchmarkBuildRoot(b *testing.B) {
	name := os.Getenv("COFFER_BENCH_ARCHIVE")
	if name == "" {
		name = writeFile(b, "image.tar.gz", gzipped(b, dockerSave(b, makeTar(b, words(64, 2<<20)...))))
	}
	st, err := os.Stat(name)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(st.Size())
	for b.Loop() {
		p := params(b, name)
		p.Size = 32 << 30
		if _, err := BuildRoot(b.Context(), p); err != nil {
			b.Fatal(err)
		}
		os.Remove(p.file())
	}
}

// words makes n members of size bytes that compress about as programs do.
func words(n, size int) []tarMember {
	dictionary := randomBytes(1, 1<<16)
	var members []tarMember
	for i := range n {
		choice := randomBytes(byte(i), size/4)
		var data bytes.Buffer
		for _, c := range choice {
			at := int(c) * 200
			data.Write(dictionary[at : at+4+int(c)%9])
		}
		members = append(members, regular("data/"+string(rune('A'+i)), data.Bytes()[:size]))
	}
	return members
}

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}
