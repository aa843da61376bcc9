package enrol

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/pods"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/nodeproxy/internal/svid"
	"github.com/weftmesh/weft/redirect"
)

const (
	uid    = "5f0c"
	till   = "spiffe://cluster.local/ns/shop/sa/till"
	hashed = "policy-1"
	drain  = 6 * time.Second
)

var errBroken = errors.New("broken on purpose")

// world is everything around an Enroller: kernel, Envoy, identities, wishes, runtime. It keeps what happened, in order.
type world struct {
	mu     sync.Mutex
	events []string
	// fail makes an event fail, by its beginning.
	fail map[string]error
	// during is called at an event, by its beginning.
	during map[string]func()

	held map[string]*redirect.State
	deaf bool // Envoy acknowledges and does not listen
	// refuses says what Envoy says of a resource.
	refuses   func(proto.Message) error
	lost      bool // the kernel has lost the sockets of Envoy's listeners; new ones it takes
	now       time.Time
	memory    map[string][]byte
	resources map[relay.Key]proto.Message
	users     map[string]bool
	noSVID    bool
	roots     string

	wish     *meshv1.LocalPod
	policies map[string]*meshv1.InboundPolicy
	running  map[string]pods.Pod
	noEnvoy  bool
	// generation serves, those beside it serve what they have.
	generation uint32
	beside     []uint32
	reports    []*meshv1.PodReport
}

// newWorld has one running pod that the controller speaks of.
func newWorld() *world {
	address := netip.MustParseAddr("10.1.0.7")
	return &world{
		fail: map[string]error{}, during: map[string]func(){}, held: map[string]*redirect.State{}, resources: map[relay.Key]proto.Message{},
		users: map[string]bool{}, roots: "first roots", now: time.Now(), memory: map[string][]byte{},
		wish: &meshv1.LocalPod{Uid: uid, Namespace: "shop", Name: "till-1", ServiceAccount: "till", SpiffeId: till,
			Goal: meshv1.Stage_STAGE_ENFORCED, InboundPolicy: hashed, Strict: true, ProbePorts: []uint32{8081}, Addresses: [][]byte{address.AsSlice()}},
		policies: map[string]*meshv1.InboundPolicy{hashed: {DefaultPort: &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_STRICT, Identity: true, Restricted: true,
			Allow: []*meshv1.Rule{{Name: "shop/only", Peers: []*meshv1.Peer{{Match: &meshv1.Peer_SpiffeId{SpiffeId: till}}}}}}}},
		running: map[string]pods.Pod{uid: {UID: uid, Namespace: "shop", Name: "till-1", Sandbox: "sandbox-one-0001", NetnsPath: "/run/netns/cni-1",
			Addresses: []netip.Addr{address}, Unheld: true}},
	}
}

func (w *world) enroller() *Enroller {
	e := New(Config{
		Kernel: (*fakeKernel)(w), Envoy: (*fakeEnvoy)(w), Identities: (*fakeIdentities)(w), Wishes: (*fakeWishes)(w),
		Runtime: func(uid string) (pods.Pod, bool) {
			w.mu.Lock()
			defer w.mu.Unlock()
			p, ok := w.running[uid]
			return p, ok
		},
		Roots:      func() ([]byte, error) { return []byte(w.roots), nil },
		Generation: func() (uint32, bool) { return w.generation, !w.noEnvoy },
		Beside:     func() []uint32 { return w.beside },
		Report: func(r *meshv1.PodReport) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.events = append(w.events, "report "+strings.TrimPrefix(r.State.String(), "POD_STATE_"))
			w.reports = append(w.reports, r)
		},
		Memory: (*fakeMemory)(w), Drain: drain,
		Log: slog.New(slog.DiscardHandler),
	})
	e.now = func() time.Time { return w.now }
	e.inspect = func(string) error { return w.event("inspect") }
	e.count = func(string) (uint32, error) { return 3, w.event("count") }
	return e
}

// event notes one and says how it ends.
func (w *world) event(format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	w.mu.Lock()
	w.events = append(w.events, text)
	var failed error
	for beginning, err := range w.fail {
		if strings.HasPrefix(text, beginning) {
			failed = err
		}
	}
	var call func()
	for beginning, f := range w.during {
		if strings.HasPrefix(text, beginning) {
			call = f
		}
	}
	w.mu.Unlock()
	if call != nil {
		call()
	}
	return failed
}

// clear forgets what happened.
func (w *world) clear() { w.events, w.reports = nil, nil }

