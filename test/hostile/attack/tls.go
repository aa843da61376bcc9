package attack

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"time"
)

// TLS is how an attempt speaks TLS.
type TLS struct {
	ALPN []string `json:"alpn,omitempty"`
	// ID is the SPIFFE ID of a certificate that the attacker signed himself; Issuer names a CA of his own that signed it.
	ID     string `json:"id,omitempty"`
	Issuer string `json:"issuer,omitempty"`
	// Version12 speaks no newer one.
	Version12 bool `json:"version12,omitempty"`
	// Name is what is asked for by SNI.
	Name string `json:"name,omitempty"`
}

// tap keeps the first bytes that come.
type tap struct {
	net.Conn
	got []byte
}

func (t *tap) Read(b []byte) (int, error) {
	n, err := t.Conn.Read(b)
	if room := most - len(t.got); room > 0 {
		t.got = append(t.got, b[:min(n, room)]...)
	}
	return n, err
}

// client makes the handshake. What an app that does not speak TLS answers stands in Got.
func (c TLS) client(conn net.Conn, o *Outcome) (net.Conn, error) {
	raw := &tap{Conn: conn}
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: c.ALPN, ServerName: c.Name}
	if c.Version12 {
		config.MaxVersion = tls.VersionTLS12
	}
	if c.ID != "" {
		pair, err := c.forged()
		if err != nil {
			return nil, err
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	secure := tls.Client(raw, config)
	if err := secure.Handshake(); err != nil {
		const alert, handshake = 21, 22
		if len(raw.got) > 0 && raw.got[0] != alert && raw.got[0] != handshake {
			o.Got = raw.got
		}
		return nil, err
	}
	return secure, nil
}

// forged is a certificate for an ID, by nobody whom the mesh trusts.
func (c TLS) forged() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	id, err := url.Parse(c.ID)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{id},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	issuer, signer := template, key
	if c.Issuer != "" {
		if signer, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return tls.Certificate{}, err
		}
		issuer = &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: c.Issuer}, NotBefore: template.NotBefore, NotAfter: template.NotAfter,
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	}
	leaf, err := x509.CreateCertificate(rand.Reader, template, issuer, &key.PublicKey, signer)
	if err != nil {
		return tls.Certificate{}, err
	}
	pair := tls.Certificate{Certificate: [][]byte{leaf}, PrivateKey: key}
	if issuer != template {
		root, err := x509.CreateCertificate(rand.Reader, issuer, issuer, &signer.PublicKey, signer)
		if err != nil {
			return tls.Certificate{}, err
		}
		pair.Certificate = append(pair.Certificate, root)
	}
	return pair, nil
}
