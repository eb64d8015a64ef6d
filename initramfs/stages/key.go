package stages

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"time"

	"coffer/internal/boot"
	"coffer/internal/evidence"
	"coffer/internal/firewall"
	"coffer/kbsclient"
)

const (
	// keyPatience is how long an unreachable KBS is asked again.
	keyPatience = 60 * time.Second
	keyPause    = time.Second // between two attempts
)

// errPassphrase says no more about the resource than its length.
var errPassphrase = errors.New("the key resource is not 128 lower-case hex characters")

// fetchKey asks the KBS for the disk's passphrase. Only silence is asked again:
// an answer is final.
func (g *guest) fetchKey(ctx context.Context) error {
	host, port, err := hostPort(g.cfg.KBS.URL)
	if err != nil {
		return boot.Fail(boot.CodeConfig, err)
	}
	patience, cancel := context.WithTimeout(ctx, keyPatience)
	defer cancel()
	var silence error
	for {
		resource, err := g.askKBS(patience, host, port)
		if err == nil {
			g.key, err = passphrase(resource)
			return err
		}
		if !errors.Is(err, kbsclient.ErrUnreachable) {
			return boot.Fail(kbsCode(err), err)
		}
		switch {
		case silence == nil:
			g.log.Printf("coffer: the KBS does not answer yet, asking for %s: %v", keyPatience, err)
			silence = err
		case patience.Err() == nil: // else the end of our patience is all that err tells
			silence = err
		}
		select {
		case <-time.After(keyPause):
		case <-patience.Done():
			return boot.Fail(boot.CodeKBSUnreachable, silence)
		}
	}
}

// askKBS lets the KBS's present addresses through the firewall and fetches the
// key from one of them.
func (g *guest) askKBS(ctx context.Context, host string, port uint16) ([]byte, error) {
	addrs, err := g.Lookup(ctx, host)
	if err != nil {
		return nil, fmt.Errorf("%w: look up %s: %w", kbsclient.ErrUnreachable, host, err)
	}
	var peers []netip.AddrPort
	for _, a := range addrs {
		peers = append(peers, netip.AddrPortFrom(a.Unmap(), port))
	}
	if err := g.Firewall(firewall.Rules{DHCP: g.dhcp(), DNS: g.net.DNS, KBS: peers}); err != nil {
		return nil, boot.Fail(boot.CodeFirewall, err)
	}
	return g.FetchKey(ctx, g.cfg.KBS, peers, attester{g.source})
}

// attester marks the errors that come from the platform and not from the KBS.
type attester struct{ evidence.Source }

func (a attester) Evidence(ctx context.Context, digest [48]byte) (json.RawMessage, error) {
	e, err := a.Source.Evidence(ctx, digest)
	return e, boot.Fail(boot.CodeEvidence, err)
}

func kbsCode(err error) boot.Code {
	for _, c := range []struct {
		is   error
		code boot.Code
	}{
		{kbsclient.ErrUnreachable, boot.CodeKBSUnreachable},
		{kbsclient.ErrClock, boot.CodeClock}, // is an ErrTLS too
		{kbsclient.ErrTLS, boot.CodeKBSTLS},
		{kbsclient.ErrAttestationRefused, boot.CodeKBSRefused},
		{kbsclient.ErrPolicyDenied, boot.CodeKBSDenied},
		{kbsclient.ErrNoResource, boot.CodeKBSNoKey},
	} {
		if errors.Is(err, c.is) {
			return c.code
		}
	}
	return boot.CodeKBSProtocol
}

// passphrase checks the form of the key resource. The result shares its memory.
func passphrase(resource []byte) ([]byte, error) {
	key := bytes.TrimSuffix(resource, []byte("\n"))
	ok := len(key) == 128
	for _, c := range key {
		ok = ok && ('0' <= c && c <= '9' || 'a' <= c && c <= 'f')
	}
	if !ok {
		clear(resource)
		return nil, fmt.Errorf("%w, it has %d bytes", errPassphrase, len(resource))
	}
	return key, nil
}

func hostPort(rawURL string) (string, uint16, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return "", 0, err
	}
	if u.Port() == "" {
		return u.Hostname(), 443, nil
	}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("port of %s: %w", rawURL, err)
	}
	return u.Hostname(), uint16(port), nil
}
