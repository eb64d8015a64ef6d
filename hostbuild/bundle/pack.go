package bundle

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"
	"time"
)

// Archive writes cvm_<id>.tgz: one gzip member that holds one tar, whose top
// folder is the CVM's id. Any tar of any age with -z reads it.
//
// The large drive comes first and in stored blocks, which have fixed places: it
// is written at its place in the archive while it is made, in any order (Member),
// and read once more for the checksums. All else is deflated behind it (Add).
type Archive struct {
	f     *os.File
	top   string
	mtime time.Time

	off  int64  // end of the stored part
	crc  uint32 // of the tar so far
	size uint32 // of the tar so far, modulo 2^32, as gzip wants it
	tail *tail
}

// Sizes in bytes. A stored block may have 65535 bytes; this divides clusters.
const (
	tarBlock    = 512
	storedBlock = 32 << 10
	storedHead  = 5
	framed      = storedHead + storedBlock
)

// NewArchive starts an archive in f, an empty file that can be read and written.
// All its times are mtime.
func NewArchive(f *os.File, top string, mtime time.Time) (*Archive, error) {
	a := &Archive{f: f, top: top, mtime: mtime}
	gzipHead := []byte{0x1f, 0x8b, 8 /* deflate */, 0, 0, 0, 0, 0, 0, 255 /* unknown system */}
	if _, err := f.WriteAt(gzipHead, 0); err != nil {
		return nil, err
	}
	a.off = int64(len(gzipHead))
	h, err := a.header(tar.Header{Typeflag: tar.TypeDir, Name: top + "/", Mode: 0o755})
	if err != nil {
		return nil, err
	}
	return a, a.store(h)
}

// header makes the one block of a member's header. GNU's form holds sizes of 8 GiB
// and more in it, where others take further blocks.
func (a *Archive) header(h tar.Header) ([]byte, error) {
	h.ModTime, h.Format = a.mtime, tar.FormatGNU
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&h); err != nil {
		return nil, err
	}
	if b.Len() != tarBlock {
		return nil, fmt.Errorf("%s: a tar header of %d bytes", h.Name, b.Len())
	}
	return b.Bytes(), nil
}

func (a *Archive) fileHeader(name string, mode, size int64) ([]byte, error) {
	return a.header(tar.Header{Typeflag: tar.TypeReg, Name: a.top + "/" + name, Mode: mode, Size: size})
}

// store appends a stored block of at most storedBlock bytes.
func (a *Archive) store(b []byte) error {
	a.count(b)
	out := append(storedHeader(len(b)), b...)
	_, err := a.f.WriteAt(out, a.off)
	a.off += int64(len(out))
	return err
}

func (a *Archive) count(b []byte) {
	a.crc = crc32.Update(a.crc, crc32.IEEETable, b)
	a.size += uint32(len(b))
}

// storedHeader begins a stored block that is not the last block.
func storedHeader(n int) []byte {
	b := make([]byte, storedHead)
	binary.LittleEndian.PutUint16(b[1:], uint16(n))
	binary.LittleEndian.PutUint16(b[3:], ^uint16(n))
	return b
}

// Member is a file of the archive that is written in place, before any Add and
// one after the other. What is not written reads as zero. WriteAt may be called
// concurrently.
type Member struct {
	a    *Archive
	name string
	mode int64
	base int64 // place of the first stored block in the archive
	size int64
}

// NewMember starts a member.
func (a *Archive) NewMember(name string, mode int64) *Member {
	return &Member{a: a, name: name, mode: mode, base: a.off + storedHead + tarBlock}
}

// place is where byte off of the member lies in the archive.
func (m *Member) place(off int64) int64 {
	return m.base + off/storedBlock*framed + storedHead + off%storedBlock
}