// at is where an event stands, by its beginning; -1: nowhere.
func (w *world) at(beginning string) int {
	return slices.IndexFunc(w.events, func(s string) bool { return strings.HasPrefix(s, beginning) })
}

// inOrder checks that events happened, each after the one before it.
func (w *world) inOrder(t *testing.T, beginnings ...string) {
	t.Helper()
	last := -1
	for _, b := range beginnings {
		at := w.at(b)
		if at < 0 || at < last {
			t.Fatalf("%q is not where it belongs, order %v:\n%s", b, beginnings, strings.Join(w.events, "\n"))
		}
		last = at
	}
}

func (w *world) never(t *testing.T, beginning string) {
	t.Helper()
	if w.at(beginning) >= 0 {
		t.Errorf("%q happened:\n%s", beginning, strings.Join(w.events, "\n"))
	}
}

// report is the last one.
func (w *world) report(t *testing.T) *meshv1.PodReport {
	t.Helper()
	if len(w.reports) == 0 {
		t.Fatal("nothing was reported")
	}
	return w.reports[len(w.reports)-1]
}

// nothing checks that nothing of any pod is left.
func (w *world) nothing(t *testing.T) {
	t.Helper()
	if len(w.held) != 0 {
		t.Errorf("the kernel still holds %v", w.held)
	}
	for k := range w.resources {
		t.Errorf("Envoy still has %s", k.Name)
	}
	if len(w.users) != 0 {
		t.Errorf("SVIDs are still used by %v", w.users)
	}
}

// enrolled brings the pod to a stage and forgets how.
func (w *world) enrolled(t *testing.T, stage meshv1.Stage) *Enroller {
	t.Helper()
	e := w.enroller()
	w.wish.Stage = stage
	turn(t, e)
	w.clear()
	return e
}

// turn looks at the pod once and expects that to go well.
func turn(t *testing.T, e *Enroller) {
	t.Helper()
	if _, err := e.reconcile(t.Context(), uid); err != nil {
		t.Fatal(err)
	}
}

type fakeKernel world

func (k *fakeKernel) Gate(p redirect.Pod) error {
	if err := (*world)(k).event("gate"); err != nil {
		return err
	}
	if k.held[p.UID] == nil {
		k.held[p.UID] = &redirect.State{Pod: p, Gated: true}
	}
	return nil
}

func (k *fakeKernel) Enrol(p redirect.Pod) error {
	if err := (*world)(k).event("kernel enrols"); err != nil {
		return err
	}
	if old := k.held[p.UID]; old == nil {
		k.held[p.UID] = &redirect.State{Pod: p}
	} else {
		old.Drift = nil
	}
	return nil
}

func (k *fakeKernel) pod(uid string) (*redirect.State, error) {
	if s := k.held[uid]; s != nil {
		return s, nil
	}
	return nil, redirect.ErrUnknownPod
}

func (k *fakeKernel) Listening(uid string) ([]redirect.Listener, error) {
	if err := (*world)(k).event("kernel lists listeners"); err != nil {
		return nil, err
	}
	return k.listening(), nil
}

// listening are the sockets of the listeners that Envoy has.
func (k *fakeKernel) listening() (out []redirect.Listener) {
	for _, l := range []struct {
		name string
		role redirect.Role
	}{{"out/", redirect.RoleOut}, {"in/", redirect.RoleIn}, {"in-first/", redirect.RoleInFirst}} {
		for _, name := range (*fakeEnvoy)(k).Names(relay.TypeListener, l.name) {
			if generation, ok := names.ListenerGeneration(name); ok && !k.deaf && !k.lost {
				out = append(out, redirect.Listener{Role: l.role, Generation: generation})
			}
		}
	}
	return out
}

func (k *fakeKernel) Capture(uid string, inbound, outbound bool) error {
	if err := (*world)(k).event("capture in=%t out=%t", inbound, outbound); err != nil {
		return err
	}
	s, err := k.pod(uid)
	if err == nil {
		s.Inbound, s.Outbound = inbound, outbound
		s.Gated = s.Gated && !(inbound && outbound)
	}
	return err
}

func (k *fakeKernel) SetMode(uid string, m redirect.Mode) error {
	if err := (*world)(k).event("mode strict=%t probes=%v", m.Strict, m.Probes); err != nil {
		return err
	}
	s, err := k.pod(uid)
	if err == nil {
		s.Strict = m.Strict
	}
	return err
}

