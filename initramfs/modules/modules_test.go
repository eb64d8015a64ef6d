package modules_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"coffer/initramfs/modules"

	"github.com/ulikunitz/xz"
)

// ko is a file that has what is needed of a kernel module: an ELF header, a
// .modinfo section of the given entries and the section names.
func ko(entries ...string) []byte {
	var info []byte
	for _, e := range entries {
		info = append(append(info, e...), 0)
	}
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	const header, section = 64, 64
	table := header + len(info) + len(names)
	var b bytes.Buffer
	b.WriteString("\x7fELF\x02\x01\x01")
	b.Write(make([]byte, 9))
	le := func(v ...any) {
		for _, x := range v {
			binary.Write(&b, binary.LittleEndian, x)
		}
	}
	le(uint16(1), uint16(62), uint32(1), uint64(0), uint64(0), uint64(table), uint32(0), // ET_REL, x86-64
		uint16(header), uint16(0), uint16(0), uint16(section), uint16(3), uint16(2))
	b.Write(info)
	b.Write(names)
	b.Write(make([]byte, section))
	le(uint32(1), uint32(1), uint64(0), uint64(0), uint64(header), uint64(len(info)), uint32(0), uint32(0), uint64(1), uint64(0))
	le(uint32(10), uint32(3), uint64(0), uint64(0), uint64(header+len(info)), uint64(len(names)), uint32(0), uint32(0), uint64(1), uint64(0))
	return b.Bytes()
}

func pack(t *testing.T, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := xz.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestParseInfo(t *testing.T) {
	for _, test := range []struct {
		name, section string
		want          *modules.Info // nil: refused
	}{
		{"empty", "", &modules.Info{}},
		{"no dependency", "license=GPL\x00depends=\x00", &modules.Info{}},
		{"several", "depends=nf-tables,libcrc32c\x00", &modules.Info{Depends: []string{"nf_tables", "libcrc32c"}}},
		{"soft, both sides", "softdep=pre: crc32c crypto-xts post: late pre: early\x00", &modules.Info{SoftPre: []string{"crc32c", "crypto_xts", "early"}}},
		{"aliases", "alias=crypto-xts\x00alias=xts\x00", &modules.Info{Aliases: []string{"crypto_xts", "xts"}}},
		{"padding and values with =", "\x00\x00parm=a=b\x00", &modules.Info{}},
		{"no final NUL", "depends=a", &modules.Info{Depends: []string{"a"}}},
		{"no value", "depends\x00", nil},
		{"too long", strings.Repeat("\x00", 1<<20+1), nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := modules.ParseInfo([]byte(test.section))
			if (err == nil) != (test.want != nil) || test.want != nil && !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %+v, %v; want %+v", got, err, test.want)
			}
		})
	}
}

func TestReadInfoRefuses(t *testing.T) {
	whole := ko("depends=a")
	for name, data := range map[string][]byte{
		"no ELF":     []byte("#!/bin/sh\n"),
		"empty":      nil,
		"cut short":  whole[:len(whole)-70],
		"no modinfo": bytes.Replace(whole, []byte(".modinfo"), []byte(".another"), 1),
	} {
		if info, err := modules.ReadInfo(data); err == nil {
			t.Errorf("%s: got %+v, want an error", name, info)
		}
	}
}