// WriteAt writes at an offset of the member.
func (m *Member) WriteAt(p []byte, off int64) (int, error) {
	buf := make([]byte, 0, min(len(p)+len(p)/storedBlock*storedHead+2*storedHead, 16*framed))
	for done := 0; done < len(p); {
		at := off + int64(done)
		start := m.place(at)
		if at%storedBlock == 0 {
			start -= storedHead
		}
		buf = buf[:0]
		for done < len(p) && cap(buf)-len(buf) > storedHead {
			at := off + int64(done)
			if at%storedBlock == 0 {
				buf = append(buf, storedHeader(storedBlock)...)
			}
			n := min(len(p)-done, storedBlock-int(at%storedBlock), cap(buf)-len(buf))
			buf = append(buf, p[done:done+n]...)
			done += n
		}
		if _, err := m.a.f.WriteAt(buf, start); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// Truncate sets the member's size. Truncate(0) also forgets what was written.
func (m *Member) Truncate(size int64) error {
	m.size = size
	if size == 0 {
		return m.a.f.Truncate(m.base)
	}
	return nil
}

// Close ends the member: it reads it once for the digests, and writes its header.
func (m *Member) Close() (File, error) {
	a := m.a
	head, err := a.fileHeader(m.name, m.mode, m.size)
	if err != nil {
		return File{}, err
	}
	if err := a.store(head); err != nil {
		return File{}, err
	}
	end := m.base + m.size + (m.size+storedBlock-1)/storedBlock*storedHead
	if err := a.f.Truncate(end); err != nil { // holes at the end become part of the file
		return File{}, err
	}
	sum, err := sumParts(m.size, partSize/storedBlock*framed, m.read, func(h hash.Hash, b []byte) {
		for ; len(b) > 0; b = b[min(framed, len(b)):] {
			h.Write(b[storedHead:min(framed, len(b))])
		}
	})
	if err != nil {
		return File{}, fmt.Errorf("read %s back: %w", m.name, err)
	}
	a.off = end
	if pad := -m.size & (tarBlock - 1); pad > 0 {
		if err := a.store(make([]byte, pad)); err != nil {
			return File{}, err
		}
	}
	return File{Name: m.name, Size: m.size, PartsSHA256: sum}, nil
}

// read reads and counts the blocks of n bytes at off, which begins a block. The
// last block of a member is short, and holes lack their headers: it writes those.
func (m *Member) read(buf []byte, off, n int64) ([]byte, error) {
	start := m.base + off/storedBlock*framed
	buf = buf[:n+(n+storedBlock-1)/storedBlock*storedHead]
	if _, err := m.a.f.ReadAt(buf, start); err != nil {
		return nil, err
	}
	for at := 0; at < len(buf); at += framed {
		block := buf[at:min(at+framed, len(buf))]
		if head := storedHeader(len(block) - storedHead); !bytes.Equal(block[:storedHead], head) {
			if _, err := m.a.f.WriteAt(head, start+int64(at)); err != nil {
				return nil, err
			}
		}
		m.a.count(block[storedHead:])
	}
	return buf, nil
}

// tail is the deflated end of the archive.
type tail struct {
	out *io.OffsetWriter
	buf *bufio.Writer
	z   *flate.Writer
}

// Add appends a file of size bytes.
func (a *Archive) Add(name string, mode int64, r io.Reader, size int64) (File, error) {
	if a.tail == nil {
		a.tail = &tail{out: io.NewOffsetWriter(a.f, a.off)}
		a.tail.buf = bufio.NewWriterSize(a.tail.out, 1<<18)
		a.tail.z, _ = flate.NewWriter(a.tail.buf, flate.BestSpeed) // no error for a level that there is
	}
	head, err := a.fileHeader(name, mode, size)
	if err != nil {
		return File{}, err
	}
	h := sha256.New()
	write := func(b []byte) error {
		a.count(b)
		_, err := a.tail.z.Write(b)
		return err
	}
	if err := write(head); err != nil {
		return File{}, err
	}
	n, err := io.Copy(io.MultiWriter(h, writerFunc(write)), r)
	if err != nil {
		return File{}, fmt.Errorf("pack %s: %w", name, err)
	}
	if n != size {
		return File{}, fmt.Errorf("pack %s: it has %d bytes instead of %d", name, n, size)
	}
	return File{Name: name, Size: size, SHA256: hex.EncodeToString(h.Sum(nil))}, write(make([]byte, -size&(tarBlock-1)))
}

type writerFunc func([]byte) error

func (f writerFunc) Write(b []byte) (int, error) { return len(b), f(b) }

// AddFile appends the host file at path.
func (a *Archive) AddFile(name string, mode int64, path string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return File{}, err
	}
	return a.Add(name, mode, f, st.Size())
}

// Close ends the archive. The file stays open.
func (a *Archive) Close() error {
	if a.tail == nil {
		return errors.New("bundle: an archive without files")
	}
	end := make([]byte, 2*tarBlock)
	a.count(end)
	if _, err := a.tail.z.Write(end); err != nil {
		return err
	}
	if err := a.tail.z.Close(); err != nil {
		return err
	}
	trailer := binary.LittleEndian.AppendUint32(nil, a.crc)
	a.tail.buf.Write(binary.LittleEndian.AppendUint32(trailer, a.size))
	if err := a.tail.buf.Flush(); err != nil {
		return err
	}
	n, err := a.tail.out.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	return a.f.Truncate(a.off + n)
}
