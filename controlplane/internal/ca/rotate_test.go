package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/big"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/reports"
)

// plant is a controller with its API server, its clock, one connected node and one agent that only starts.
type plant struct {
	// other is a replica that does not lead.
	other   *Authority
	t       *testing.T
	clients *fake.Clientset
	now     time.Time
	a       *Authority
	// reports is what the controller was told; node is the connected one; deaf: it takes nothing more.
	reports *reports.Store
	node    *node
	deaf    bool
	// mounted are the roots of a starting agent, as old as DefaultMountDelay allows.
	mounted *x509.CertPool
	history []mount
	// svids that have not ended.
	svids []*x509.Certificate
	// crashAt counts writes down to the one at which the controller dies; done: after the API server took it.
	crashAt int
	done    bool
	key     *ecdsa.PrivateKey
}

type mount struct {
	at    time.Time
	roots string
}

var errCrash = errors.New("the controller died")

func newPlant(t *testing.T) *plant {
	p := &plant{t: t, key: newKey(t), clients: clients(review()), now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	die := func(action k8stesting.Action) (bool, runtime.Object, error) {
		resource, verb := action.GetResource().Resource, action.GetVerb()
		if verb != "create" && verb != "update" || resource != "secrets" && resource != "configmaps" {
			return false, nil, nil
		}
		if p.crashAt--; p.crashAt != 0 {
			return false, nil, nil
		}
		if p.done {
			if update, ok := action.(k8stesting.UpdateAction); ok && verb == "update" {
				if err := p.clients.Tracker().Update(action.GetResource(), update.GetObject(), own); err != nil {
					t.Error(err)
				}
			}
		}
		return true, nil, errCrash
	}
	p.clients.PrependReactor("*", "*", die)
	p.start()
	return p
}

// node is an agent: it follows the bundle, and reports what it trusts.
type node struct {
	bundles *bundleStream
	reports *reportStream
	hash    string
	trusted *x509.CertPool
}

// connect makes a new node that trusts what the old one did, with streams of its own until the test or the controller ends.
func (p *plant) connect() {
	p.t.Helper()
	ctx, cancel := context.WithCancel(agent(p.t, p.a))
	p.t.Cleanup(cancel)
	n := &node{bundles: &bundleStream{ctx: ctx, sent: make(chan *meshv1.TrustBundle, 8)}, reports: &reportStream{ctx: ctx, said: make(chan *meshv1.NodeReport)}}
	p.node = n
	go p.a.Bundle(&meshv1.BundleRequest{}, n.bundles) //nolint:errcheck // ends with ctx
	go p.reports.Report(n.reports)                    //nolint:errcheck // ends with ctx
	p.receive()
	p.say(&meshv1.NodeReport{Kind: &meshv1.NodeReport_Hello{Hello: &meshv1.Hello{Node: "node-1", BootId: "boot"}}})
	p.say(synced)
}

// synced is taken once the report before it is in the store.
var synced = &meshv1.NodeReport{Kind: &meshv1.NodeReport_Synced{Synced: &meshv1.Synced{}}}

func (p *plant) say(r *meshv1.NodeReport) {
	p.t.Helper()
	select {
	case p.node.reports.said <- r:
	case <-time.After(20 * time.Second):
		p.t.Fatal("the controller takes no report")
	}
}

// receive takes the next bundle that the node is given.
func (p *plant) receive() {
	p.t.Helper()
	select {
	case b := <-p.node.bundles.sent:
		p.node.hash, p.node.trusted = b.Hash, x509.NewCertPool()
		for _, der := range b.Roots {
			root, err := x509.ParseCertificate(der)
			if err != nil {
				p.t.Fatal(err)
			}
			p.node.trusted.AddCert(root)
		}
	case <-time.After(20 * time.Second):
		p.t.Fatal("the controller does not give the bundle of now")
	}
}

// trust takes the bundle of now, and waits until the controller knows.
func (p *plant) trust() {
	p.t.Helper()
	want := hashOf(p.a.roots)
	for p.node.hash != want {
		p.receive()
	}
	if len(p.reports.Lacking(want, []string{"node-1"})) == 0 {
		return
	}
	p.say(&meshv1.NodeReport{Kind: &meshv1.NodeReport_Health{Health: &meshv1.NodeHealth{TrustBundle: want}}})
	p.say(synced)
	if left := p.reports.Lacking(want, []string{"node-1"}); len(left) != 0 {
		p.t.Fatalf("%v said that they trust %s, and the controller does not know", left, want)
	}
}

type reportStream struct {
	grpc.ServerStream
	ctx  context.Context
	said chan *meshv1.NodeReport
}

func (s *reportStream) Context() context.Context     { return s.ctx }
func (s *reportStream) Send(*meshv1.ReportAck) error { return nil }
func (s *reportStream) Recv() (*meshv1.NodeReport, error) {
	select {
	case r := <-s.said:
		return r, nil
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

// start begins a controller on what the API server holds, as after a crash.
func (p *plant) start() {
	p.t.Helper()
	p.reports = reports.New(reports.Config{Peer: func(context.Context) (string, error) { return "node-1", nil }, Changed: func() {}, Log: slog.New(slog.DiscardHandler)})
	config := Config{
		Client: p.clients, Namespace: own, TrustDomain: "cluster.local", Log: slog.New(slog.DiscardHandler), TTL: time.Hour,
		Now:      func() time.Time { return p.now },
		Snapshot: func() (*ir.Snapshot, <-chan struct{}) { return mesh(), make(chan struct{}) },
		Behind:   func(hash string) []string { return p.reports.Lacking(hash, []string{"node-1"}) },
	}
	for {
		a, err := Open(p.t.Context(), config)
		if err == nil {
			err = a.Publish(p.t.Context()) // as a leader that begins
		}
		if err == nil {
			p.a = a
			if p.other == nil {
				if p.other, err = Open(p.t.Context(), config); err != nil {
					p.t.Fatal(err)
				}
			}
			p.connect()
			return
		}
		if !errors.Is(err, errCrash) {
			p.t.Fatal(err)
		}
	}
}

// turn is one step of the controller and a minute of everybody else's life, after which everything must hold together.
func (p *plant) turn() {
	p.t.Helper()
	if err := p.a.step(p.t.Context()); errors.Is(err, errCrash) {
		p.start()
	} else if err != nil {
		p.t.Fatal(err)
	}
	if !p.deaf {
		p.trust()
	}
	m, err := p.clients.CoreV1().ConfigMaps(own).Get(p.t.Context(), names.BundleConfigMap, metav1.GetOptions{})
	if err != nil {
		p.t.Fatal(err)
	}
	p.history = append(p.history, mount{p.now, m.Data[names.BundleKey]})
	for _, h := range p.history {
		if p.mounted == nil || p.now.Sub(h.at) >= DefaultMountDelay-time.Minute {
			p.mounted = x509.NewCertPool()
			p.mounted.AppendCertsFromPEM([]byte(h.roots))
		}
	}
	// Another replica signs too, by what it read before this step.
	late, err := p.other.signer().Issue(p.a.domain.ID(), p.key.Public(), p.a.config.TTL, p.now)
	if err != nil {
		p.t.Fatal(err)
	}
	p.verify(late, p.mounted, "a starting agent")
	if _, _, err := p.other.look(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	leaf, err := p.a.signer().Issue(p.a.domain.ID(), p.key.Public(), p.a.config.TTL, p.now)
	if err != nil {
		p.t.Fatal(err)
	}
	p.svids = append(slices.DeleteFunc(p.svids, func(c *x509.Certificate) bool { return p.now.After(c.NotAfter) }), late, leaf)
	for _, c := range []*x509.Certificate{p.svids[0], late, leaf} { // the oldest and the newest
		for name, pool := range map[string]*x509.CertPool{"the connected node": p.node.trusted, "the controller": p.a.pool(), "another replica": p.other.pool()} {
			p.verify(c, pool, name)
		}
	}
	p.verify(leaf, p.mounted, "a starting agent")
	server, err := p.a.serverCertificate(p.now)
	if err != nil {
		p.t.Fatal(err)
	}
	p.verify(server.Leaf, p.mounted, "a starting agent")
	p.now = p.now.Add(time.Minute)
	if p.stored().rotation.Phase == switched { // an hour to wait
		p.now = p.now.Add(9 * time.Minute)
	}
}

func (p *plant) verify(c *x509.Certificate, pool *x509.CertPool, who string) {
	p.t.Helper()
	if _, err := c.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: p.now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		p.t.Fatalf("%s refuses a certificate that lives: %v (phase %q)", who, err, p.stored().rotation.Phase)
	}
}

func (p *plant) secret() *corev1.Secret {
	p.t.Helper()
	secret, err := p.clients.CoreV1().Secrets(own).Get(p.t.Context(), secretName, metav1.GetOptions{})
	if err != nil {
		p.t.Fatal(err)
	}
	return secret
}

func (p *plant) stored() stored {
	p.t.Helper()
	s, err := read(p.secret())
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

func (p *plant) ask(value string) {
	p.t.Helper()
	secret := p.secret()
	if secret.Annotations == nil {
		secret.Annotations = map[string]string{}
	}
	secret.Annotations[AnnotationRotate] = value
	if err := p.clients.Tracker().Update(corev1.SchemeGroupVersion.WithResource("secrets"), secret, own); err != nil {
		p.t.Fatal(err)
	}
}

// tells looks at what the Secret says to its user.
func (p *plant) tells(phase, rotated string) {
	p.t.Helper()
	if a := p.secret().Annotations; a[AnnotationPhase] != phase || a[AnnotationRotated] != rotated {
		p.t.Errorf("the Secret says phase %q, rotated %q, want %q and %q", a[AnnotationPhase], a[AnnotationRotated], phase, rotated)
	}
}

// until turns until a phase is stored.
func (p *plant) until(want phase) {
	p.t.Helper()
	for range 100 {
		if p.turn(); p.stored().rotation.Phase == want {
			return
		}
	}
	p.t.Fatalf("phase %q is never reached; it stays %q", want, p.stored().rotation.Phase)
}

func (p *plant) serial() *big.Int { return p.a.signer().Certificate.SerialNumber }

func TestRotationByAnnotation(t *testing.T) {
	p := newPlant(t)
	first := p.serial()
	for range 5 {
		p.turn()
	}
	if s := p.stored(); s.rotation.Phase != idle || p.serial().Cmp(first) != 0 {
		t.Fatalf("a rotation began unasked: %+v", s.rotation)
	}
	p.ask("one")
	p.until(added)
	p.tells("added", "")
	if len(p.a.roots) != 2 || p.serial().Cmp(first) != 0 {
		t.Error("added: want two roots, and the old one signing")
	}
	p.until(switched)
	p.tells("switched", "")
	if p.serial().Cmp(first) == 0 || p.stored().roots[1].Key != nil {
		t.Error("switched: want the new root signing, and the old key gone")
	}
	begun := p.now
	p.until(idle)
	p.tells("done", "one")
	if waited := p.now.Sub(begun); waited < time.Hour {
		t.Errorf("the old root went after %s, before SVIDs that it signed ended", waited)
	}
	second := p.serial()
	for range 5 {
		p.turn()
	}
	if p.stored().rotation.Phase != idle {
		t.Error("one request was answered twice")
	}
	p.ask("two")
	p.until(added)
	p.tells("added", "one")
	p.until(idle)
	p.tells("done", "two")
	if p.serial().Cmp(second) == 0 {
		t.Error("the second request was not answered")
	}
}

func TestRotationByAge(t *testing.T) {
	p := newPlant(t)
	p.now = p.now.Add(rootLife - renewBefore - time.Hour)
	p.turn()
	if p.stored().rotation.Phase != idle {
		t.Fatal("a rotation began too early")
	}
	p.now, p.svids = p.now.Add(2*time.Hour), nil
	p.until(added)
	p.until(idle)
	if left := p.a.signer().Certificate.NotAfter.Sub(p.now); left < rootLife-24*time.Hour {
		t.Errorf("the new root lives for %s only", left)
	}
}

// A node that has not acknowledged the new root holds the switch up, for as long as it takes.
func TestRotationWaitsForEveryNode(t *testing.T) {
	p := newPlant(t)
	p.turn()
	first := p.serial()
	p.deaf = true
	p.ask("one")
	for range 20 {
		p.turn()
	}
	if s := p.stored(); s.rotation.Phase != published || p.serial().Cmp(first) != 0 {
		t.Errorf("phase %q while a node lacks the new root", s.rotation.Phase)
	}
	p.deaf = false
	p.until(switched)
}

// A node whose reports begin anew has yet to say that it trusts the new root.
func TestRotationWaitsForANodeThatComesBack(t *testing.T) {
	p := newPlant(t)
	p.ask("one")
	p.until(published)
	p.connect()
	p.deaf = true
	for range 20 {
		p.turn()
	}
	if s := p.stored(); s.rotation.Phase != published {
		t.Errorf("phase %q though the node has not said since its Hello what it trusts", s.rotation.Phase)
	}
	p.deaf = false
	p.until(idle)
}

// The controller dies at every write there is, before and after the API server takes it, and the next one goes on.
func TestRotationSurvivesEveryCrash(t *testing.T) {
	for _, done := range []bool{false, true} {
		crashes := 0
		for n := 1; ; n++ {
			p := newPlant(t)
			p.turn()
			first := p.serial()
			p.ask("one")
			p.crashAt, p.done = n, done
			p.until(added)
			p.until(idle)
			if p.serial().Cmp(first) == 0 || len(p.a.roots) != 1 || len(p.stored().roots) != 1 {
				t.Fatalf("crash at write %d: the rotation did not end with one new root", n)
			}
			if m := p.history[len(p.history)-1]; m.roots != string(p.a.BundlePEM()) {
				t.Fatalf("crash at write %d: the ConfigMap does not hold the bundle", n)
			}
			if p.crashAt > 0 {
				break // no such write any more
			}
			crashes++
		}
		if crashes < 6 { // added, published, switched, dropped; the ConfigMap at two of them at least
			t.Errorf("only %d writes were tried", crashes)
		}
	}
}

// Whatever else changed the Secret meanwhile is not overwritten.
func TestConflictIsNotOverwritten(t *testing.T) {
	p := newPlant(t)
	p.ask("one")
	version := "read before"
	secret := p.secret()
	secret.ResourceVersion = version
	if err := p.clients.Tracker().Update(corev1.SchemeGroupVersion.WithResource("secrets"), secret, own); err != nil {
		t.Fatal(err)
	}
	p.clients.PrependReactor("update", "secrets", func(a k8stesting.Action) (bool, runtime.Object, error) {
		if v := a.(k8stesting.UpdateAction).GetObject().(*corev1.Secret).ResourceVersion; v != version {
			t.Errorf("update of version %q", v)
		}
		return true, nil, errors.New("the object has been modified")
	})
	before := string(p.a.BundlePEM())
	if err := p.a.step(t.Context()); err == nil {
		t.Error("a conflict is no error")
	}
	if string(p.a.BundlePEM()) != before {
		t.Error("the new root is used although the Secret does not hold it")
	}
}

func TestUnreadableStateIsToldAndLeft(t *testing.T) {
	p := newPlant(t)
	secret := p.secret()
	secret.Data[rotationKey] = []byte(`{"phase":"sideways"}`)
	if err := p.clients.Tracker().Update(corev1.SchemeGroupVersion.WithResource("secrets"), secret, own); err != nil {
		t.Fatal(err)
	}
	if err := p.a.step(t.Context()); err == nil {
		t.Error("an unknown phase is no error")
	}
	if string(p.secret().Data[rotationKey]) != `{"phase":"sideways"}` {
		t.Error("the state was overwritten")
	}
}

type bundleStream struct {
	grpc.ServerStream
	ctx  context.Context
	sent chan *meshv1.TrustBundle
}

func (s *bundleStream) Context() context.Context         { return s.ctx }
func (s *bundleStream) Send(b *meshv1.TrustBundle) error { s.sent <- b; return nil }

func TestBundleStreamsEveryChange(t *testing.T) {
	p := newPlant(t)
	stream := &bundleStream{ctx: agent(t, p.a), sent: make(chan *meshv1.TrustBundle, 8)}
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(stream.ctx)
	stream.ctx = ctx
	go func() { ended <- p.a.Bundle(&meshv1.BundleRequest{}, stream) }()
	first := <-stream.sent
	p.ask("one")
	p.until(added)
	second := <-stream.sent
	if len(first.Roots) != 1 || len(second.Roots) != 2 || first.Hash == second.Hash || second.Hash != hashOf(p.a.roots) {
		t.Errorf("streamed %d roots (%s), then %d (%s)", len(first.Roots), first.Hash, len(second.Roots), second.Hash)
	}
	p.until(switched)
	if third := <-stream.sent; third.Hash != second.Hash {
		t.Error("the order of roots changes their hash")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestRotationOutlastsLongerSVIDs: a shorter life that is configured says nothing about the SVIDs that are out.
func TestRotationOutlastsLongerSVIDs(t *testing.T) {
	p := newPlant(t)
	p.a.config.TTL = 3 * time.Hour
	p.turn()
	if s := p.stored(); s.rotation.TTL != 3*time.Hour || s.rotation.Phase != idle {
		t.Errorf("the Secret says %+v", s.rotation)
	}
	p.a.config.TTL = time.Hour
	p.ask("one")
	p.until(switched)
	begun := p.now
	p.until(idle)
	if waited := p.now.Sub(begun); waited < 3*time.Hour {
		t.Errorf("the old root went after %s", waited)
	}
}

// TestOldRootGoes: a life after the last SVID that it can have signed, and as long again for clocks that differ, 5 minutes at most.
func TestOldRootGoes(t *testing.T) {
	p := newPlant(t)
	roots := p.stored().roots
	for life, after := range map[time.Duration]time.Duration{time.Minute: 2 * time.Minute, 5 * time.Minute: 10 * time.Minute, time.Hour: 65 * time.Minute} {
		p.a.config.TTL = life
		s := stored{[]*Root{roots[0], roots[0]}, rotation{Phase: switched, Since: p.now, TTL: life}}
		for wait, gone := range map[time.Duration]bool{after - time.Second: false, after: true} {
			p.now = s.rotation.Since.Add(wait)
			next, err := p.a.next(s, "")
			if err != nil || (next != nil) != gone || gone && (next.rotation.Phase != idle || len(next.roots) != 1) {
				t.Errorf("SVIDs live for %s, after %s: %+v, %v, want the old root gone: %t", life, wait, next, err, gone)
			}
		}
	}
}
