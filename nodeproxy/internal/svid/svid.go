// Package svid holds the identities of a node: the agent's own and those of the service accounts that have an enrolled
// pod here. Keys are made here, live in memory alone, and print as [redacted].
package svid

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
)

// Key is a private key that does not print.
type Key struct{ key *ecdsa.PrivateKey }

func (Key) Format(f fmt.State, _ rune)   { _, _ = f.Write([]byte("[redacted]")) }
func (Key) LogValue() slog.Value         { return slog.StringValue("[redacted]") }
func (Key) MarshalText() ([]byte, error) { return []byte("[redacted]"), nil }

// PEM is the key for Envoy's ears only.
func (k Key) PEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k.key)
	if err != nil {
		return nil, fmt.Errorf("write key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// SVID is one identity with its certificate.
type SVID struct {
	ID    string
	Chain [][]byte // DER, leaf first
	Key   Key
	// NotBefore is when it was received, NotAfter when it ends.
	NotBefore, NotAfter time.Time
}

// ChainPEM is the certificate chain.
func (s *SVID) ChainPEM() []byte {
	var out []byte
	for _, der := range s.Chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

func newRequest() (Key, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Key{}, nil, fmt.Errorf("make key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return Key{}, nil, fmt.Errorf("make certificate request: %w", err)
	}
	return Key{key}, csr, nil
}

func received(c *meshv1.Credentials, key Key) (*SVID, error) {
	if len(c.Chain) == 0 {
		return nil, errors.New("the controller sent no certificate")
	}
	leaf, err := x509.ParseCertificate(c.Chain[0])
	if err != nil {
		return nil, fmt.Errorf("read certificate: %w", err)
	}
	if public, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key.key.Public()) {
		return nil, errors.New("the controller sent a certificate for another key")
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != c.SpiffeId {
		return nil, fmt.Errorf("the controller sent a certificate that is not for %s", c.SpiffeId)
	}
	return &SVID{ID: c.SpiffeId, Chain: c.Chain, Key: key, NotBefore: time.Now(), NotAfter: leaf.NotAfter}, nil
}

// renewAt is half of an SVID's life, give or take a tenth, so that a node's accounts do not all ask at once.
func (s *SVID) renewAt() time.Time {
	life := s.NotAfter.Sub(s.NotBefore)
	return s.NotBefore.Add(life/2 + time.Duration((mathrand.Float64()-0.5)*0.2*float64(life)))
}

// AgentConfig of an Agent.
type AgentConfig struct {
	// Controller is its host:port.
	Controller string
	// Namespace is weft's own: the controller must show the SVID of its service account there.
	Namespace string
	// TokenFile holds the projected token, BundleFile the trust bundle (PEM).
	TokenFile, BundleFile string
	Log                   *slog.Logger
}

// Agent is the agent's own identity and its connection to the controller.
type Agent struct {
	config AgentConfig

	mu    sync.Mutex
	svid  *SVID
	renew time.Time // when svid is to be renewed
	roots [][]byte  // DER, from the Bundle stream; until then from the file
}

// NewAgent makes an Agent.
func NewAgent(c AgentConfig) *Agent { return &Agent{config: c} }

// RootsPEM is the trust bundle.
func (a *Agent) RootsPEM() ([]byte, error) {
	a.mu.Lock()
	roots := a.roots
	a.mu.Unlock()
	if len(roots) == 0 {
		b, err := os.ReadFile(a.config.BundleFile)
		if err != nil {
			return nil, fmt.Errorf("read trust bundle: %w", err)
		}
		return b, nil
	}
	var out []byte
	for _, der := range roots {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out, nil
}

func (a *Agent) pool() (*x509.CertPool, error) {
	b, err := a.RootsPEM()
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("read trust bundle: %s holds no certificate", a.config.BundleFile)
	}
	return pool, nil
}

// tlsConfig verifies the controller by its SPIFFE ID; with identify the agent shows its own.
func (a *Agent) tlsConfig(identify bool) *tls.Config {
	c := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
		// The SPIFFE ID is what is verified, not a host name; VerifyConnection does all of it.
		InsecureSkipVerify: true, //nolint:gosec
		VerifyConnection: func(s tls.ConnectionState) error {
			pool, err := a.pool()
			if err != nil {
				return err
			}
			if len(s.PeerCertificates) == 0 {
				return errors.New("the controller shows no certificate")
			}
			leaf := s.PeerCertificates[0]
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
				return fmt.Errorf("the controller's certificate is not of this mesh: %w", err)
			}
			if len(leaf.URIs) != 1 {
				return errors.New("the controller's certificate has no SPIFFE ID")
			}
			id, err := spiffeid.FromURI(leaf.URIs[0])
			if err != nil {
				return fmt.Errorf("the controller's certificate: %w", err)
			}
			if want := "/ns/" + a.config.Namespace + "/sa/" + names.ControlPlaneServiceAccount; id.Path() != want {
				return fmt.Errorf("the controller shows %s, want the path %s", id, want)
			}
			return nil
		},
	}
	if identify {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			a.mu.Lock()
			defer a.mu.Unlock()
			if a.svid == nil {
				return nil, errors.New("the agent has no SVID yet")
			}
			return &tls.Certificate{Certificate: a.svid.Chain, PrivateKey: a.svid.Key.key}, nil
		}
	}
	return c
}

