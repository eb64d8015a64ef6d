// Package simport is the line protocol between a guest of the simulated platform
// and the host process that signs its reports. It runs over a virtio port, one
// request at a time:
//
//	guest: {"report_data":"<128 hex>","vmpl":0}
//	host:  {"report":"<base64>","certs":"<base64>"}   or   {"error":"<text>"}
//
// report has the 1184 bytes of an SNP report, certs the certificate table that
// Linux would hand out. The package signs and verifies nothing.
package simport

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"coffer/internal/snp"
	"coffer/internal/strict"
)

// PortName is the name of the virtio port.
const PortName = "coffer.sim"

// maxLine bounds a line of either side, with its newline.
const maxLine = 64 << 10

// ErrProtocol means that the other side does not speak this protocol.
var ErrProtocol = errors.New("simulated platform: protocol error")

type request struct {
	ReportData string `json:"report_data"`
	VMPL       int    `json:"vmpl"`
}

type answer struct {
	Report []byte `json:"report,omitempty"`
	Certs  []byte `json:"certs,omitempty"`
	Error  string `json:"error,omitempty"`
}

// Request asks for a report. It checks that the report is one on reportData and
// vmpl, so that a late answer to a request that someone gave up is not taken
// for this one's. The caller sets deadlines on rw.
func Request(rw io.ReadWriter, reportData [64]byte, vmpl int) (report, certs []byte, err error) {
	if err := writeLine(rw, request{hex.EncodeToString(reportData[:]), vmpl}); err != nil {
		return nil, nil, fmt.Errorf("ask the simulated platform for a report: %w", err)
	}
	in := bufio.NewReaderSize(rw, maxLine)
	line, err := readLine(in)
	if err != nil {
		return nil, nil, fmt.Errorf("wait for the simulated platform's report: %w", err)
	}
	if in.Buffered() > 0 {
		return nil, nil, fmt.Errorf("%w: more than one line in answer to one request", ErrProtocol)
	}
	var a answer
	if err := decode(line, &a); err != nil {
		return nil, nil, err
	}
	if a.Error != "" {
		return nil, nil, fmt.Errorf("simulated platform refuses a report: %.200q", a.Error)
	}
	r, err := snp.ParseReport(a.Report)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if r.ReportData != reportData || int64(r.VMPL) != int64(vmpl) {
		return nil, nil, fmt.Errorf("%w: the report answers another request", ErrProtocol)
	}
	return a.Report, a.Certs, nil
}

// Serve answers requests until the other side ends the connection, which is no
// error. sign's error goes to the guest; Serve goes on.
func Serve(rw io.ReadWriter, sign func(reportData [64]byte, vmpl int) (report, certs []byte, err error)) error {
	in := bufio.NewReaderSize(rw, maxLine)
	for {
		line, err := readLine(in)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := writeLine(rw, respond(line, sign)); err != nil {
			return err
		}
	}
}

func respond(line []byte, sign func([64]byte, int) (report, certs []byte, err error)) answer {
	var req request
	if err := decode(line, &req); err != nil {
		return answer{Error: err.Error()}
	}
	data, err := hex.DecodeString(req.ReportData)
	if err != nil || len(data) != 64 {
		return answer{Error: "report_data is not 64 bytes of hex"}
	}
	if req.VMPL < 0 || req.VMPL > 3 {
		return answer{Error: "vmpl is not one of 0 to 3"}
	}
	report, certs, err := sign([64]byte(data), req.VMPL)
	if err != nil {
		return answer{Error: err.Error()}
	}
	return answer{Report: report, Certs: certs}
}

// readLine returns a line without its newline, io.EOF where there is no more.
func readLine(in *bufio.Reader) ([]byte, error) {
	line, err := in.ReadSlice('\n')
	switch {
	case err == bufio.ErrBufferFull:
		return nil, fmt.Errorf("%w: a line of more than %d bytes", ErrProtocol, maxLine)
	case err == io.EOF && len(line) > 0:
		return nil, fmt.Errorf("%w: the connection ended within a line", ErrProtocol)
	case err != nil:
		return nil, err
	}
	return line[:len(line)-1], nil
}

func writeLine(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) >= maxLine {
		return fmt.Errorf("%w: a line of %d bytes", ErrProtocol, len(b))
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

func decode(line []byte, v any) error {
	if err := strict.JSON(line, v); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return nil
}
