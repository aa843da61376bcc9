package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/enrol"
	"github.com/weftmesh/weft/nodeproxy/internal/envoy"
	"github.com/weftmesh/weft/nodeproxy/internal/pods"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/nodeproxy/internal/relay/relaytest"
	"github.com/weftmesh/weft/nodeproxy/internal/report"
	"github.com/weftmesh/weft/nodeproxy/internal/svid"
	"github.com/weftmesh/weft/redirect"
)

// patience is at least ten times what anything here takes.
const patience = 20 * time.Second

func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !so(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// fakeKernel has no pods and notes what else it is told.
type fakeKernel struct {
	enrol.Kernel
	mu        sync.Mutex
	services  [][]redirect.Service
	addresses [][]netip.Addr
	attached  []string
	detached  []uint32
	broken    error
	probes    error // why they are refused
	swept     []time.Duration
	// clientAddress: whether apps see their own address
	clientAddress []bool
	// pods that are enrolled, with how many sweeps find them in use once they are withdrawn, and those that are
	pods, leaving map[string]int
	// before is called before services are set.
	before func()
}

func (k *fakeKernel) SetServices(s []redirect.Service) ([]redirect.Refusal, error) {
	if k.before != nil {
		k.before()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.services = append(k.services, s)
	return nil, nil
}

func (k *fakeKernel) SetAddresses(a []netip.Addr) ([]netip.Addr, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.addresses = append(k.addresses, a)
	return nil, nil
}

func (k *fakeKernel) AttachProxy(generation uint32, cgroup string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.broken != nil {
		return k.broken
	}
	k.attached = append(k.attached, fmt.Sprint(generation, " ", cgroup))
	return nil
}

func (k *fakeKernel) DetachProxy(generation uint32) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.detached = append(k.detached, generation)
	return nil
}

func (k *fakeKernel) SetConnectionsPerPod(uint32) error { return nil }

func (k *fakeKernel) SetClientAddress(own bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.clientAddress = append(k.clientAddress, own)
	return nil
}

func (k *fakeKernel) ProbesRefused() error { return k.probes }

func (k *fakeKernel) Sweep(age time.Duration) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.swept = append(k.swept, age)
	for uid := range k.leaving {
		if k.leaving[uid]--; k.leaving[uid] < 0 {
			delete(k.leaving, uid)
		}
	}
	return 0, nil
}

func (k *fakeKernel) Pods() (all []redirect.Pod, err error) {
	for uid := range k.pods {
		all = append(all, redirect.Pod{UID: uid})
	}
	return all, nil
}

func (k *fakeKernel) Withdraw(uid string) error {
	k.leaving[uid] = k.pods[uid]
	delete(k.pods, uid)
	return nil
}

func (k *fakeKernel) Leaving() (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.leaving), nil
}

func (k *fakeKernel) Counters() (map[string]uint64, error) { return nil, nil }
func (k *fakeKernel) Release(bool) error                   { return nil }
func (k *fakeKernel) Alive() error                         { return nil }

// captured are the services that were set last, and how often any were.
func (k *fakeKernel) captured() (last []redirect.Service, times int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.services) > 0 {
		last = k.services[len(k.services)-1]
	}
	return last, len(k.services)
}

func (k *fakeKernel) attachments() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.attached)
}

// journal is a log that may be read while it is written.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(b)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

// bench is an agent without a runtime, between a controller and an Envoy that the test plays.
type bench struct {
	*agent
	kernel     *fakeKernel
	controller *relaytest.Controller
	log        *journal
}

func newBench(t *testing.T, runDir string) *bench {
	t.Helper()
	b := &bench{kernel: &fakeKernel{}, controller: relaytest.NewController(t), log: &journal{}}
	log := slog.New(slog.NewTextHandler(b.log, nil))
	a := &agent{config: Config{Node: "n1", RunDir: runDir, CgroupRoot: "/cgroup", EnvoyUID: os.Getuid(), EnvoyGID: os.Getgid(), Log: log}, kernel: b.kernel, allow: func() error { return nil },
		dirty: make(chan struct{}, 1), started: make(chan struct{})}
	a.cache = relay.NewCache(relay.Config{Want: func(k relay.Key, wanted bool) { a.upstream.Want(k, wanted) }, Log: log})
	a.upstream = relay.NewUpstream(relay.UpstreamConfig{Connect: b.controller.Connect, Node: "n1", Cache: a.cache, Overlay: overlay("n1"), Apply: a.apply, Changed: a.changed, Settle: 50 * time.Millisecond, Log: log})
	a.table = pods.New(pods.Config{Changed: func(string) {}, Log: log})
	a.reporter = report.New(report.Config{Conn: b.controller.Connect, Node: "n1", BootID: "boot", Log: log})
	a.self = svid.NewAgent(svid.AgentConfig{Log: log})
	a.enroller = enrol.New(enrol.Config{Kernel: b.kernel, Envoy: a.cache, Roots: a.self.RootsPEM, Log: log})
	a.proxies.take(1, envoy.State{}, "") // there is one supervisor at most
	b.agent = a
	if err := a.restore(); err != nil {
		t.Fatal(err)
	}
	return b
}