// largestResponse bounds what the controller sends at once: all of one type, 300 bytes for each pod in the mesh. gRPC's own bound of
// 4 MiB is reached with 13,000 pods.
const largestResponse = 64 << 20

func (a *Agent) dial(identify bool) (*grpc.ClientConn, error) {
	host, _, err := net.SplitHostPort(a.config.Controller)
	if err != nil {
		return nil, fmt.Errorf("read controller address: %w", err)
	}
	// A replica that has gone must not be waited for: another one answers.
	retry := backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second}
	return grpc.NewClient("dns:///"+a.config.Controller, grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry, MinConnectTimeout: 3 * time.Second}),
		grpc.WithTransportCredentials(credentials.NewTLS(a.tlsConfig(identify))), grpc.WithAuthority(host),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(largestResponse)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}))
}

// Bootstrap shows the token and receives the agent's SVID.
func (a *Agent) Bootstrap(ctx context.Context) error {
	token, err := os.ReadFile(a.config.TokenFile)
	if err != nil {
		return fmt.Errorf("read token: %w", err)
	}
	key, csr, err := newRequest()
	if err != nil {
		return err
	}
	conn, err := a.dial(false)
	if err != nil {
		return fmt.Errorf("dial controller: %w", err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := meshv1.NewIdentityClient(conn).Bootstrap(ctx, &meshv1.BootstrapRequest{Token: string(bytes.TrimSpace(token)), Csr: csr})
	if err != nil {
		return fmt.Errorf("attest to the controller: %w", err)
	}
	s, err := received(c, key)
	if err != nil {
		return fmt.Errorf("attest to the controller: %w", err)
	}
	a.mu.Lock()
	a.svid, a.renew = s, s.renewAt()
	a.mu.Unlock()
	return nil
}

// Connect returns a connection that shows the agent's SVID, after attesting if that is due, and when the next one is due. The
// caller closes it.
func (a *Agent) Connect(ctx context.Context) (conn *grpc.ClientConn, due time.Time, err error) {
	a.mu.Lock()
	attest := a.svid == nil || !time.Now().Before(a.renew)
	a.mu.Unlock()
	if attest {
		if err := a.Bootstrap(ctx); err != nil {
			return nil, time.Time{}, err
		}
	}
	conn, err = a.dial(true)
	a.mu.Lock()
	defer a.mu.Unlock()
	return conn, a.renew, err
}

// SetRoots takes a new trust bundle.
func (a *Agent) SetRoots(roots [][]byte) {
	a.mu.Lock()
	a.roots = roots
	a.mu.Unlock()
}
