package ca

import (
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
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

const (
	secretName = "weft-ca"
	// DefaultTTL is an SVID's life; agents renew at half of it. Callees cut connections at 40 % of it, and callers replace
	// theirs after a third at the latest: what is left of MinTTL is enough for common requests. One that lives longer than MaxTTL
	// outlives what it was issued for by too much.
	DefaultTTL = time.Hour
	MinTTL     = time.Minute
	MaxTTL     = 7 * 24 * time.Hour
	// DefaultMountDelay is what kubelet takes at most by default, with a margin.
	DefaultMountDelay = 3 * time.Minute
	// cacheWait is how long a request for a pod that is not in the cache yet waits.
	cacheWait = 2 * time.Second
)

// Config of an Authority.
type Config struct {
	Client kubernetes.Interface
	// Namespace is weft's own.
	Namespace   string
	TrustDomain string
	TTL         time.Duration
	// MountDelay is how long kubelet may take to bring the ConfigMap to an agent that is only starting; 0: DefaultMountDelay.
	MountDelay time.Duration
	// Snapshot returns the current snapshot and a channel that is closed when there is a newer one; nil: none yet.
	Snapshot func() (*ir.Snapshot, <-chan struct{})
	// Behind lists the connected nodes that have not acknowledged the bundle of a hash (TrustBundle.hash).
	Behind func(hash string) []string
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	Log *slog.Logger
}

// Authority issues SVIDs.
type Authority struct {
	meshv1.UnimplementedIdentityServer
	config Config
	domain spiffeid.TrustDomain

	mu      sync.Mutex
	roots   []*Root // the signer first
	changed chan struct{}
	server  *tls.Certificate
}

// Open reads the CA Secret, or makes it: by Create only, so that two replicas never replace each other's root.
func Open(ctx context.Context, c Config) (*Authority, error) {
	if c.TTL == 0 {
		c.TTL = DefaultTTL
	}
	if c.MountDelay == 0 {
		c.MountDelay = DefaultMountDelay
	}
	if c.TTL < MinTTL || c.TTL > MaxTTL {
		return nil, fmt.Errorf("open certificate authority: SVIDs cannot live for %s: set --svid-ttl (chart value controlplane.svidTTL) between %s and %s", c.TTL, MinTTL, MaxTTL)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	domain, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("open certificate authority: %w", err)
	}
	a := &Authority{config: c, domain: domain, changed: make(chan struct{})}
	secrets := c.Client.CoreV1().Secrets(c.Namespace)
	root, err := NewRoot(domain, c.Now())
	if err != nil {
		return nil, err
	}
	data, err := encode([]*Root{root})
	if err != nil {
		return nil, err
	}
	secret, err := secrets.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: secretName}, Data: data}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		secret, err = secrets.Get(ctx, secretName, metav1.GetOptions{})
	}
	if err != nil {
		return nil, fmt.Errorf("read Secret %s/%s: %w", c.Namespace, secretName, err)
	}
	now, err := read(secret)
	if err != nil {
		return nil, fmt.Errorf("Secret %s/%s: %w; restore it from a backup, or delete it and restart every agent to begin with a new root", c.Namespace, secretName, err)
	}
	a.roots = now.roots
	return a, nil
}

// publish writes the bundle where agents mount it from.
func (a *Authority) publish(ctx context.Context) error {
	maps := a.config.Client.CoreV1().ConfigMaps(a.config.Namespace)
	want := map[string]string{names.BundleKey: string(a.BundlePEM())}
	m, err := maps.Get(ctx, names.BundleConfigMap, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: names.BundleConfigMap}, Data: want}, metav1.CreateOptions{})
	case err == nil && m.Data[names.BundleKey] != want[names.BundleKey]:
		m.Data = want
		_, err = maps.Update(ctx, m, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("publish bundle in ConfigMap %s/%s: %w", a.config.Namespace, names.BundleConfigMap, err)
	}
	return nil
}

// BundlePEM is the trust bundle.
func (a *Authority) BundlePEM() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []byte
	for _, r := range a.roots {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate.Raw})...)
	}
	return out
}

// Roots is how many roots the trust bundle holds: two while the root is changed.
func (a *Authority) Roots() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.roots)
}

func (a *Authority) pool() *x509.CertPool {
	a.mu.Lock()
	defer a.mu.Unlock()
	pool := x509.NewCertPool()
	for _, r := range a.roots {
		pool.AddCert(r.Certificate)
	}
	return pool
}

func (a *Authority) signer() *Root {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.roots[0]
}

