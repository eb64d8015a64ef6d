package evidence

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"coffer/internal/snp"
	"coffer/test/simsnp"
)

// answerTo makes a report that answers a request.
func answerTo(reportData [64]byte, vmpl int) []byte {
	r := snp.Report{Version: 3, Policy: 0x30000, CPUFamily: 0x19, CPUModel: 0x11, VMPL: uint32(vmpl), ReportData: reportData}
	return r.Marshal()
}

var testData = [64]byte(bytes.Repeat([]byte{0x5a}, 64))

// fakeTSM is a configfs in which the kernel's part is played by prepared files.
func fakeTSM(t *testing.T, files map[string]string) (s tsm, removed func() map[string]string) {
	t.Helper()
	root := t.TempDir()
	left := map[string]string{}
	s = tsm{
		mkdir: func() (string, error) {
			dir, err := os.MkdirTemp(root, "x")
			if err != nil {
				return "", err
			}
			for name, content := range files {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
					return "", err
				}
			}
			return dir, nil
		},
		rmdir: func(dir string) error {
			for name := range files {
				b, err := os.ReadFile(filepath.Join(dir, name))
				if err != nil {
					return err
				}
				left[name] = string(b)
			}
			return os.RemoveAll(dir)
		},
	}
	return s, func() map[string]string {
		if entries, err := os.ReadDir(root); err != nil || len(entries) > 0 {
			t.Errorf("requests left behind: %v %v", entries, err)
		}
		return left
	}
}

func good(vmpl int) map[string]string {
	return map[string]string{
		"inblob": "", "privlevel": "", "provider": "sev_guest\n", "generation": "2\n",
		"outblob": string(answerTo(testData, vmpl)), "auxblob": "certificates",
	}
}

func TestTSM(t *testing.T) {
	without := func(name string) map[string]string { m := good(1); delete(m, name); return m }
	with := func(name, content string) map[string]string { m := good(1); m[name] = content; return m }
	for _, c := range []struct {
		name  string
		files map[string]string
		certs string
		want  error // nil: a report
	}{
		{"report and certificates", good(1), "certificates", nil},
		{"the host gives no certificates", with("auxblob", ""), "", nil},
		{"no such attribute", without("auxblob"), "", nil},
		{"somebody else wrote too", with("generation", "3\n"), "", ErrReport},
		{"another platform", with("provider", "tdx_guest\n"), "", ErrReport},
		{"certificates beyond the limit", with("auxblob", strings.Repeat("x", maxBlob+1)), "", ErrReport},
		{"no report", without("outblob"), "", fs.ErrNotExist},
		{"no VMPL to ask for", without("privlevel"), "", fs.ErrNotExist},
		{"short report", with("outblob", "short"), "", snp.ErrReportSize},
		{"report over other data", with("outblob", string(answerTo([64]byte{1}, 1))), "", ErrReport},
		{"report of another VMPL", with("outblob", string(answerTo(testData, 0))), "", ErrReport},
	} {
		t.Run(c.name, func(t *testing.T) {
			fake, left := fakeTSM(t, c.files)
			report, certs, err := newSource(TEESNP, false, fake.report).Report(t.Context(), testData, 1)
			written := left()
			if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if err != nil {
				return
			}
			if !bytes.Equal(report, answerTo(testData, 1)) || string(certs) != c.certs {
				t.Errorf("report %x..., certificates %q", report[:16], certs)
			}
			if written["inblob"] != string(testData[:]) || written["privlevel"] != "1" {
				t.Errorf("asked with %x at VMPL %q", written["inblob"], written["privlevel"])
			}
		})
	}
}

func TestTSMWithoutProvider(t *testing.T) {
	s := newSource(TEESNP, false, newTSM(filepath.Join(t.TempDir(), "missing")).report)
	if _, _, err := s.Report(t.Context(), testData, 0); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "no SEV-SNP guest") {
		t.Errorf("%v", err)
	}
}

func TestReportRange(t *testing.T) {
	s := newSource(TEESNP, false, func(context.Context, [64]byte, int) ([]byte, []byte, error) { panic("asked") })
	for _, vmpl := range []int{-1, 4} {
		if _, _, err := s.Report(t.Context(), testData, vmpl); err == nil {
			t.Errorf("VMPL %d was asked for", vmpl)
		}
	}
}

// Requests do not overlap, even when one of them was given up: the driver would
// disable its key.
func TestOneRequestAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running, most atomic.Int32
		s := newSource(TEESNP, false, func(_ context.Context, data [64]byte, vmpl int) ([]byte, []byte, error) {
			most.Store(max(most.Load(), running.Add(1)))
			defer running.Add(-1)
			time.Sleep(time.Minute) // the kernel knows no context
			return answerTo(data, vmpl), nil, nil
		})
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := s.Report(short, testData, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("first: %v", err)
		}
		if _, _, err := s.Report(short, testData, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("second: %v", err)
		}
		if _, _, err := s.Report(t.Context(), testData, 0); err != nil {
			t.Errorf("third: %v", err)
		}
		if most.Load() != 1 {
			t.Errorf("%d requests at once", most.Load())
		}
	})
}

