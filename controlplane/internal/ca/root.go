// Package ca is the built-in certificate authority: it keeps the roots in one Secret, publishes the trust bundle, attests
// node agents, and issues SVIDs for the service accounts that have an enrolled pod on the asking agent's node.
package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	rootLife = 10 * 365 * 24 * time.Hour
	// backdate allows for clocks that differ.
	backdate = 5 * time.Minute
)

// Root is one CA certificate; only the signer has its key here.
type Root struct {
	Certificate *x509.Certificate
	Key         crypto.Signer
}

// NewRoot makes a self-signed root for a trust domain.
func NewRoot(trustDomain spiffeid.TrustDomain, now time.Time) (*Root, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make root key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "weft root", Organization: []string{trustDomain.Name()}},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(rootLife), IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	template.URIs = append(template.URIs, trustDomain.ID().URL())
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign root: %w", err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read root: %w", err)
	}
	return &Root{certificate, key}, nil
}

func newSerial() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	return serial.Add(serial, big.NewInt(1)), nil
}

// Issue signs an SVID for an identity. Of the request only the public key is used; dnsNames are added for servers.
func (r *Root) Issue(id spiffeid.ID, public crypto.PublicKey, ttl time.Duration, now time.Time, dnsNames ...string) (*x509.Certificate, error) {
	if r.Key == nil {
		return nil, errors.New("sign certificate: this root's key is not here")
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, NotBefore: now.Add(-backdate), NotAfter: now.Add(ttl), DNSNames: dnsNames, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	template.URIs = append(template.URIs, id.URL())
	der, err := x509.CreateCertificate(rand.Reader, template, r.Certificate, public, r.Key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %s: %w", id, err)
	}
	return x509.ParseCertificate(der)
}

// checkCSR reads a certificate request and its signature, and refuses weak keys.
func checkCSR(der []byte) (crypto.PublicKey, error) {
	if len(der) > 16<<10 {
		return nil, errors.New("read certificate request: larger than 16 KiB")
	}
	request, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("read certificate request: %w", err)
	}
	if err := request.CheckSignature(); err != nil {
		return nil, fmt.Errorf("check certificate request: %w", err)
	}
	key, ok := request.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("check certificate request: the key must be ECDSA P-256")
	}
	return key, nil
}

// encode writes roots and their keys as the Secret's data. Those whose key is not here come last.
func encode(roots []*Root) (map[string][]byte, error) {
	var bundle, keys []byte
	for _, r := range roots {
		bundle = append(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate.Raw})...)
		if r.Key == nil {
			continue
		}
		der, err := x509.MarshalPKCS8PrivateKey(r.Key)
		if err != nil {
			return nil, fmt.Errorf("write root key: %w", err)
		}
		keys = append(keys, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...)
	}
	return map[string][]byte{"ca.crt": bundle, "ca.key": keys}, nil
}

// decode reads the Secret's data; the signer comes first.
func decode(data map[string][]byte) ([]*Root, error) {
	var roots []*Root
	for rest := data["ca.crt"]; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("read root %d: %w", len(roots), err)
		}
		roots = append(roots, &Root{Certificate: certificate})
	}
	i := 0
	for rest := data["ca.key"]; ; i++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("read root key %d: %w", i, err)
		}
		signer, ok := key.(crypto.Signer)
		if !ok || i >= len(roots) {
			return nil, fmt.Errorf("read root key %d: it belongs to no root", i)
		}
		roots[i].Key = signer
	}
	if len(roots) == 0 || roots[0].Key == nil {
		return nil, errors.New("read roots: ca.crt or ca.key is empty")
	}
	return roots, nil
}