// TLS is the gRPC server's configuration: its own SVID with the Service's DNS names, client certificates verified if
// given. Only Bootstrap is served without one.
func (a *Authority) TLS() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return a.serverCertificate(a.config.Now()) },
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return &tls.Config{
				MinVersion: tls.VersionTLS13, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: a.pool(), NextProtos: []string{"h2"},
				GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return a.serverCertificate(a.config.Now()) },
			}, nil
		},
	}
}

func (a *Authority) serverCertificate(now time.Time) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.server != nil && now.Before(a.server.Leaf.NotAfter.Add(-a.config.TTL/2)) {
		return a.server, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make server key: %w", err)
	}
	host := "weft-controlplane." + a.config.Namespace
	leaf, err := a.roots[0].Issue(a.id(), key.Public(), a.config.TTL, now, host, host+".svc")
	if err != nil {
		return nil, err
	}
	a.server = &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	return a.server, nil
}

// PeerTLS is for calls to another replica: both show the SVID of the controller's own account.
func (a *Authority) PeerTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return a.serverCertificate(a.config.Now())
		},
		// The SPIFFE ID is what is verified, not a host name; VerifyConnection does all of it.
		InsecureSkipVerify: true, //nolint:gosec
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("the other replica shows no certificate")
			}
			leaf := s.PeerCertificates[0]
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: a.pool(), CurrentTime: a.config.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
				return fmt.Errorf("the other replica's certificate is not of this mesh: %w", err)
			}
			return a.replica(leaf)
		},
	}
}

// Replica says no to a caller that is no replica of the controller.
func (a *Authority) Replica(ctx context.Context) error {
	leaf, err := caller(ctx)
	if err != nil {
		return err
	}
	return a.replica(leaf)
}

func (a *Authority) replica(leaf *x509.Certificate) error {
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != a.id().String() {
		return fmt.Errorf("%v is not the controller", leaf.URIs)
	}
	if ended := leaf.NotAfter; a.config.Now().After(ended) {
		return fmt.Errorf("the caller's SVID ended at %s", ended.Format(time.RFC3339))
	}
	return nil
}

// id is the controller's own.
func (a *Authority) id() spiffeid.ID {
	return spiffeid.RequireFromPath(a.domain, "/ns/"+a.config.Namespace+"/sa/"+names.ControlPlaneServiceAccount)
}

// caller is the certificate that a call was made with.
func caller(ctx context.Context) (*x509.Certificate, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("the caller is unknown")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 || len(info.State.PeerCertificates[0].URIs) != 1 {
		return nil, errors.New("the caller has no agent SVID: call Bootstrap first")
	}
	return info.State.PeerCertificates[0], nil
}

const agentPath = "/agent/"

// Node tells which node's agent calls, by its SVID.
func (a *Authority) Node(ctx context.Context) (string, error) {
	leaf, err := caller(ctx)
	if err != nil {
		return "", err
	}
	id, err := spiffeid.FromURI(leaf.URIs[0])
	if err != nil {
		return "", fmt.Errorf("read the caller's SVID: %w", err)
	}
	// A connection outlives the certificate that opened it.
	if ended := leaf.NotAfter; a.config.Now().After(ended) {
		return "", fmt.Errorf("the caller's SVID ended at %s: call Bootstrap again, and connect anew", ended.Format(time.RFC3339))
	}
	node, ok := strings.CutPrefix(id.Path(), agentPath)
	if !ok || id.TrustDomain() != a.domain {
		return "", fmt.Errorf("%s is no node agent", id)
	}
	return node, nil
}

// Bootstrap attests a node agent.
func (a *Authority) Bootstrap(ctx context.Context, r *meshv1.BootstrapRequest) (*meshv1.Credentials, error) {
	public, err := checkCSR(r.Csr)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	node, err := a.attest(ctx, r.Token)
	if err != nil {
		a.config.Log.Warn("attestation refused", "error", err)
		return nil, err
	}
	id, err := spiffeid.FromPath(a.domain, agentPath+node)
	if err != nil {
		return nil, status.Errorf(codes.Internal, "name agent of %s: %v", node, err)
	}
	a.config.Log.Info("node attested", "node", node)
	return a.credentials(id, public)
}

