package ocsp_test

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"coffer/internal/gpu"
	"coffer/internal/gpu/ocsp"
	"coffer/internal/testenv"
	"coffer/test/gpusim"
)

func certificates(chain []*gpusim.Authority) (list []*x509.Certificate) {
	for _, a := range chain {
		list = append(list, a.Cert)
	}
	return list
}

func now() time.Time { return gpusim.Now }

// answering returns a client whose responder is a function.
func answering(answer func(question []byte) []byte) *ocsp.Client {
	return &ocsp.Client{URL: "http://responder.invalid", Now: now, Rand: rand.Reader, HTTP: &http.Client{Transport: transport(answer)}}
}

type transport func([]byte) []byte

func (f transport) RoundTrip(r *http.Request) (*http.Response, error) {
	question, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	w := httptest.NewRecorder()
	w.Write(f(question))
	return w.Result(), nil
}

// TestFlips flips a bit of every byte of an answer that says "revoked", and cuts it
// everywhere. Nothing of it may say "good". (Lengths of wrappers that the signature
// does not cover can change what is read little enough to leave it as it was.)
func TestFlips(t *testing.T) {
	w := gpusim.NewWorld()
	d := w.NewDevice(gpu.Hopper)
	responder := w.NewResponder(d)
	chain := certificates(d.Chain)
	responder.For(d.Chain[1:3], d.Chain[2])
	responder.Bare = true
	responder.Reasons = map[string]int{chain[1].SerialNumber.String(): 1}
	refused := 0
	size := 1
	for at := 0; at < 2*size; at++ {
		c := answering(func(q []byte) []byte {
			a := responder.Answer(q)
			size = len(a)
			if at < size {
				a[at] ^= 1
				return a
			}
			return a[:min(at-size, len(a)-1)] // signatures differ in length
		})
		_, err := c.Check(t.Context(), chain, 1)
		if err == nil {
			t.Errorf("step %d of %d was taken for good", at, 2*size)
		}
		if !errors.Is(err, ocsp.ErrRevoked) {
			refused++
		}
	}
	if refused < 2*size-20 {
		t.Errorf("only %d of %d were refused", refused, 2*size)
	}
}

// TestReplay gives a good answer to another question.
func TestReplay(t *testing.T) {
	w := gpusim.NewWorld()
	d := w.NewDevice(gpu.Hopper)
	responder := w.NewResponder(d)
	chain := certificates(d.Chain)
	var first []byte
	c := answering(func(q []byte) []byte {
		if first == nil {
			first = responder.Answer(q)
		}
		return first
	})
	if s, err := c.Check(t.Context(), chain, 1); err != nil || s.Cached || !s.Until.Equal(gpusim.Now.Add(time.Hour)) {
		t.Fatal(s, err)
	}
	if _, err := c.Check(t.Context(), chain, 1); !errors.Is(err, ocsp.ErrNonce) {
		t.Errorf("the same answer again: %v", err)
	}
	// An answer about another certificate, to the right nonce.
	c = answering(func(q []byte) []byte {
		return responder.Answer(bytes.Replace(q, chain[1].SerialNumber.Bytes(), chain[2].SerialNumber.Bytes(), 1))
	})
	if _, err := c.Check(t.Context(), chain, 1); err == nil {
		t.Error("an answer about another certificate was taken")
	}
	if _, err := c.Check(t.Context(), chain, 4); err == nil {
		t.Error("the root was asked about")
	}
}

