package simport

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"coffer/internal/snp"
)

// signer makes unsigned reports on what is asked.
func signer(data [64]byte, vmpl int) (report, certs []byte, err error) {
	if vmpl == 3 {
		return nil, nil, errors.New("not today")
	}
	r := snp.Report{Version: 3, ReportData: data, VMPL: uint32(vmpl)}
	return r.Marshal(), []byte("certs"), nil
}

func pipe(t *testing.T) (guest, host net.Conn) {
	guest, host = net.Pipe()
	deadline := time.Now().Add(30 * time.Second)
	guest.SetDeadline(deadline)
	host.SetDeadline(deadline)
	t.Cleanup(func() { guest.Close(); host.Close() })
	return guest, host
}

func TestRequestAndServe(t *testing.T) {
	guest, host := pipe(t)
	served := make(chan error, 1)
	go func() { served <- Serve(host, signer) }()
	for vmpl := range 3 {
		want := [64]byte{1, 2, byte(vmpl)}
		b, certs, err := Request(guest, want, vmpl)
		if err != nil {
			t.Fatal(err)
		}
		r, err := snp.ParseReport(b)
		if err != nil || r.ReportData != want || r.VMPL != uint32(vmpl) || string(certs) != "certs" {
			t.Errorf("vmpl %d: report %+v, certs %q, %v", vmpl, r, certs, err)
		}
	}
	if _, _, err := Request(guest, [64]byte{}, 3); err == nil || !strings.Contains(err.Error(), "not today") {
		t.Errorf("the signer's refusal does not arrive: %v", err)
	}
	if _, _, err := Request(guest, [64]byte{}, 0); err != nil {
		t.Errorf("no report after a refusal: %v", err)
	}
	guest.Close()
	if err := <-served; err != nil {
		t.Errorf("Serve ends with %v", err)
	}
}

// conversation plays one side: what is read from it is fixed.
type conversation struct {
	io.Reader
	io.Writer
}

func TestServeRefuses(t *testing.T) {
	zeros := strings.Repeat("00", 64)
	for name, line := range map[string]string{
		"no JSON":        `report please`,
		"unknown field":  `{"report_data":"` + zeros + `","vmpl":0,"policy":1}`,
		"trailing data":  `{"report_data":"` + zeros + `","vmpl":0} {}`,
		"short data":     `{"report_data":"` + zeros[2:] + `","vmpl":0}`,
		"data not hex":   `{"report_data":"zz` + zeros[2:] + `","vmpl":0}`,
		"vmpl 4":         `{"report_data":"` + zeros + `","vmpl":4}`,
		"vmpl negative":  `{"report_data":"` + zeros + `","vmpl":-1}`,
		"vmpl no number": `{"report_data":"` + zeros + `","vmpl":"0"}`,
	} {
		var out bytes.Buffer
		if err := Serve(conversation{strings.NewReader(line + "\n"), &out}, signer); err != nil {
			t.Errorf("%s: Serve ends with %v", name, err)
		}
		if !strings.HasPrefix(out.String(), `{"error":"`) || strings.Count(out.String(), "\n") != 1 {
			t.Errorf("%s: answer %q", name, out.String())
		}
	}
	for name, in := range map[string]string{
		"endless line": strings.Repeat("x", maxLine+1),
		"half a line":  `{"report_data":`,
	} {
		var out bytes.Buffer
		if err := Serve(conversation{strings.NewReader(in), &out}, signer); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: Serve ends with %v, want %v", name, err, ErrProtocol)
		}
	}
}

func TestRequestRefuses(t *testing.T) {
	var other bytes.Buffer // the answer to another request
	report, _, _ := signer([64]byte{9}, 0)
	if err := writeLine(&other, answer{Report: report}); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		in   string
		want error
	}{
		"nothing":            {"", io.EOF},
		"no JSON":            {"hello\n", ErrProtocol},
		"empty object":       {"{}\n", ErrProtocol},
		"short report":       {`{"report":"AAAA","certs":""}` + "\n", ErrProtocol},
		"report not base64":  {`{"report":"?","certs":""}` + "\n", ErrProtocol},
		"of another request": {other.String(), ErrProtocol},
		"two lines":          {other.String() + other.String(), ErrProtocol},
		"endless line":       {strings.Repeat("x", maxLine+1), ErrProtocol},
	} {
		_, _, err := Request(conversation{strings.NewReader(tc.in), io.Discard}, [64]byte{}, 0)
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}

func FuzzServe(f *testing.F) {
	f.Add([]byte(`{"report_data":"` + strings.Repeat("00", 64) + `","vmpl":0}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var out bytes.Buffer
		err := Serve(conversation{bytes.NewReader(b), &out}, signer)
		if answers := bytes.Count(out.Bytes(), []byte("\n")); err == nil && answers != bytes.Count(b, []byte("\n")) {
			t.Errorf("%d answers to %d lines", answers, bytes.Count(b, []byte("\n")))
		}
	})
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"report":"AAAA","certs":""}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		report, _, err := Request(conversation{bytes.NewReader(b), io.Discard}, [64]byte{}, 0)
		if err == nil && len(report) != snp.ReportSize {
			t.Errorf("accepted a report of %d bytes", len(report))
		}
	})
}
