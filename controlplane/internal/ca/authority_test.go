package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

const own = "weft-system"

// mesh is a snapshot with an agent pod on node-1, a shop pod that is in the mesh there, and others that get nothing.
func mesh() *ir.Snapshot {
	pods := map[string]*ir.Pod{}
	add := func(uid, namespace, account, node string, goal ir.Stage) {
		pods[uid] = &ir.Pod{UID: uid, Key: ir.Key{Namespace: namespace, Name: uid}, Node: node, ServiceAccount: account, Goal: goal}
	}
	add("agent-1", own, names.AgentServiceAccount, "node-1", ir.Out)
	add("other-1", own, names.ControlPlaneServiceAccount, "node-1", ir.Out)
	add("web-1", "shop", "web", "node-1", ir.Enforced)
	add("api-1", "shop", "api", "node-2", ir.Enforced)
	add("out-1", "shop", "out", "node-1", ir.Out)
	add("dns-1", "kube-system", "dns", "node-1", ir.Enforced)
	// In time.Now's terms: the clock of tests that look at these is the real one, or synctest's.
	add("leaving-1", "shop", "leaving", "node-1", ir.Enforced)
	pods["leaving-1"].Ends = time.Now().Add(time.Minute)
	add("ended-1", "shop", "ended", "node-1", ir.Enforced)
	pods["ended-1"].Ends = time.Now().Add(-time.Second)
	add("agent-ended", own, names.AgentServiceAccount, "node-1", ir.Out)
	pods["agent-ended"].Ends = pods["ended-1"].Ends
	return &ir.Snapshot{Pods: pods}
}

// review is what the API server says of any token.
func review() authenticationv1.TokenReviewStatus {
	return authenticationv1.TokenReviewStatus{
		Authenticated: true, Audiences: []string{names.TokenAudience},
		User: authenticationv1.UserInfo{
			Username: "system:serviceaccount:" + own + ":" + names.AgentServiceAccount,
			Extra: map[string]authenticationv1.ExtraValue{
				"authentication.kubernetes.io/node-name": {"node-1"}, "authentication.kubernetes.io/pod-uid": {"agent-1"},
			},
		},
	}
}

func clients(answer authenticationv1.TokenReviewStatus) *fake.Clientset {
	c := fake.NewClientset()
	c.PrependReactor("create", "tokenreviews", func(k8stesting.Action) (bool, runtime.Object, error) {
		return true, &authenticationv1.TokenReview{Status: answer}, nil
	})
	return c
}

func open(t *testing.T, c *fake.Clientset, change ...func(*Config)) *Authority {
	t.Helper()
	config := Config{
		Client: c, Namespace: own, TrustDomain: "cluster.local", Log: slog.New(slog.DiscardHandler), Behind: func(string) []string { return nil },
		Snapshot: func() (*ir.Snapshot, <-chan struct{}) { return mesh(), make(chan struct{}) },
	}
	for _, f := range change {
		f(&config)
	}
	a, err := Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// csr asks, in vain, for somebody else's names.
func csr(t *testing.T) []byte {
	t.Helper()
	return csrOf(t, newKey(t))
}

func csrOf(t *testing.T, key any) []byte {
	t.Helper()
	foreign, err := url.Parse("spiffe://cluster.local/ns/kube-system/sa/admin")
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "admin"}, DNSNames: []string{"kubernetes.default.svc"}, URIs: []*url.URL{foreign},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// as is the context of a call with a verified certificate.
func as(t *testing.T, a *Authority, chain [][]byte) context.Context {
	t.Helper()
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	verified, err := leaf.Verify(x509.VerifyOptions{Roots: a.pool(), CurrentTime: a.config.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		t.Fatal(err)
	}
	return peer.NewContext(t.Context(), &peer.Peer{AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}, VerifiedChains: verified}}})
}

func agent(t *testing.T, a *Authority) context.Context {
	t.Helper()
	c, err := a.Bootstrap(t.Context(), &meshv1.BootstrapRequest{Token: "t", Csr: csr(t)})
	if err != nil {
		t.Fatal(err)
	}
	return as(t, a, c.Chain)
}