func TestEvidence(t *testing.T) {
	digest := [48]byte(bytes.Repeat([]byte{0x77}, 48))
	var asked [64]byte
	s := newSource(TEESNP, false, func(_ context.Context, data [64]byte, vmpl int) ([]byte, []byte, error) {
		asked = data
		return answerTo(data, vmpl), nil, nil
	})
	raw, err := s.Evidence(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(asked[:48], digest[:]) || asked[48] != 0 || asked[63] != 0 {
		t.Errorf("report data %x, want the digest and 16 zeros", asked)
	}
	report, certs, err := snp.ParseEvidenceJSON(raw)
	if err != nil || !bytes.Equal(report, answerTo(asked, 0)) || len(certs) != 0 {
		t.Errorf("evidence holds another report, %d certificates: %v", len(certs), err)
	}

	t.Run("broken certificate table", func(t *testing.T) {
		s := newSource(TEESNP, false, func(_ context.Context, data [64]byte, vmpl int) ([]byte, []byte, error) {
			return answerTo(data, vmpl), []byte("not a table"), nil
		})
		if _, err := s.Evidence(t.Context(), digest); !errors.Is(err, snp.ErrCertTable) {
			t.Errorf("%v, want %v", err, snp.ErrCertTable)
		}
	})
}

func TestSampleEvidence(t *testing.T) {
	digest := [48]byte{1, 2, 3}
	s := newSource(TEESample, true, nil)
	raw, err := s.Evidence(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]string
	if err := json.Unmarshal(raw, &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got["svn"] != "1" || got["report_data"] != base64.StdEncoding.EncodeToString(digest[:]) {
		t.Errorf("%v", got)
	}
	if _, _, err := s.Report(t.Context(), testData, 0); !errors.Is(err, ErrNoReport) {
		t.Errorf("report: %v, want %v", err, ErrNoReport)
	}
}

// A build opens its own platform and no other.
func TestOpen(t *testing.T) {
	for _, platform := range []string{"snp", "simulated", ""} {
		for _, tee := range []string{TEESNP, TEESample, ""} {
			s, err := Open(platform, tee)
			want := platform == Platform && (tee == TEESNP || tee == TEESample && Platform == "simulated")
			if (err == nil) != want || err != nil && !errors.Is(err, ErrPlatform) {
				t.Errorf("Open(%q, %q): %v, want success %v", platform, tee, err, want)
			}
			if err == nil && (s.TEE() != tee || s.Simulated() != (Platform == "simulated")) {
				t.Errorf("Open(%q, %q): TEE %q, simulated %v", platform, tee, s.TEE(), s.Simulated())
			}
		}
	}
}

// TestCarry: a certificate that was carried takes the place of the host's where it
// signed the report, and nowhere else.
func TestCarry(t *testing.T) {
	chip, other := newChip(t), newChip(t)
	vcek := func(c *simsnp.Chip) []byte {
		for _, cert := range c.Certs() {
			if cert.Type == snp.VCEK {
				return cert.Data
			}
		}
		t.Fatal("a chip without a certificate")
		return nil
	}
	ask := snp.Cert{Type: snp.ASK, Data: bytes.Repeat([]byte{1}, 40)}
	host := snp.MarshalCertTable([]snp.Cert{ask, {Type: snp.VCEK, Data: bytes.Repeat([]byte{2}, 40)}})
	for _, tc := range []struct {
		name    string
		carried [][]byte
		want    []byte
	}{
		{"none", nil, host},
		{"of another chip", [][]byte{vcek(other)}, host},
		{"of this chip", [][]byte{vcek(other), vcek(chip)}, snp.MarshalCertTable([]snp.Cert{ask, {Type: snp.VCEK, Data: vcek(chip)}})},
	} {
		s := newSource(TEESNP, true, func(_ context.Context, data [64]byte, vmpl int) ([]byte, []byte, error) {
			r, err := chip.Report([48]byte{1}, data, uint32(vmpl))
			if err != nil {
				return nil, nil, err
			}
			return r.Marshal(), host, nil
		})
		if err := Carry(s, tc.carried); err != nil {
			t.Fatal(err)
		}
		if _, table, err := s.Report(t.Context(), testData, 0); err != nil || !bytes.Equal(table, tc.want) {
			t.Errorf("%s: table %x, %v", tc.name, table, err)
		}
	}
	if err := Carry(newSource(TEESNP, true, nil), [][]byte{{1}}); err == nil {
		t.Error("no certificate was taken for one")
	}
}

func newChip(t *testing.T) *simsnp.Chip {
	t.Helper()
	chip, err := simsnp.New(simsnp.Params{})
	if err != nil {
		t.Fatal(err)
	}
	return chip
}
