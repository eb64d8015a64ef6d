package rim_test

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"coffer/internal/gpu"
	"coffer/internal/gpu/rim"
	"coffer/internal/testenv"
	"coffer/test/gpusim"
)

// TestCanonical has the cases of Canonical XML 1.1, section 3, that the subset of
// XML has, and what canonicalization is known to go wrong with.
func TestCanonical(t *testing.T) {
	for _, m := range []struct{ name, in, want string }{
		{"empty element", `<a/>`, `<a></a>`},
		{"white space in tags", "<a  b = 'x'\n>\n <c  />\n</a >", "<a b=\"x\">\n <c></c>\n</a>"},
		{"declaration and white space around", "<?xml version=\"1.0\"?>\n<a></a>\n\n", "<a></a>"},
		{"line ends", "<a>\r\n\r</a>", "<a>\n\n</a>"},
		{"attributes sorted by namespace, then name", `<a xmlns:b="http://b" xmlns:a="http://a" a:z="1" b:y="2" c="3" a:y="4"/>`, `<a xmlns:a="http://a" xmlns:b="http://b" c="3" a:y="4" a:z="1" b:y="2"></a>`},
		{"sorted by namespace, not prefix", `<a xmlns:a="http://z" xmlns:b="http://b" a:x="1" b:x="2"/>`, `<a xmlns:a="http://z" xmlns:b="http://b" b:x="2" a:x="1"></a>`},
		{"superfluous declarations", `<a xmlns="http://a" xmlns:p="http://p"><b xmlns="http://a" xmlns:p="http://p"/></a>`, `<a xmlns="http://a" xmlns:p="http://p"><b></b></a>`},
		{"default taken back", `<a xmlns="http://a"><b xmlns=""><c xmlns=""/></b></a>`, `<a xmlns="http://a"><b xmlns=""><c></c></b></a>`},
		{"empty default at the root", `<a xmlns=""><b xmlns=""/></a>`, `<a><b></b></a>`},
		{"prefix bound anew", `<a xmlns:p="http://1"><p:b xmlns:p="http://2"><p:c xmlns:p="http://1"/></p:b></a>`, `<a xmlns:p="http://1"><p:b xmlns:p="http://2"><p:c xmlns:p="http://1"></p:c></p:b></a>`},
		{"unused declaration stays", `<a><b xmlns:u="http://u"/></a>`, `<a><b xmlns:u="http://u"></b></a>`},
		{"characters in text", `<a>&amp;&lt;&gt;&quot;&apos;&#xD;&#9;é&#x20AC;</a>`, "<a>&amp;&lt;&gt;\"'&#xD;\té€</a>"},
		{"characters in values", `<a b="&amp;&lt;>&quot;'&#xA;&#xD;&#9;" c='"'/>`, `<a b="&amp;&lt;>&quot;'&#xA;&#xD;&#x9;" c="&quot;"></a>`},
		{"white space in values", "<a b=\"x\ty\nz\"/>", `<a b="x y z"></a>`},
	} {
		got, err := rim.Canonical([]byte(m.in))
		if err != nil || string(got) != m.want {
			t.Errorf("%s:\n got %s\nwant %s\n%v", m.name, got, m.want, err)
		}
	}
}

func TestRefusedXML(t *testing.T) {
	for _, in := range []string{
		"", "a", "<a>", "<a", "<a b", "<a b=", "<a b='", "<a></b>", "<a/><b/>", "<a/>x", "x<a/>",
		"<a><!-- c --></a>", "<!DOCTYPE a><a/>", "<a><?p?></a>", "<a><![CDATA[x]]></a>", "<a>]]></a>",
		"<a b='1' b='2'/>", "<a xmlns:p='u' xmlns:q='u' p:b='1' q:b='2'/>", "<p:a/>", "<a p:b='1'/>",
		"<a xml:lang='x'/>", "<a xmlns:xml='u'/>", "<a xmlns:xmlns='u'/>", "<a xmlns:p=''/>", "<a xmlns='u' xmlns='v'/>",
		"<a:b:c/>", "<:a/>", "<a:/>", "<a b='<'/>", "<a>&x;</a>", "<a>&amp</a>", "<a>&#0;</a>", "<a>&#xD800;</a>", "<a>&#x110000;</a>",
		"<a>\x01</a>", "<a>\xff</a>", "<é/>", "<a b='1'c='2'/>", "<a b=1/>", "< a/>", "<?xml version='1.1'?><a/>",
		"<?xml version='1.0' encoding='utf-16'?><a/>", " <?xml version='1.0'?><a/>", "\ufeff<a/>",
		strings.Repeat("<a>", 20) + strings.Repeat("</a>", 20), "<a>" + strings.Repeat("<b/>", 5000) + "</a>",
	} {
		if out, err := rim.Canonical([]byte(in)); err == nil {
			t.Errorf("%.60q was read as %.60s", in, out)
		}
	}
}