func TestBootstrap(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*authenticationv1.TokenReviewStatus)
		token  string
		want   codes.Code
		says   string
	}{
		{"an agent's token", func(*authenticationv1.TokenReviewStatus) {}, "t", codes.OK, ""},
		{"no token", func(*authenticationv1.TokenReviewStatus) {}, "", codes.InvalidArgument, "missing or too large"},
		{"a huge token", func(*authenticationv1.TokenReviewStatus) {}, strings.Repeat("x", 17<<10), codes.InvalidArgument, "missing or too large"},
		{"not authenticated", func(s *authenticationv1.TokenReviewStatus) { s.Authenticated, s.Error = false, "expired" }, "t", codes.PermissionDenied, "expired"},
		{"wrong audience", func(s *authenticationv1.TokenReviewStatus) { s.Audiences = []string{"https://kubernetes"} }, "t", codes.PermissionDenied, "not valid for audience weft-ca"},
		{"wrong service account", func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "system:serviceaccount:shop:web" }, "t", codes.PermissionDenied, "the token is of system:serviceaccount:shop:web"},
		{"same account name in another namespace", func(s *authenticationv1.TokenReviewStatus) {
			s.User.Username = "system:serviceaccount:shop:" + names.AgentServiceAccount
		}, "t", codes.PermissionDenied, "the token is of"},
		{"bound to nothing", func(s *authenticationv1.TokenReviewStatus) { s.User.Extra = nil }, "t", codes.PermissionDenied, "bound to no pod and node"},
		{"a pod that is gone", func(s *authenticationv1.TokenReviewStatus) {
			s.User.Extra["authentication.kubernetes.io/pod-uid"] = authenticationv1.ExtraValue{"gone"}
		}, "t", codes.PermissionDenied, "no agent pod gone lives on node node-1"},
		{"a pod past its deletion and grace", func(s *authenticationv1.TokenReviewStatus) {
			s.User.Extra["authentication.kubernetes.io/pod-uid"] = authenticationv1.ExtraValue{"agent-ended"}
		}, "t", codes.PermissionDenied, "no agent pod agent-ended lives on node node-1"},
		{"the pod lives on another node", func(s *authenticationv1.TokenReviewStatus) {
			s.User.Extra["authentication.kubernetes.io/node-name"] = authenticationv1.ExtraValue{"node-2"}
		}, "t", codes.PermissionDenied, "no agent pod agent-1 lives on node node-2"},
		{"the pod has another account", func(s *authenticationv1.TokenReviewStatus) {
			s.User.Extra["authentication.kubernetes.io/pod-uid"] = authenticationv1.ExtraValue{"other-1"}
		}, "t", codes.PermissionDenied, "no agent pod other-1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := review()
				c.change(&s)
				got, err := open(t, clients(s)).Bootstrap(t.Context(), &meshv1.BootstrapRequest{Token: c.token, Csr: csr(t)})
				expect(t, err, c.want, c.says)
				if err == nil && got.SpiffeId != "spiffe://cluster.local/agent/node-1" {
					t.Errorf("SPIFFE ID %s", got.SpiffeId)
				}
			})
		})
	}
}

func expect(t *testing.T, err error, want codes.Code, says string) {
	t.Helper()
	if status.Code(err) != want || err != nil && !strings.Contains(err.Error(), says) {
		t.Errorf("got %v, want %s %q", err, want, says)
	}
}

