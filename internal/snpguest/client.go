package snpguest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// maxAnswer bounds an answer of the agent.
const maxAnswer = 4 << 20

// errNoAgent means that nobody serves the socket: this is no Coffer guest.
var errNoAgent = errors.New("no Coffer agent serves the socket")

// ask calls the agent. A nil body is a GET.
func (r *run) ask(path string, query url.Values, body []byte) ([]byte, error) {
	var d net.Dialer
	conn, err := d.DialContext(r.ctx, "unix", r.Socket)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", errNoAgent, err)
		}
		return nil, err
	}
	// One connection for one request; nothing is left behind.
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		Dial:              func(string, string) (net.Conn, error) { return conn, nil },
	}}
	method := http.MethodGet
	if body != nil {
		method = http.MethodPost
	}
	u := url.URL{Scheme: "http", Host: "coffer", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(r.ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("the agent's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		var e struct {
			Error string `json:"error"`
		}
		if json.Unmarshal(answer, &e) != nil || e.Error == "" {
			e.Error = strings.TrimSpace(string(answer[:min(len(answer), 200)]))
		}
		return nil, fmt.Errorf("the agent answers %d: %s", resp.StatusCode, e.Error)
	}
	return answer, nil
}
