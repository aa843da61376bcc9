package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"time"
)

// certificateLife is how long the cluster's certificates are valid; every cluster-up makes new ones.
const certificateLife = 365 * 24 * time.Hour

// pair is a certificate with its key.
type pair struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	// CertPEM and KeyPEM are what goes into files.
	CertPEM, KeyPEM []byte
}

// subject says whom a certificate is for.
type subject struct {
	Name, Organization string
	DNS                []string
	Addresses          []netip.Addr
}

// newCA makes a self-signed authority.
func newCA(name string) (pair, error) {
	return issue(nil, subject{Name: name})
}

// issue makes a key and a certificate for it, signed by authority, or by itself as an authority if that is nil. The
// certificate is good for both ends of TLS.
func issue(authority *pair, s subject) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, fmt.Errorf("make key of %s: %w", s.Name, err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return pair{}, fmt.Errorf("make serial number of %s: %w", s.Name, err)
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: s.Name},
		NotBefore:    time.Now().Add(-5 * time.Minute),
		NotAfter:     time.Now().Add(certificateLife),
		DNSNames:     s.DNS,
	}
	if s.Organization != "" {
		template.Subject.Organization = []string{s.Organization}
	}
	for _, address := range s.Addresses {
		template.IPAddresses = append(template.IPAddresses, net.IP(address.AsSlice()))
	}
	parent, signer := template, key
	if authority == nil {
		template.IsCA, template.BasicConstraintsValid = true, true
		template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	} else {
		parent, signer = authority.certificate, authority.key
		template.KeyUsage = x509.KeyUsageDigitalSignature
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return pair{}, fmt.Errorf("sign certificate of %s: %w", s.Name, err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return pair{}, fmt.Errorf("read back certificate of %s: %w", s.Name, err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return pair{}, fmt.Errorf("encode key of %s: %w", s.Name, err)
	}
	return pair{
		certificate: certificate, key: key,
		CertPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		KeyPEM:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
	}, nil
}

// kubeconfig is a self-contained client configuration.
func (c Config) kubeconfig(authority pair, client pair) []byte {
	encode := base64.StdEncoding.EncodeToString
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: weft
contexts:
- {name: weft, context: {cluster: weft, user: weft}}
clusters:
- name: weft
  cluster:
    server: %s
    certificate-authority-data: %s
users:
- name: weft
  user:
    client-certificate-data: %s
    client-key-data: %s
`, c.apiURL(), encode(authority.CertPEM), encode(client.CertPEM), encode(client.KeyPEM))
}

// makePKI makes the authorities, the certificates and the client configurations of all components: what the control
// plane needs in folder cp/kubernetes, what node n needs in n<n>/kubernetes, and the administrator's kubeconfig.
// Three authorities, as Kubernetes advises: for the cluster, for the front proxy, for etcd.
func (c Config) makePKI() error {
	authorities := map[string]*pair{}
	for _, name := range []string{"ca", "front-proxy-ca", "etcd-ca"} {
		made, err := newCA("weft-" + name)
		if err != nil {
			return err
		}
		authorities[name] = &made
		if err := c.writePair("cp", name, made); err != nil {
			return err
		}
	}
	plane4, plane6 := c.controlPlane()
	service4, service6 := c.apiService()
	loopback := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	kubernetes := []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"}
	plane := []struct {
		file, authority string
		subject         subject
		config          bool
	}{
		{"apiserver", "ca", subject{Name: "kube-apiserver", DNS: kubernetes, Addresses: append(loopback, plane4, plane6, service4, service6)}, false},
		{"apiserver-kubelet", "ca", subject{Name: "kube-apiserver-kubelet-client", Organization: "system:masters"}, false},
		{"front-proxy", "front-proxy-ca", subject{Name: "front-proxy-client"}, false},
		{"etcd", "etcd-ca", subject{Name: "etcd", DNS: []string{"localhost"}, Addresses: loopback}, false},
		{"apiserver-etcd", "etcd-ca", subject{Name: "kube-apiserver-etcd-client"}, false},
		{"service-accounts", "ca", subject{Name: "service-accounts"}, false},
		{"controller-manager", "ca", subject{Name: "system:kube-controller-manager"}, true},
		{"scheduler", "ca", subject{Name: "system:kube-scheduler"}, true},
	}
	for _, p := range plane {
		made, err := issue(authorities[p.authority], p.subject)
		if err != nil {
			return err
		}
		if err := c.writePair("cp", p.file, made); err != nil {
			return err
		}
		if p.config {
			if err := writeFile(c.path("cp", "kubernetes", p.file+".conf"), c.kubeconfig(*authorities["ca"], made), 0o600); err != nil {
				return err
			}
		}
	}
	for n := 1; n <= c.Nodes; n++ {
		if err := c.makeNodePKI(n, authorities["ca"]); err != nil {
			return err
		}
	}
	admin, err := issue(authorities["ca"], subject{Name: "admin", Organization: "system:masters"})
	if err != nil {
		return err
	}
	return writeFile(c.path("kubeconfig"), c.kubeconfig(*authorities["ca"], admin), 0o600)
}

func (c Config) makeNodePKI(n int, authority *pair) error {
	name := nodeName(n)
	v4, v6 := c.node(n)
	serving, err := issue(authority, subject{Name: "system:node:" + name, Organization: "system:nodes", DNS: []string{name}, Addresses: []netip.Addr{v4, v6}})
	if err != nil {
		return err
	}
	proxy, err := issue(authority, subject{Name: "system:kube-proxy"})
	if err != nil {
		return err
	}
	if err := writeFile(c.path(name, "kubernetes", "ca.crt"), authority.CertPEM, 0o644); err != nil {
		return err
	}
	if err := c.writePair(name, "kubelet", serving); err != nil {
		return err
	}
	if err := writeFile(c.path(name, "kubernetes", "kubelet.conf"), c.kubeconfig(*authority, serving), 0o600); err != nil {
		return err
	}
	return writeFile(c.path(name, "kubernetes", "proxy.conf"), c.kubeconfig(*authority, proxy), 0o600)
}

func (c Config) writePair(machine, name string, p pair) error {
	if err := writeFile(c.path(machine, "kubernetes", name+".crt"), p.CertPEM, 0o644); err != nil {
		return err
	}
	return writeFile(c.path(machine, "kubernetes", name+".key"), p.KeyPEM, 0o600)
}