func TestSign(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	good := csr(t)
	forged := append([]byte(nil), good...)
	forged[len(forged)-1] ^= 1
	for _, c := range []struct {
		name, namespace, account string
		csr                      []byte
		want                     codes.Code
		says                     string
	}{
		{"a pod of the mesh on the node", "shop", "web", good, codes.OK, ""},
		{"a deleted pod that has grace left", "shop", "leaving", good, codes.OK, ""},
		{"a pod past its deletion and grace", "shop", "ended", good, codes.FailedPrecondition, "shop/ended has no pod of the mesh on node node-1"},
		{"the account's pods are on another node", "shop", "api", good, codes.FailedPrecondition, "shop/api has no pod of the mesh on node node-1"},
		{"the account's pod is not in the mesh", "shop", "out", good, codes.FailedPrecondition, "no pod of the mesh"},
		// A snapshot holds no hostNetwork pod, so an account that only such pods use has none.
		{"only hostNetwork pods", "shop", "host", good, codes.FailedPrecondition, "no pod of the mesh"},
		{"an account of kube-system", "kube-system", "dns", good, codes.PermissionDenied, "namespace kube-system get no workload identity"},
		{"weft's own account", own, names.ControlPlaneServiceAccount, good, codes.PermissionDenied, "get no workload identity"},
		{"an account that would escape its path", "shop", "../../kube-system/sa/x", good, codes.FailedPrecondition, ""},
		{"no request", "shop", "web", nil, codes.InvalidArgument, "read certificate request"},
		{"a request as large as an attack", "shop", "web", make([]byte, 17<<10), codes.InvalidArgument, "larger than 16 KiB"},
		{"a request whose key somebody else holds", "shop", "web", forged, codes.InvalidArgument, "certificate request"},
		{"another kind of key", "shop", "web", csrOf(t, weak), codes.InvalidArgument, "ECDSA P-256"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := open(t, clients(review()))
				_, err := a.Sign(agent(t, a), &meshv1.SignRequest{Namespace: c.namespace, ServiceAccount: c.account, Csr: c.csr})
				expect(t, err, c.want, c.says)
			})
		})
	}
}

// The request's names count for nothing: the SVID holds one URI, and lives as long as the controller says.
func TestSVIDHoldsWhatTheControllerSays(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	a := open(t, clients(review()), func(c *Config) { c.TTL, c.Now = 20*time.Minute, func() time.Time { return now } })
	got, err := a.Sign(agent(t, a), &meshv1.SignRequest{Namespace: "shop", ServiceAccount: "web", Csr: csr(t)})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(got.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://cluster.local/ns/shop/sa/web" || got.SpiffeId != leaf.URIs[0].String() {
		t.Errorf("URIs %v, SPIFFE ID %s", leaf.URIs, got.SpiffeId)
	}
	if len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 || leaf.Subject.CommonName != "" || leaf.IsCA {
		t.Errorf("the SVID took names from the request: %v %v, CA %v", leaf.DNSNames, leaf.Subject, leaf.IsCA)
	}
	if want := now.Add(20 * time.Minute); !leaf.NotAfter.Equal(want) || !got.NotAfter.AsTime().Equal(want) {
		t.Errorf("ends %s, told %s, want %s", leaf.NotAfter, got.NotAfter.AsTime(), want)
	}
}

func TestSignWaitsForThePod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		current, newer := &ir.Snapshot{Pods: map[string]*ir.Pod{"agent-1": mesh().Pods["agent-1"]}}, make(chan struct{})
		var mu sync.Mutex
		a := open(t, clients(review()), func(c *Config) {
			c.Snapshot = func() (*ir.Snapshot, <-chan struct{}) { mu.Lock(); defer mu.Unlock(); return current, newer }
		})
		ctx := agent(t, a)
		time.AfterFunc(time.Second, func() {
			mu.Lock()
			defer mu.Unlock()
			current = mesh()
			close(newer)
			newer = make(chan struct{})
		})
		start := time.Now()
		if _, err := a.Sign(ctx, &meshv1.SignRequest{Namespace: "shop", ServiceAccount: "web", Csr: csr(t)}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != time.Second {
			t.Errorf("signed after %s, want as soon as the pod is there", took)
		}
	})
}

