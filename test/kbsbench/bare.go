package kbsbench

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"time"
)

// serverCert makes a P-256 certificate as the embedded KBS has one.
func serverCert() (tls.Certificate, *x509.CertPool, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots, nil
}

// Bytes of a bare exchange: about what a key release with SNP evidence needs.
const up, down = 16 << 10, 4 << 10

// bare is a TLS server that takes up bytes and gives down bytes, over and over:
// the floor under every protocol.
type bare struct {
	l     net.Listener
	roots *x509.CertPool
}

func startBare() (*bare, error) {
	cert, roots, err := serverCert()
	if err != nil {
		return nil, err
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for {
					if _, err := io.CopyN(io.Discard, c, up); err != nil {
						return
					}
					if _, err := c.Write(make([]byte, down)); err != nil {
						return
					}
				}
			}()
		}
	}()
	return &bare{l, roots}, nil
}

func (b *bare) dial() (net.Conn, error) {
	return tls.Dial("tcp", b.l.Addr().String(), &tls.Config{RootCAs: b.roots, ServerName: "127.0.0.1"})
}

func exchange(c net.Conn) error {
	if _, err := c.Write(make([]byte, up)); err != nil {
		return err
	}
	_, err := io.CopyN(io.Discard, c, down)
	return err
}

// fresh is an exchange on a new connection.
func (b *bare) fresh() error {
	c, err := b.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	return exchange(c)
}
