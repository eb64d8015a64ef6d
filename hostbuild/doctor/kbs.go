package doctor

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"time"

	"coffer/hostbuild/register"
	"coffer/hostbuild/settings"
	"coffer/kbsclient"
)

const (
	kbsTime = 15 * time.Second
	// renewal is how long before its last day a certificate is spoken of.
	renewal = 30 * 24 * time.Hour
)

// KBS looks at the KBS of the settings: is it there, does its certificate come
// from kbs.ca, does it take the admin key? It stops at the first that fails.
func (h Host) KBS(ctx context.Context, s *settings.Settings) []Finding {
	ctx, cancel := context.WithTimeout(ctx, kbsTime)
	defer cancel()

	ca, err := os.ReadFile(s.KBSCA)
	roots := x509.NewCertPool()
	if err == nil && !roots.AppendCertsFromPEM(ca) {
		err = fmt.Errorf("%s holds no PEM certificate", s.KBSCA)
	}
	if err != nil {
		return []Finding{{Name: "kbs.ca", Status: Missing, Text: err.Error(), Do: "kbs.ca: the PEM file of the authority that signed the KBS's certificate; `hostbuild kbs init` makes ca.pem"}}
	}
	fs := []Finding{{Name: "kbs.ca", Status: OK, Text: s.KBSCA}}

	cert, err := h.certificate(ctx, s.KBSURL, roots)
	if err != nil {
		return append(fs, unreachable(s, err))
	}
	fs = append(fs, Finding{Name: "kbs.url", Status: OK, Text: fmt.Sprintf("%s answers; its certificate is valid until %s", s.KBSURL, cert.NotAfter.UTC().Format(time.DateOnly))})
	if left := cert.NotAfter.Sub(h.Now); left < renewal {
		fs = append(fs, Finding{Name: "kbs.url", Status: Note, Text: fmt.Sprintf("the KBS's certificate ends in %d days; then no guest boots", int(left.Hours()/24)), Do: "renew it: docs/operations.md, \"Certificates of the embedded KBS\""})
	}
	if guest, err := url.Parse(s.KBSGuestURL); err != nil || guest.Scheme != "https" {
		fs = append(fs, Finding{Name: "kbs.guest_url", Status: Missing, Text: fmt.Sprintf("%q is no https address", s.KBSGuestURL), Do: "kbs.guest_url: https://host:port"})
	} else if s.KBSGuestURL != s.KBSURL && cert.VerifyHostname(guest.Hostname()) != nil {
		fs = append(fs, Finding{Name: "kbs.guest_url", Status: Note, Text: fmt.Sprintf("the certificate seen at %s does not name %s; unless guests meet another one there, their boots end in E_KBS_TLS", s.KBSURL, guest.Hostname()),
			Do: "give the KBS a certificate with both names (`hostbuild kbs init --host ... --host ...`)"})
	}
	if st, err := os.Stat(s.AdminKey); err == nil && st.Mode()&0o077 != 0 {
		fs = append(fs, Finding{Name: "kbs.admin_key", Status: Note, Text: s.AdminKey + " can be read by others", Do: "chmod 600 " + s.AdminKey})
	}
	r, err := register.Open(s)
	if err == nil {
		err = r.Check(ctx)
	}
	if err != nil {
		do := "kbs.admin_key: the key whose public half the KBS has; with Trustee also kbs.admin_issuer and kbs.admin_audience"
		if errors.Is(err, kbsclient.ErrUnreachable) || errors.Is(err, kbsclient.ErrProtocol) {
			do = "is it a KBS that listens there?"
		}
		return append(fs, Finding{Name: "kbs.admin_key", Status: Missing, Text: err.Error(), Do: do})
	}
	return append(fs, Finding{Name: "kbs.admin_key", Status: OK, Text: s.AdminKey + " is accepted"})
}

// certificate is the one that the server shows, verified.
func (h Host) certificate(ctx context.Context, address string, roots *x509.CertPool) (*x509.Certificate, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" {
		return nil, fmt.Errorf("%q is no https address", address)
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	d := tls.Dialer{Config: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12, Time: func() time.Time { return h.Now }}}
	c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
}

func unreachable(s *settings.Settings, err error) Finding {
	f := Finding{Name: "kbs.url", Status: Missing, Text: fmt.Sprintf("%s: %v", s.KBSURL, err)}
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &authority):
		f.Do = "kbs.ca: the authority that this KBS's certificate comes from; or something else answers there"
	case errors.As(err, &name):
		f.Do = "kbs.url: a name that the certificate has, or give the KBS a certificate with this one"
	case errors.As(err, &invalid):
		f.Do = "look at this host's clock; renew the certificate: docs/operations.md, \"Certificates of the embedded KBS\""
	default:
		f.Do = "start the KBS (`hostbuild kbs serve`), correct kbs.url, or open the firewall between"
	}
	return f
}
