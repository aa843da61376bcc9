package ads

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	envoytls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
)

// Authority is a throw-away CA in memory.
type Authority struct {
	key   *ecdsa.PrivateKey
	cert  *x509.Certificate
	roots []byte
}

// NewAuthority makes a CA for one day.
func NewAuthority() (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "weft test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &Authority{key: key, cert: cert, roots: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, err
}

// Roots is the trust bundle in PEM.
func (a *Authority) Roots() []byte { return a.roots }

// Pool is the trust bundle for Go's TLS.
func (a *Authority) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// Issue makes a certificate with one SPIFFE ID: chain and key in PEM.
func (a *Authority) Issue(id string) (chain, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := a.Sign(id, private.Public())
	if err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), nil
}

// Sign makes a certificate with one SPIFFE ID for somebody's key, in DER.
func (a *Authority) Sign(id string, public any) ([]byte, error) {
	uri, err := url.Parse(id)
	if err != nil {
		return nil, fmt.Errorf("issue a certificate: %w", err)
	}
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, URIs: []*url.URL{uri},
	}, a.cert, public, a.key)
}

// KeyPair issues a certificate for Go's TLS.
func (a *Authority) KeyPair(id string) (tls.Certificate, error) {
	chain, key, err := a.Issue(id)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(chain, key)
}

// SVID issues a certificate as an SDS secret.
func (a *Authority) SVID(id string) (*envoytls.Secret, error) {
	chain, key, err := a.Issue(id)
	if err != nil {
		return nil, err
	}
	inline := func(b []byte) *core.DataSource {
		return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: b}}
	}
	return &envoytls.Secret{Name: id, Type: &envoytls.Secret_TlsCertificate{TlsCertificate: &envoytls.TlsCertificate{
		CertificateChain: inline(chain), PrivateKey: inline(key)}}}, nil
}

// Bundle is the trust bundle as an SDS secret.
func (a *Authority) Bundle(name string) *envoytls.Secret {
	return &envoytls.Secret{Name: name, Type: &envoytls.Secret_ValidationContext{ValidationContext: &envoytls.CertificateValidationContext{
		TrustedCa: &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: a.roots}}}}}
}