// attest finds the node that a projected token is bound to: it must be of the agent's service account and of a pod that
// lives on that node.
func (a *Authority) attest(ctx context.Context, token string) (string, error) {
	if len(token) == 0 || len(token) > 16<<10 {
		return "", status.Error(codes.InvalidArgument, "attest: the token is missing or too large")
	}
	review, err := a.config.Client.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{names.TokenAudience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", status.Errorf(codes.Unavailable, "attest: review token: %v", err)
	}
	want := "system:serviceaccount:" + a.config.Namespace + ":" + names.AgentServiceAccount
	extra := func(k string) string {
		if v := review.Status.User.Extra["authentication.kubernetes.io/"+k]; len(v) == 1 {
			return v[0]
		}
		return ""
	}
	switch {
	case !review.Status.Authenticated || !slices.Contains(review.Status.Audiences, names.TokenAudience):
		return "", status.Errorf(codes.PermissionDenied, "attest: the token is not valid for audience %s: %s", names.TokenAudience, review.Status.Error)
	case review.Status.User.Username != want:
		return "", status.Errorf(codes.PermissionDenied, "attest: the token is of %s, not of %s", review.Status.User.Username, want)
	case extra("node-name") == "" || extra("pod-uid") == "":
		return "", status.Error(codes.PermissionDenied, "attest: the token is bound to no pod and node")
	}
	// A token already reviewed passes for about 10 s after its pod is gone, so the pod itself is asked for.
	found, err := a.await(ctx, func(s *ir.Snapshot) bool {
		p := s.Pods[extra("pod-uid")]
		return p != nil && !p.Ended(a.config.Now()) && p.Node == extra("node-name") && p.Key.Namespace == a.config.Namespace && p.ServiceAccount == names.AgentServiceAccount
	})
	if err != nil {
		return "", err
	}
	if !found {
		return "", status.Errorf(codes.PermissionDenied, "attest: no agent pod %s lives on node %s", extra("pod-uid"), extra("node-name"))
	}
	return extra("node-name"), nil
}

// await waits at most cacheWait for a snapshot in which something is so.
func (a *Authority) await(ctx context.Context, so func(*ir.Snapshot) bool) (bool, error) {
	limit := time.NewTimer(cacheWait)
	defer limit.Stop()
	for {
		snapshot, newer := a.config.Snapshot()
		if snapshot != nil && so(snapshot) {
			return true, nil
		}
		select {
		case <-ctx.Done():
			return false, status.FromContextError(ctx.Err()).Err()
		case <-limit.C:
			return false, nil
		case <-newer:
		}
	}
}

// Sign issues a workload's SVID to the agent of its node.
func (a *Authority) Sign(ctx context.Context, r *meshv1.SignRequest) (*meshv1.Credentials, error) {
	node, err := a.Node(ctx)
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	public, err := checkCSR(r.Csr)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if r.Namespace == a.config.Namespace || r.Namespace == "kube-system" {
		return nil, status.Errorf(codes.PermissionDenied, "sign: accounts of namespace %s get no workload identity", r.Namespace)
	}
	found, err := a.await(ctx, func(s *ir.Snapshot) bool {
		for _, p := range s.Pods {
			if p.Node == node && p.Key.Namespace == r.Namespace && p.ServiceAccount == r.ServiceAccount && !p.Ended(a.config.Now()) && (p.Goal != ir.Out || p.Stage != ir.Out) {
				return true
			}
		}
		return false
	})
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, status.Errorf(codes.FailedPrecondition, "sign: service account %s/%s has no pod of the mesh on node %s", r.Namespace, r.ServiceAccount, node)
	}
	id, err := spiffeid.FromString(names.SPIFFEID(a.domain.Name(), r.Namespace, r.ServiceAccount))
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "sign: %v", err)
	}
	return a.credentials(id, public)
}

func (a *Authority) credentials(id spiffeid.ID, public any) (*meshv1.Credentials, error) {
	leaf, err := a.signer().Issue(id, public, a.config.TTL, a.config.Now())
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &meshv1.Credentials{SpiffeId: id.String(), Chain: [][]byte{leaf.Raw}, NotAfter: timestamppb.New(leaf.NotAfter)}, nil
}

// Bundle streams the roots.
func (a *Authority) Bundle(_ *meshv1.BundleRequest, stream meshv1.Identity_BundleServer) error {
	if _, err := a.Node(stream.Context()); err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	for {
		a.mu.Lock()
		out, changed := &meshv1.TrustBundle{Hash: hashOf(a.roots)}, a.changed
		for _, r := range a.roots {
			out.Roots = append(out.Roots, r.Certificate.Raw)
		}
		a.mu.Unlock()
		if err := stream.Send(out); err != nil {
			return err
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-changed:
		}
	}
}