// connect runs the agent's stream to the controller.
func (b *bench) connect(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go b.upstream.Run(ctx)
	until(t, "the agent is connected", func() bool { open, _ := b.controller.Connected(); return open })
}

// stub is an Envoy that asks for one type, and answers when it is told to.
type stub struct {
	stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	got    chan *discovery.DeltaDiscoveryResponse
}

func (b *bench) envoy(t *testing.T, typeURL string) *stub {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	(&relay.Service{Cache: b.cache}).Register(server)
	go server.Serve(listener) // ends with Stop
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := &stub{stream, make(chan *discovery.DeltaDiscoveryResponse, 100)}
	go func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			s.got <- r
		}
	}()
	s.send(t, &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*"}})
	until(t, "the subscription is there", func() bool { return b.cache.Subscribed(typeURL) })
	return s
}

func (s *stub) send(t *testing.T, r *discovery.DeltaDiscoveryRequest) {
	t.Helper()
	if err := s.stream.Send(r); err != nil {
		t.Fatal(err)
	}
}

// next is the next response; its names are sorted.
func (s *stub) next(t *testing.T) (r *discovery.DeltaDiscoveryResponse, names []string) {
	t.Helper()
	select {
	case r = <-s.got:
	case <-time.After(patience):
		t.Fatal("the agent sends nothing")
	}
	for _, x := range r.Resources {
		names = append(names, x.Name)
	}
	slices.Sort(names)
	return r, names
}

func (s *stub) answer(t *testing.T, r *discovery.DeltaDiscoveryResponse, refuse string) {
	t.Helper()
	a := &discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}
	if refuse != "" {
		a.ErrorDetail = &rpcstatus.Status{Message: refuse}
	}
	s.send(t, a)
}

// TestLastKnownState: what one agent is told the next one knows, without a controller.
func TestLastKnownState(t *testing.T) {
	dir := t.TempDir()
	b := newBench(t, dir)
	if b.upstream.Restored() {
		t.Error("an agent without a past has one")
	}
	ctx, cancel := context.WithCancel(t.Context())
	recorded := make(chan struct{})
	go func() { defer close(recorded); b.record(ctx) }()
	b.connect(t)
	b.answered(t, b.send(t, service(meshv1.Class_CLASS_HTTP)))
	pod := &meshv1.LocalPod{Uid: "1", Namespace: "shop", Stage: meshv1.Stage_STAGE_ENFORCED, InboundPolicy: "hash"}
	b.answered(t, b.controller.Send(t, relay.TypeLocalPod, map[string]proto.Message{"n1/1": pod}))
	until(t, "the agent asks for the policy", func() bool { return b.controller.Asked(relay.TypeInboundPolicy, "hash") })
	policy := &meshv1.InboundPolicy{DefaultPort: &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_STRICT}}
	b.answered(t, b.controller.Send(t, relay.TypeInboundPolicy, map[string]proto.Message{"hash": policy}))
	// What concerns pods is on disk before the controller has its answer; all else when the agent ends, at the latest.
	cancel()
	<-recorded

	next := newBench(t, dir)
	if !next.upstream.Restored() || !proto.Equal(next.LocalPod("1"), pod) || !proto.Equal(next.Policy("hash"), policy) || len(next.upstream.Services()) != 1 {
		t.Errorf("the next agent knows pod %v, policy %v, services %v", next.LocalPod("1"), next.Policy("hash"), next.upstream.Services())
	}
	next.connect(t)
	_, version, err := relay.Pack(policy)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the next agent says what it knows", func() bool {
		got, ok := next.controller.Opening(relay.TypeInboundPolicy, "hash")
		return ok && got == version
	})
	for _, file := range []string{ownFile, indexFile} {
		if info, err := os.Stat(b.statePath(file)); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v %v, want mode 0600", file, info, err)
		}
	}

	// A broken file costs its content, and no more.
	if err := os.WriteFile(b.statePath(ownFile), []byte("weft-state 1 00\nx"), 0o600); err != nil {
		t.Fatal(err)
	}
	third := newBench(t, dir)
	if third.LocalPod("1") != nil || len(third.upstream.Services()) != 1 || !strings.Contains(third.log.String(), "last known state is not used") {
		t.Errorf("with a broken file the agent knows pod %v and services %v; its log:\n%s", third.LocalPod("1"), third.upstream.Services(), third.log)
	}
	if err := third.forget(); err != nil {
		t.Fatal(err)
	}
	if newBench(t, dir).upstream.Restored() {
		t.Error("what was forgotten is known")
	}
}

