package svid

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// authority is a throw-away CA.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{key, cert}
}

// issue signs a public key for an identity.
func (a *authority) issue(t *testing.T, public any, id string, life time.Duration) []byte {
	t.Helper()
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life), URIs: []*url.URL{uri},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (a *authority) answer(t *testing.T, csr []byte, id string, life time.Duration) *meshv1.Credentials {
	t.Helper()
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		t.Fatal(err)
	}
	return &meshv1.Credentials{SpiffeId: id, Chain: [][]byte{a.issue(t, request.PublicKey, id, life)}}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

const till = "spiffe://cluster.local/ns/shop/sa/till"

func TestReceivedCertificateIsChecked(t *testing.T) {
	ca := newAuthority(t)
	key, csr, err := newRequest()
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := newRequest()
	if err != nil {
		t.Fatal(err)
	}
	good := ca.answer(t, csr, till, time.Hour)
	if s, err := received(good, key); err != nil || s.ID != till {
		t.Fatalf("a good one: %v %v", s, err)
	}
	for want, c := range map[string]struct {
		credentials *meshv1.Credentials
		key         Key
	}{
		"no certificate":            {&meshv1.Credentials{SpiffeId: till}, key},
		"read certificate":          {&meshv1.Credentials{SpiffeId: till, Chain: [][]byte{{1}}}, key},
		"for another key":           {good, other},
		"not for spiffe://other/it": {&meshv1.Credentials{SpiffeId: "spiffe://other/it", Chain: good.Chain}, key},
	} {
		if _, err := received(c.credentials, c.key); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want an error with %q", err, want)
		}
	}
}

// TestRenewalIsSpread: at half of the life, give or take a tenth of it.
func TestRenewalIsSpread(t *testing.T) {
	now := time.Now()
	s := &SVID{NotBefore: now, NotAfter: now.Add(time.Hour)}
	first, last := time.Hour, time.Duration(0)
	for range 1000 {
		at := s.renewAt().Sub(now)
		first, last = min(first, at), max(last, at)
	}
	if first < 24*time.Minute || last > 36*time.Minute || last-first < 6*time.Minute {
		t.Errorf("renewed between %v and %v of an hour", first, last)
	}
}

// TestKeyDoesNotPrint, in whatever way it is asked.
func TestKeyDoesNotPrint(t *testing.T) {
	key, _, err := newRequest()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := key.key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	number := new(big.Int).SetBytes(raw)
	secrets := []string{number.String(), number.Text(16), fmt.Sprintf("%X", raw), fmt.Sprint(raw), string(raw), "PRIVATE"}
	s := SVID{ID: till, Key: key}
	var texts []string
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d", "%x", "%X", "%o", "%b", "%U", "%T %v"} {
		texts = append(texts, fmt.Sprintf(verb, key), fmt.Sprintf(verb, s), fmt.Sprintf(verb, &s), fmt.Sprintf(verb, []Key{key}))
	}
	for _, value := range []any{key, s, &s, map[string]Key{"k": key}} {
		if text, err := json.Marshal(value); err == nil {
			texts = append(texts, string(text))
		}
		var log bytes.Buffer
		slog.New(slog.NewTextHandler(&log, nil)).Info("x", "value", value)
		slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "value", value)
		texts = append(texts, log.String())
	}
	for _, text := range texts {
		for _, secret := range secrets {
			if strings.Contains(text, secret) {
				t.Errorf("the key is in %q", text)
			}
		}
	}
	if text, err := key.PEM(); err != nil || !bytes.Contains(text, []byte("PRIVATE KEY")) {
		t.Errorf("Envoy's own form: %v", err)
	}
}

// controller answers on TLS as the one that a certificate names.
type controller struct {
	meshv1.UnimplementedIdentityServer
	t     *testing.T
	ca    *authority
	token string
	// life of the SVIDs that it gives; 0: an hour. attested counts them.
	life     time.Duration
	attested atomic.Int64
}