// TestStoreIsNotTrusted puts answers of others into the store.
func TestStoreIsNotTrusted(t *testing.T) {
	w := gpusim.NewWorld()
	d := w.NewDevice(gpu.Hopper)
	responder := w.NewResponder(d)
	chain := certificates(d.Chain)
	dir := t.TempDir()
	c := answering(responder.Answer)
	c.Cache, c.MaxAge = ocsp.Dir(dir), time.Hour
	if _, err := c.Check(t.Context(), chain, 1); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	kept, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	responder.Reasons = map[string]int{chain[1].SerialNumber.String(): 1}
	if s, err := c.Check(t.Context(), chain, 1); err != nil || !s.Cached {
		t.Errorf("kept answer: %v", err)
	}
	for name, content := range map[string][]byte{"edited": append(bytes.Clone(kept[:len(kept)-1]), kept[len(kept)-1]^1), "empty": nil, "huge": make([]byte, 1<<20)} {
		if err := os.WriteFile(files[0], content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Check(t.Context(), chain, 1); !errors.Is(err, ocsp.ErrRevoked) {
			t.Errorf("%s answer in the store: %v", name, err)
		}
	}
	// The answer that it is revoked was kept too.
	responder.Reasons = nil
	if s, err := c.Check(t.Context(), chain, 1); !errors.Is(err, ocsp.ErrRevoked) || !s.Cached {
		t.Errorf("kept revocation: %v", err)
	}
}

// TestOpenSSL asks a responder of others.
func TestOpenSSL(t *testing.T) {
	openssl := testenv.LookTool(t, "openssl")
	w := gpusim.NewWorld()
	d := w.NewDevice(gpu.Hopper)
	issuer, signer := d.Chain[2], w.DeviceRoot.OCSPSigner()
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(signer.Key)
	if err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	subject := d.Chain[1].Cert
	for _, m := range []struct {
		name string
		line string // of openssl's database: state, expiry, revocation, serial, file, subject
		want error
	}{
		{"good", "V\t99991231235959Z\t\t%X\tunknown\t/CN=x\n", nil},
		{"revoked", "R\t99991231235959Z\t260501000000Z,keyCompromise\t%X\tunknown\t/CN=x\n", ocsp.ErrRevoked},
		{"hold", "R\t99991231235959Z\t260501000000Z,certificateHold\t%X\tunknown\t/CN=x\n", ocsp.ErrHold},
		{"unknown", "V\t99991231235959Z\t\t77%X\tunknown\t/CN=x\n", ocsp.ErrUnknown},
	} {
		t.Run(m.name, func(t *testing.T) {
			for name, content := range map[string][]byte{
				"index": fmt.Appendf(nil, m.line, subject.SerialNumber), "ca.pem": gpusim.PEM([]*gpusim.Authority{issuer}),
				"signer.pem": gpusim.PEM([]*gpusim.Authority{signer}), "key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
			} {
				if err := os.WriteFile(path(name), content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			c := answering(func(q []byte) []byte {
				if err := os.WriteFile(path("question"), q, 0o600); err != nil {
					t.Error(err)
				}
				out, err := exec.Command(openssl, "ocsp", "-index", path("index"), "-CA", path("ca.pem"), "-rsigner", path("signer.pem"), "-rkey", path("key.pem"),
					"-rmd", "sha384", "-reqin", path("question"), "-respout", path("answer"), "-ndays", "1").CombinedOutput()
				if err != nil {
					t.Errorf("openssl: %v\n%s", err, out)
				}
				a, err := os.ReadFile(path("answer"))
				if err != nil {
					t.Error(err)
				}
				return a
			})
			c.Now = time.Now
			if _, err := c.Check(t.Context(), certificates(d.Chain), 1); !errors.Is(err, m.want) {
				t.Errorf("error %v, want %v", err, m.want)
			}
		})
	}
}

func FuzzAnswer(f *testing.F) {
	w := gpusim.NewWorld()
	d := w.NewDevice(gpu.Hopper)
	chain := certificates(d.Chain)
	for _, edit := range []func(*gpusim.Responder){
		func(*gpusim.Responder) {},
		func(r *gpusim.Responder) { r.Reasons = map[string]int{chain[1].SerialNumber.String(): 6} },
		func(r *gpusim.Responder) { r.Refuse = 1 },
		func(r *gpusim.Responder) { r.NoNonce, r.Bare = true, true },
	} {
		r := w.NewResponder(d)
		edit(r)
		c := answering(func(q []byte) []byte {
			a := r.Answer(q)
			f.Add(a)
			return a
		})
		c.Check(f.Context(), chain, 1)
	}
	f.Fuzz(func(t *testing.T, a []byte) {
		if _, err := answering(func([]byte) []byte { return a }).Check(t.Context(), chain, 1); err == nil {
			t.Fatal("an answer to another question was taken")
		}
	})
}