// Only an agent's SVID opens Sign: neither a workload's nor none at all.
func TestOnlyAgentsSign(t *testing.T) {
	a := open(t, clients(review()))
	workload, err := a.Sign(agent(t, a), &meshv1.SignRequest{Namespace: "shop", ServiceAccount: "web", Csr: csr(t)})
	if err != nil {
		t.Fatal(err)
	}
	request := &meshv1.SignRequest{Namespace: "shop", ServiceAccount: "web", Csr: csr(t)}
	for name, ctx := range map[string]context.Context{
		"no connection": t.Context(), "no certificate": peer.NewContext(t.Context(), &peer.Peer{AuthInfo: credentials.TLSInfo{}}), "a workload": as(t, a, workload.Chain),
	} {
		if _, err := a.Sign(ctx, request); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOnlyReplicasAreReplicas: they know each other by the controller's own SVID, which nobody else gets.
func TestOnlyReplicasAreReplicas(t *testing.T) {
	c := clients(review())
	one, other := open(t, c), open(t, c)
	own, err := other.serverCertificate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := one.Replica(as(t, one, own.Certificate)); err != nil {
		t.Errorf("another replica: %v", err)
	}
	workload, err := one.Sign(agent(t, one), &meshv1.SignRequest{Namespace: "shop", ServiceAccount: "web", Csr: csr(t)})
	if err != nil {
		t.Fatal(err)
	}
	foreign := open(t, clients(review())) // of another mesh
	theirs, err := foreign.serverCertificate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, ctx := range map[string]context.Context{"an agent": agent(t, one), "a workload": as(t, one, workload.Chain), "no connection": t.Context()} {
		if one.Replica(ctx) == nil {
			t.Errorf("%s passes as a replica", name)
		}
	}
	shake := func(client, server *tls.Config) error {
		listener, err := tls.Listen("tcp", "127.0.0.1:0", server)
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		go func() {
			if c, err := listener.Accept(); err == nil {
				_ = c.(*tls.Conn).Handshake()
				t.Cleanup(func() { _ = c.Close() })
			}
		}()
		c, err := tls.Dial("tcp", listener.Addr().String(), client)
		if err == nil {
			err = c.Close()
		}
		return err
	}
	if err := shake(one.PeerTLS(), other.TLS()); err != nil {
		t.Errorf("two replicas: %v", err)
	}
	if err := shake(one.PeerTLS(), &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{*theirs}}); err == nil {
		t.Error("the controller of another mesh passes as a replica")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := one.signer().Issue(one.domain.ID(), key.Public(), time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := shake(one.PeerTLS(), &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}}}); err == nil {
		t.Error("another identity of this mesh passes as a replica")
	}
}

// A connection outlives the certificate that opened it; its agent's say ends with the certificate.
func TestEndedAgentSignsNoMore(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	a := open(t, clients(review()), func(c *Config) { c.Now = func() time.Time { return now } })
	ctx, request := agent(t, a), &meshv1.SignRequest{Namespace: "shop", ServiceAccount: "web", Csr: csr(t)}
	now = now.Add(DefaultTTL)
	if _, err := a.Sign(ctx, request); err != nil {
		t.Errorf("at the end of its SVID: %v", err)
	}
	now = now.Add(time.Second)
	_, err := a.Sign(ctx, request)
	expect(t, err, codes.PermissionDenied, "the caller's SVID ended at 2026-01-01T01:00:00Z")
}

func TestSecretIsMadeByCreateOnly(t *testing.T) {
	c := clients(review())
	first := open(t, c)
	second := open(t, c)
	if string(first.BundlePEM()) != string(second.BundlePEM()) {
		t.Error("the second controller has another root than the first")
	}
	for _, action := range c.Actions() {
		if action.GetResource().Resource == "secrets" && action.GetVerb() != "create" && action.GetVerb() != "get" {
			t.Errorf("Open does %s on the Secret", action.GetVerb())
		}
	}
	if err := first.Publish(t.Context()); err != nil {
		t.Fatal(err)
	}
	published, err := c.CoreV1().ConfigMaps(own).Get(t.Context(), names.BundleConfigMap, metav1.GetOptions{})
	if err != nil || published.Data[names.BundleKey] != string(first.BundlePEM()) {
		t.Errorf("ConfigMap holds %q, %v", published.Data, err)
	}
}

func TestBrokenSecretIsNotReplaced(t *testing.T) {
	c := clients(review())
	if _, err := c.CoreV1().Secrets(own).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: secretName}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), Config{Client: c, Namespace: own, TrustDomain: "cluster.local", Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "Secret weft-system/weft-ca") || !strings.Contains(err.Error(), "restore it from a backup") {
		t.Errorf("an empty Secret: %v", err)
	}
}

func TestLifeOfSVIDsIsBounded(t *testing.T) {
	for _, ttl := range []time.Duration{-time.Hour, MinTTL - time.Second, MaxTTL + time.Second} {
		_, err := Open(t.Context(), Config{Client: clients(review()), Namespace: own, TrustDomain: "cluster.local", TTL: ttl, Log: slog.New(slog.DiscardHandler)})
		if err == nil || !strings.Contains(err.Error(), "controlplane.svidTTL") {
			t.Errorf("SVIDs of %s: %v, want an error that names the chart's value", ttl, err)
		}
	}
}