func (c *controller) Bootstrap(_ context.Context, r *meshv1.BootstrapRequest) (*meshv1.Credentials, error) {
	if r.Token != c.token {
		return nil, status.Error(codes.PermissionDenied, "no such token")
	}
	c.attested.Add(1)
	return c.ca.answer(c.t, r.Csr, "spiffe://cluster.local/ns/weft-system/sa/weft-nodeproxy", cmp.Or(c.life, time.Hour)), nil
}

func (c *controller) serve(id string, signer *authority) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	certificate := tls.Certificate{Certificate: [][]byte{signer.issue(c.t, key.Public(), id, time.Hour)}, PrivateKey: key}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS13})))
	meshv1.RegisterIdentityServer(server, c)
	go server.Serve(l) // ends with Stop
	c.t.Cleanup(server.Stop)
	return l.Addr().String()
}

// TestBootstrap: the token goes to nobody but this mesh's controller.
func TestBootstrap(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	const controlplane = "spiffe://cluster.local/ns/weft-system/sa/weft-controlplane"
	for name, c := range map[string]struct {
		id     string
		signer *authority
		token  string
		want   string
	}{
		"the controller":       {controlplane, ca, "secret\n", ""},
		"another account":      {till, ca, "secret", "want the path"},
		"another CA":           {controlplane, stranger, "secret", "not of this mesh"},
		"a token that is over": {controlplane, ca, "old", "no such token"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			token, bundle := filepath.Join(dir, "token"), filepath.Join(dir, "ca.crt")
			for path, text := range map[string][]byte{token: []byte(c.token), bundle: ca.pem()} {
				if err := os.WriteFile(path, text, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			server := &controller{t: t, ca: ca, token: "secret"}
			a := NewAgent(AgentConfig{Controller: server.serve(c.id, c.signer), Namespace: "weft-system", TokenFile: token, BundleFile: bundle, Log: slog.New(slog.DiscardHandler)})
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			conn, _, err := a.Connect(ctx)
			if err == nil {
				_ = conn.Close()
			}
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// TestConnectionIsDueWhenItsSVIDIs, however short that lives: a connection that breaks must not come back with one that ended.
func TestConnectionIsDueWhenItsSVIDIs(t *testing.T) {
	const life = 10 * time.Minute
	ca, dir := newAuthority(t), t.TempDir()
	token, bundle := filepath.Join(dir, "token"), filepath.Join(dir, "ca.crt")
	for path, text := range map[string][]byte{token: []byte("secret"), bundle: ca.pem()} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	server := &controller{t: t, ca: ca, token: "secret", life: life}
	a := NewAgent(AgentConfig{Controller: server.serve("spiffe://cluster.local/ns/weft-system/sa/weft-controlplane", ca), Namespace: "weft-system",
		TokenFile: token, BundleFile: bundle, Log: slog.New(slog.DiscardHandler)})
	connect := func(attested int64) time.Time {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		conn, due, err := a.Connect(ctx)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if got := server.attested.Load(); got != attested {
			t.Errorf("attested %d times, want %d", got, attested)
		}
		return due
	}
	before := time.Now()
	first := connect(1)
	if early, late := before.Add(life*2/5-time.Second), time.Now().Add(life*3/5+time.Second); first.Before(early) || first.After(late) {
		t.Errorf("due %v after the SVID was given, want half of %v, give or take a tenth", first.Sub(before), life)
	}
	if again := connect(1); !again.Equal(first) {
		t.Errorf("another connection with the same SVID is due at another time: %v, %v", first, again)
	}
	a.mu.Lock()
	a.renew = time.Now()
	a.mu.Unlock()
	connect(2)
}

// TestRoots: those of the stream count more than the file's.
func TestRoots(t *testing.T) {
	first, second := newAuthority(t), newAuthority(t)
	path := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(path, first.pem(), 0o600); err != nil {
		t.Fatal(err)
	}
	a := NewAgent(AgentConfig{BundleFile: path})
	if got, err := a.RootsPEM(); err != nil || !bytes.Equal(got, first.pem()) {
		t.Errorf("from the file: %s %v", got, err)
	}
	a.SetRoots([][]byte{first.cert.Raw, second.cert.Raw})
	if got, err := a.RootsPEM(); err != nil || !bytes.Equal(got, append(first.pem(), second.pem()...)) {
		t.Errorf("from the stream: %s %v", got, err)
	}
}