func (k *fakeKernel) Flip(uid string, generation uint32) error {
	if err := (*world)(k).event("flip to %d", generation); err != nil {
		return err
	}
	s, err := k.pod(uid)
	if err == nil {
		s.Generation = generation
	}
	return err
}

func (k *fakeKernel) SetShortcut(uid string, on bool) error {
	s, err := k.pod(uid)
	if err != nil || s.Shortcut == on {
		return err
	}
	if err := (*world)(k).event("short circuit %t", on); err != nil {
		return err
	}
	s.Shortcut = on
	return nil
}

func (k *fakeKernel) Withdraw(uid string) error {
	if err := (*world)(k).event("kernel withdraws"); err != nil {
		return err
	}
	delete(k.held, uid)
	return nil
}

func (k *fakeKernel) Verify(uid string) (redirect.State, error) {
	if err := k.fail["kernel is read"]; err != nil {
		return redirect.State{}, err
	}
	s, err := k.pod(uid)
	if err != nil {
		return redirect.State{}, err
	}
	now := *s
	now.Listeners = k.listening()
	return now, nil
}

func (k *fakeKernel) Pods() ([]redirect.Pod, error) {
	var out []redirect.Pod
	for _, s := range k.held {
		out = append(out, s.Pod)
	}
	return out, nil
}

type fakeEnvoy world

func (f *fakeEnvoy) Set(name string, m proto.Message) (string, error) {
	body, version, err := relay.Pack(m)
	if err != nil {
		return "", err
	}
	f.resources[relay.Key{TypeURL: body.TypeUrl, Name: name}] = m
	return version, (*world)(f).event("Envoy gets %s", name)
}

func (f *fakeEnvoy) Delete(k relay.Key) {
	delete(f.resources, k)
	if k.TypeURL == relay.TypeListener {
		f.lost = false
	}
	_ = (*world)(f).event("Envoy loses %s", k.Name)
}

func (f *fakeEnvoy) Complete(podUID string) { _ = (*world)(f).event("complete %s", podUID) }

func (f *fakeEnvoy) Wait(_ context.Context, k relay.Key, version string) error {
	if m := f.resources[k]; m != nil && f.refuses != nil {
		if err := f.refuses(m); err != nil {
			return err
		}
	}
	return (*world)(f).event("Envoy acknowledges %s", k.Name)
}

func (f *fakeEnvoy) Names(typeURL, prefix string) (out []string) {
	for k := range f.resources {
		if k.TypeURL == typeURL && strings.HasPrefix(k.Name, prefix) {
			out = append(out, k.Name)
		}
	}
	slices.Sort(out)
	return out
}

// listeners are those that Envoy has, by name.
func (w *world) listeners() []string { return (*fakeEnvoy)(w).Names(relay.TypeListener, "") }

// inbound is the pod's inbound listener.
func (w *world) inbound(t *testing.T) *listener.Listener {
	t.Helper()
	for _, name := range (*fakeEnvoy)(w).Names(relay.TypeListener, "in/") {
		return w.resources[relay.Key{TypeURL: relay.TypeListener, Name: name}].(*listener.Listener)
	}
	t.Fatal("Envoy has no inbound listener")
	return nil
}

type fakeIdentities world

func (f *fakeIdentities) Use(ctx context.Context, a svid.Account, podUID string) (*svid.SVID, error) {
	f.users[podUID] = true
	if err := (*world)(f).event("SVID"); err != nil {
		return nil, err
	}
	if f.noSVID {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &svid.SVID{ID: "spiffe://cluster.local/ns/" + a.Namespace + "/sa/" + a.Name, NotBefore: f.now, NotAfter: f.now.Add(time.Hour)}, nil
}

func (f *fakeIdentities) Leave(_ svid.Account, podUID string) {
	delete(f.users, podUID)
	_ = (*world)(f).event("leave SVID")
}

type fakeWishes world

func (f *fakeWishes) LocalPod(asked string) *meshv1.LocalPod {
	if asked != uid {
		return nil
	}
	return f.wish
}

func (f *fakeWishes) Policy(hash string) *meshv1.InboundPolicy { return f.policies[hash] }

type fakeMemory world

func (f *fakeMemory) Save(podUID string, record []byte) error {
	if err := (*world)(f).event("remember"); err != nil {
		return err
	}
	f.memory[podUID] = record
	return nil
}

func (f *fakeMemory) Load(podUID string) ([]byte, error) { return f.memory[podUID], nil }

func (f *fakeMemory) Drop(podUID string) error {
	delete(f.memory, podUID)
	return nil
}