// TestEnvoyWaitsForItsHooks: it gets nothing until the kernel knows its cgroup, and again after that went.
func TestEnvoyWaitsForItsHooks(t *testing.T) {
	b := newBench(t, t.TempDir())
	b.cache.Prime()
	b.cache.Pause(0, true)
	e := b.envoy(t, relay.TypeScope)
	b.kernel.broken = errors.New("no such cgroup")
	state := envoy.State{Generation: 0, PID: 7, Cgroup: "/weft/envoy"}
	b.follow(0, state)
	until(t, "attaching was tried", func() bool { return strings.Contains(b.log.String(), "no such cgroup") })
	select {
	case r := <-e.got:
		t.Fatalf("an unknown Envoy got %v", r)
	case <-time.After(2 * attachRetry):
	}
	b.kernel.mu.Lock()
	b.kernel.broken = nil
	b.kernel.mu.Unlock()
	r, _ := e.next(t)
	e.answer(t, r, "")
	if got := b.kernel.attached; got[0] != "0 "+filepath.Join("/cgroup", "weft/envoy") {
		t.Errorf("attached %v", got)
	}
	// Every few seconds the cgroup is looked at again: it may be another one under the same name.
	before := b.kernel.attachments()
	b.sweep()
	if b.kernel.attachments() != before+1 {
		t.Error("sweeping does not look at Envoy's cgroup")
	}
	// The same news is none; another process is.
	b.follow(0, state)
	if b.kernel.attachments() != before+1 {
		t.Error("the same Envoy was attached again")
	}
	b.follow(0, envoy.State{})
	state.PID = 8
	b.follow(0, state)
	if b.kernel.attachments() != before+2 {
		t.Error("another Envoy was not attached")
	}
}

// TestSweepForgetsNothingAlive: the kernel gives a connect up after about 130 s.
func TestSweepForgetsNothingAlive(t *testing.T) {
	b := newBench(t, t.TempDir())
	b.sweep()
	if got := b.kernel.swept; len(got) != 1 || got[0] <= 130*time.Second || sweepEvery > 10*time.Second {
		t.Errorf("swept what is older than %v, every %v", got, sweepEvery)
	}
}

// TestSocketIsEnvoysAlone: it carries private keys.
func TestSocketIsEnvoysAlone(t *testing.T) {
	for name, c := range map[string]struct {
		uid  int
		want bool
	}{"Envoy": {os.Getuid(), true}, "another user": {os.Getuid() + 1, false}} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, t.TempDir())
			b.config.AgentSocket = filepath.Join(b.config.RunDir, "agent.sock")
			b.config.EnvoyUID = c.uid
			l, err := b.listen()
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if info, err := os.Stat(b.config.AgentSocket); err != nil || info.Mode().Perm() != 0o660 {
				t.Errorf("%v %v, want mode 0660", info, err)
			}
			accepted := make(chan net.Conn, 1)
			go func() {
				if conn, err := l.Accept(); err == nil {
					accepted <- conn
				}
			}()
			conn, err := net.Dial("unix", b.config.AgentSocket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if !c.want {
				_ = conn.SetReadDeadline(time.Now().Add(patience))
				if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("a stranger is not turned away: %v", err)
				}
				return
			}
			select {
			case got := <-accepted:
				_ = got.Close()
			case <-time.After(patience):
				t.Error("Envoy is turned away")
			}
		})
	}
}

// A node whose kubelet shares its cgroup says so where operators look.
func TestRefusedProbesShow(t *testing.T) {
	for want, cause := range map[float64]error{0: nil, 1: redirect.ErrKubeletShared} {
		registry := prometheus.NewRegistry()
		registry.MustRegister(&collector{&agent{kernel: &fakeKernel{probes: cause}, reporter: report.New(report.Config{})}})
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var got []float64
		for _, f := range families {
			if f.GetName() == "weft_probes_refused" {
				got = append(got, f.GetMetric()[0].GetGauge().GetValue())
			}
		}
		if len(got) != 1 || got[0] != want {
			t.Errorf("refused for %v: weft_probes_refused is %v, want %v", cause, got, want)
		}
	}
}