func index(t *testing.T, builtin string, infos map[string][]string) *modules.Index {
	t.Helper()
	files := map[string][]byte{}
	for name, entries := range infos {
		files["lib/modules/1/kernel/"+name+".ko"] = ko(entries...)
	}
	x, err := modules.NewIndex(files, []byte(builtin), nil)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// order is what a load list would hold.
func order(t *testing.T, x *modules.Index, wanted ...string) string {
	t.Helper()
	list, err := x.Closure(wanted)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range list {
		if m.Optional {
			m.Name = modules.OptionalMark + m.Name
		}
		names = append(names, m.Name)
	}
	return strings.Join(names, " ")
}

func TestClosure(t *testing.T) {
	kernel := map[string][]string{
		"dm-mod":       {"depends="},
		"dm-crypt":     {"depends=dm-mod"},
		"xts":          {"depends=", "softdep=pre: ecb"},
		"crypto_simd":  {"depends=cryptd"},
		"cryptd":       {"depends="},
		"aesni-intel":  {"depends=crypto_simd,cryptd", "alias=crypto-aes"},
		"libcrc32c":    {"depends=", "softdep=pre: crc32c"},
		"crc32c-intel": {"depends=helper", "alias=crc32c", "alias=crypto-crc32c"},
		"helper":       {"depends="},
		"needs-all":    {"depends=helper,libcrc32c"},
		"uses-builtin": {"depends=ext4"},
		"dangling":     {"depends=", "softdep=pre: nobody"},
		"mutual-a":     {"depends=", "softdep=pre: mutual_b"},
		"mutual-b":     {"depends=mutual-a"},
	}
	x := index(t, "kernel/crypto/ecb.ko\nkernel/fs/ext4/ext4.ko\n", kernel)
	for _, test := range []struct {
		name   string
		wanted []string
		want   string
	}{
		{"dependency first, once", []string{"dm_crypt", "dm_mod"}, "dm_mod dm_crypt"},
		{"either spelling", []string{"dm-crypt"}, "dm_mod dm_crypt"},
		{"built in is left out", []string{"xts", "ext4", "uses_builtin"}, "xts uses_builtin"},
		{"optional takes its own along", []string{"-aesni_intel"}, "-cryptd -crypto_simd -aesni_intel"},
		{"required by another stays required", []string{"-aesni_intel", "cryptd"}, "cryptd -crypto_simd -aesni_intel"},
		{"soft dependency by alias is optional", []string{"libcrc32c"}, "-helper -crc32c_intel libcrc32c"},
		{"soft and hard is required", []string{"needs_all"}, "helper -crc32c_intel libcrc32c needs_all"},
		{"soft dependency that nobody has", []string{"dangling"}, "dangling"},
		{"soft dependency that leads back", []string{"mutual_a"}, "-mutual_b mutual_a"},
		{"nothing", nil, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := order(t, x, test.wanted...); got != test.want {
				t.Errorf("got  %q\nwant %q", got, test.want)
			}
		})
	}
}

func TestClosureRefuses(t *testing.T) {
	x := index(t, "", map[string][]string{
		"broken": {"depends=gone"},
	})
	for _, wanted := range []string{"gone", "-gone", "broken"} {
		if _, err := x.Closure([]string{wanted}); !errors.Is(err, modules.ErrNotFound) || !strings.Contains(err.Error(), "gone") {
			t.Errorf("%s: got %v, want ErrNotFound that names gone", wanted, err)
		}
	}
}

func TestModulesAreUnpackedAndUnchanged(t *testing.T) {
	signed := append(ko("depends="), "~Module signature appended~\n"...)
	x, err := modules.NewIndex(map[string][]byte{"a/one.ko.xz": pack(t, signed), "b/two.ko": signed}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	list, err := x.Closure([]string{"one", "two"})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range list {
		if !bytes.Equal(m.Data, signed) {
			t.Errorf("%s changed on its way", m.Name)
		}
	}
}

func TestNewIndexRefuses(t *testing.T) {
	good := pack(t, ko("depends="))
	for name, files := range map[string]map[string][]byte{
		"the same name twice": {"a/x-y.ko.xz": good, "b/x_y.ko.xz": good},
		"damaged xz":          {"x.ko.xz": good[:len(good)-9]},
		"no module":           {"x.ko": []byte("text")},
	} {
		if _, err := modules.NewIndex(files, nil, nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestKnownInfos(t *testing.T) {
	files := map[string][]byte{"a.ko": ko("depends=b"), "b.ko": ko("depends=")}
	x, err := modules.NewIndex(files, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	infos := x.Infos()
	if x, err = modules.NewIndex(files, nil, infos); err != nil || order(t, x, "a") != "b a" {
		t.Errorf("with its own infos: %v", err)
	}
	delete(infos, "b")
	infos["c"] = modules.Info{}
	if x, err = modules.NewIndex(files, nil, infos); err != nil || order(t, x, "a") != "b a" {
		t.Errorf("infos of other files were not ignored: %v", err)
	}
}

func FuzzParseInfo(f *testing.F) {
	f.Add([]byte("depends=a,b\x00softdep=pre: c post: d\x00alias=e\x00"))
	f.Add([]byte("depends"))
	f.Fuzz(func(t *testing.T, data []byte) {
		info, err := modules.ParseInfo(data)
		if err != nil {
			return
		}
		for _, name := range slices.Concat(info.Depends, info.SoftPre, info.Aliases) {
			if name == "" || strings.ContainsAny(name, "-\x00") {
				t.Errorf("name %q", name)
			}
		}
	})
}

func FuzzReadInfo(f *testing.F) {
	f.Add(ko("depends=a"))
	f.Add(ko())
	f.Fuzz(func(t *testing.T, data []byte) {
		if info, err := modules.ReadInfo(data); err == nil && info == nil {
			t.Error("neither info nor error")
		}
	})
}