// small is a signed RIM with few entries.
func small(w *gpusim.World) *gpusim.RIM {
	m := w.NewDevice(gpu.Hopper).DriverRIM()
	m.Entries = m.Entries[20:23]
	return m
}

// TestFlips flips a bit of every byte of a RIM and cuts it everywhere.
func TestFlips(t *testing.T) {
	w := gpusim.NewWorld()
	good := small(w).Sign(w.RIMChain)
	verify := func(data []byte) error {
		r, err := rim.Parse(data)
		if err != nil {
			return err
		}
		return r.Verify(w.RIMRoot.Cert, gpusim.Now)
	}
	if err := verify(good); err != nil {
		t.Fatal(err)
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		if verify(bad) == nil {
			t.Errorf("byte %d flipped (%q to %q) was accepted", i, good[i], bad[i])
		}
		if verify(good[:i]) == nil {
			t.Errorf("%d bytes of %d were accepted", i, len(good))
		}
	}
}

// TestMadeUpXMLSec has xmlsec1 confirm that made-up RIMs are signed as NVIDIA's are.
func TestMadeUpXMLSec(t *testing.T) {
	xmlsec := testenv.LookTool(t, "xmlsec1")
	w := gpusim.NewWorld()
	dir := t.TempDir()
	root, file := filepath.Join(dir, "root.pem"), filepath.Join(dir, "rim.xml")
	good := small(w).Sign(w.RIMChain)
	for name, data := range map[string][]byte{"good": good, "edited": bytes.Replace(good, []byte("True"), []byte("False"), 1)} {
		for path, content := range map[string][]byte{root: gpusim.PEM([]*gpusim.Authority{w.RIMRoot}), file: data} {
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		out, err := exec.Command(xmlsec, "--verify", "--trusted-pem", root, "--verification-time", gpusim.Now.Format(time.DateTime), file).CombinedOutput()
		if (err == nil) != (name == "good") {
			t.Errorf("%s: xmlsec1 says %v\n%s", name, err, out)
		}
	}
}

func TestDir(t *testing.T) {
	w := gpusim.NewWorld()
	dir := filepath.Join(t.TempDir(), "a[b]*")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	a, b := small(w), small(w)
	a.ID, b.ID = "NV_GPU_DRIVER_GH100_550.90", "NV_GPU_DRIVER_GH100_550.90.07"
	if err := (gpusim.RIMs{}).Add(w.RIMChain, a, a, a, b).Write(dir); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(filepath.Join(dir, b.ID+".2.xml.bak"), []byte("x"), 0o600)
	for _, m := range []struct {
		id   string
		pins []string
		want int
	}{
		{a.ID, nil, 3}, {b.ID, nil, 1}, {"NV_GPU_DRIVER_GH100_550.9", nil, 0}, {"NV_GPU", nil, 0}, {a.ID, []string{}, 0},
		{"../" + a.ID, nil, 0}, {"", nil, 0}, {".", nil, 0}, {"*", nil, 0}, {a.ID + "/x", nil, 0},
	} {
		files, err := rim.Dir{Path: dir, Pins: m.pins}.RIMs(t.Context(), m.id)
		if len(files) != m.want || (err == nil) != (m.want > 0) {
			t.Errorf("%q: %d files, want %d: %v", m.id, len(files), m.want, err)
		}
	}
	if _, err := (rim.Dir{Path: dir, Pins: []string{"00"}}).RIMs(t.Context(), b.ID); !errors.Is(err, rim.ErrNotFound) || !strings.Contains(err.Error(), b.ID+".xml is not one of the pinned") {
		t.Errorf("unpinned: %v", err)
	}
}

func TestService(t *testing.T) {
	w := gpusim.NewWorld()
	m := small(w)
	good := gpusim.RIMs{}.Add(w.RIMChain, m)
	for _, c := range []struct {
		name    string
		handler http.Handler
		id      string
		want    string // part of the error, "" for none
	}{
		{"known", good, m.ID, ""},
		{"unknown", good, "X", "no RIM of this id"},
		{"not an id", good, "../x", "not the id"},
		{"error", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }), m.ID, "500"},
		{"no JSON", say("<html>"), m.ID, "answer of"},
		{"other id", say(`{"id":"Y","rim":"eA==","rim_format":"TCG"}`), m.ID, `id "Y"`},
		{"other format", say(`{"id":"` + m.ID + `","rim":"eA==","rim_format":"CORIM"}`), m.ID, "CORIM"},
		{"nothing in it", say(`{"id":"` + m.ID + `","rim":"","rim_format":"TCG"}`), m.ID, "holds nothing"},
		{"endless", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for range 4000 {
				w.Write(bytes.Repeat([]byte(" "), 1024))
			}
		}), m.ID, "more than"},
	} {
		t.Run(c.name, func(t *testing.T) {
			server := httptest.NewServer(c.handler)
			defer server.Close()
			files, err := rim.Service{URL: server.URL, Client: server.Client()}.RIMs(t.Context(), c.id)
			if c.want == "" {
				if err != nil || len(files) != 1 || !bytes.Equal(files[0].Data, good[m.ID][0]) || len(files[0].SHA256) != 64 || files[0].Pinned {
					t.Errorf("%d files: %v", len(files), err)
				}
			} else if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
	server := httptest.NewServer(good)
	defer server.Close()
	if ids, err := (rim.Service{URL: server.URL, Client: server.Client()}).IDs(t.Context()); err != nil || len(ids) != 1 || ids[0] != m.ID {
		t.Errorf("ids %v, %v", ids, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (rim.Service{URL: server.URL, Client: server.Client()}).RIMs(ctx, m.ID); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func say(text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(text)) })
}

// TestCacheClock does not use what was kept under a clock that was set back.
func TestCacheClock(t *testing.T) {
	w := gpusim.NewWorld()
	m := small(w)
	source := gpusim.RIMs{}.Add(w.RIMChain, m)
	clock := gpusim.Now
	c := &rim.Cache{Source: source, TTL: time.Hour, Now: func() time.Time { return clock }}
	if _, err := c.RIMs(t.Context(), m.ID); err != nil {
		t.Fatal(err)
	}
	delete(source, m.ID)
	if _, err := c.RIMs(t.Context(), m.ID); err != nil {
		t.Errorf("not kept: %v", err)
	}
	clock = clock.Add(-time.Second)
	if _, err := c.RIMs(t.Context(), m.ID); !errors.Is(err, rim.ErrNotFound) {
		t.Errorf("clock set back: %v", err)
	}
}

// FuzzParse wants what is accepted to have a canonical form that is its own.
func FuzzParse(f *testing.F) {
	w := gpusim.NewWorld()
	f.Add(small(w).Sign(w.RIMChain))
	f.Add([]byte(`<?xml version="1.0"?><a xmlns="u" xmlns:p="v" p:b="&#xA;"><p:c xmlns="">x&amp;</p:c></a>`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := rim.Parse(data); err == nil {
			r.Verify(w.RIMRoot.Cert, gpusim.Now)
		} else if !errors.Is(err, rim.ErrFormat) {
			t.Fatalf("untyped error %v", err)
		}
		once, err := rim.Canonical(data)
		if err != nil {
			return
		}
		twice, err := rim.Canonical(once)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("the canonical form is not its own:\n%s\n%s\n%v", once, twice, err)
		}
	})
}
