// Package agent wires the node agent: the runtime's pods, the controller's wishes, the kernel and the node's Envoy.
package agent

import (
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
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/enrol"
	"github.com/weftmesh/weft/nodeproxy/internal/envoy"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/pods"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/nodeproxy/internal/report"
	"github.com/weftmesh/weft/nodeproxy/internal/svid"
	"github.com/weftmesh/weft/redirect"
)

// Config of the agent; see the command's flags.
type Config struct {
	Node, PodUID, Controller, Namespace, Version          string
	TokenFile, BundleFile, RunDir, AgentSocket            string
	BPFFS, CgroupRoot, KubeletCgroup, NRISocket, NetnsDir string
	BootIDFile, Metrics                                   string
	EnvoyUID, EnvoyGID                                    int
	Settle, Linger                                        time.Duration
	// DrainTimeout is how long the supervisor lets connections go on when it ends.
	DrainTimeout time.Duration
	AccessLog    bool
	Log          *slog.Logger
}

// kernel is what the agent asks of redirect besides what it asks for single pods.
type kernel interface {
	enrol.Kernel
	SetServices([]redirect.Service) ([]redirect.Refusal, error)
	SetAddresses([]netip.Addr) ([]netip.Addr, error)
	AttachProxy(generation uint32, cgroup string) error
	DetachProxy(generation uint32) error
	Sweep(age time.Duration) (int, error)
	SetConnectionsPerPod(n uint32) error
	SetClientAddress(own bool) error
	ProbesRefused() error
	Counters() (map[string]uint64, error)
	Alive() error
	Leaving() (int, error)
	Release(envoyRuns bool) error
}

type agent struct {
	config   Config
	kernel   kernel
	cache    *relay.Cache
	upstream *relay.Upstream
	svids    *svid.Store
	self     *svid.Agent
	enroller *enrol.Enroller
	reporter *report.Reporter
	table    *pods.Table

	// allow tells Envoy's broker the network namespaces of pods in the mesh.
	allow     func() error
	proxies   proxies
	attaching sync.Mutex
	// wished and policies are what pods were last looked at for.
	wished, policies seen
	saving           sync.Mutex              // one write of the last known state at a time
	applied          sync.Mutex              // one change of the services at a time
	captures         map[netip.AddrPort]bool // services that the kernel was told to capture; guarded by applied
	dirty            chan struct{}           // the index changed since it was last written
	started          chan struct{}           // closed when the agent knows what to do

	ended atomic.Bool

	mu   sync.Mutex
	conn *grpc.ClientConn
	due  time.Time // when conn is to be made anew
}

// Run is the agent. It ends with ctx, or when another agent takes the node (ErrSucceeded), and leaves the kernel and Envoy as they
// are.
func Run(ctx context.Context, c Config) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	health := serveHTTP(ctx, c, cancel)
	unlock, err := own(ctx, c)
	if ctx.Err() != nil {
		return failure(ctx)
	}
	if err != nil {
		return err
	}
	defer unlock()
	bootID, err := os.ReadFile(c.BootIDFile)
	if err != nil {
		return fmt.Errorf("read boot id: %w", err)
	}
	boot := strings.TrimSpace(string(bootID))
	kernel, err := redirect.Load(kernelConfig(c, boot))
	if err != nil {
		return err
	}
	defer kernel.Close()
	spaces, err := newNamespaces(kernel, c.RunDir, envoy.DrainTime+drainMargin)
	if err != nil {
		return err
	}
	a := &agent{config: c, kernel: kernel, allow: spaces.Write, dirty: make(chan struct{}, 1), started: make(chan struct{}), self: svid.NewAgent(svid.AgentConfig{
		Controller: c.Controller, Namespace: c.Namespace, TokenFile: c.TokenFile, BundleFile: c.BundleFile, Log: c.Log,
	})}
	a.cache = relay.NewCache(relay.Config{
		Want: func(k relay.Key, wanted bool) { a.upstream.Want(k, wanted) }, Coming: func(name string) bool { return a.svids.Coming(name) }, Log: c.Log,
	})
	for generation := range uint32(names.Generations) {
		a.cache.Pause(generation, true) // until follow has attached the hooks
	}
	a.upstream = relay.NewUpstream(relay.UpstreamConfig{
		Connect: a.connection, Node: c.Node, Cache: a.cache, Overlay: overlay(c.Node), Instead: a.instead, Apply: a.apply, Changed: a.changed, Log: c.Log,
	})
	a.svids = svid.NewStore(svid.StoreConfig{Conn: a.connection, Give: a.giveSVID, Drop: a.dropSVID, Log: c.Log})
	a.reporter = report.New(report.Config{Conn: a.connection, Node: c.Node, BootID: boot, Version: c.Version, Log: c.Log})
	a.table = pods.New(pods.Config{
		Socket: c.NRISocket, NetnsDir: c.NetnsDir, Hold: a.hold, Ended: func(uid, sandbox string) { a.enroller.Ended(uid, sandbox) }, Changed: func(uid string) { a.enroller.Changed(uid) }, Log: c.Log,
		Admit: func(ctx context.Context, c pods.Container) error { return a.enroller.Admit(ctx, c) },
	})
	a.enroller = enrol.New(enrol.Config{
		Kernel: spaces, Envoy: a.cache, Identities: a.svids, Wishes: a, Runtime: a.table.Get, Roots: a.self.RootsPEM,
		Generation: a.generation, Beside: a.proxies.beside, Report: a.reporter.Pod, Settle: c.Settle, Linger: c.Linger, AccessLog: c.AccessLog, Log: c.Log,
		Memory: podMemory{a.statePath(podFolder)}, Drain: envoy.DrainTime + drainMargin,
	})
	if err := a.restore(); err != nil {
		return err
	}
	if err := a.giveNode(); err != nil {
		return err
	}
	health.shows(a)
	defer health.shows(nil)
	defer spaces.close()
	go func() {
		if succeeded(ctx, c) {
			c.Log.Info("the agent of a later pod asks for the node")
			cancel(ErrSucceeded)
		}
	}()
	if err := a.run(ctx, cancel); err != nil {
		return err
	}
	return a.leave()
}

// failure is why ctx ended, unless that was asked for from outside.
func failure(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// giveNode gives Envoy what it has whatever the pods of its node are.
func (a *agent) giveNode() error {
	for _, cl := range lds.Clusters() {
		if _, err := a.cache.Set(cl.Name, cl); err != nil {
			return err
		}
	}
	holder := lds.Holder()
	if _, err := a.cache.Set(holder.Name, holder); err != nil {
		return err
	}
	return a.giveBundle()
}

// leave takes weft out of the kernel if that was the controller's order. Else everything stays as it is: an agent that
// is told to end cannot tell an upgrade from anything else.
func (a *agent) leave() error {
	if !a.upstream.Mesh().GetUninstall() {
		return nil
	}
	a.config.Log.Info("weft is uninstalled: leaving the kernel")
	if err := errors.Join(a.takeOut(), a.kernel.Release(envoy.Running(a.config.RunDir))); err != nil {
		return fmt.Errorf("leave the kernel: %w; run nodeproxy release", err)
	}
	return a.forget()
}

// takeOut withdraws all pods, and waits for the end of the connections that they have in Envoy: what these need inside the pods
// could not be removed later. Envoy, which is told to end as well, ends the last of them.
func (a *agent) takeOut() error {
	all, err := a.kernel.Pods()
	for _, p := range all {
		err = errors.Join(err, a.kernel.Withdraw(p.UID))
	}
	said := false
	for end := time.Now().Add(a.config.DrainTimeout + drainMargin); ; time.Sleep(leaveEvery) {
		_, failed := a.kernel.Sweep(handoverAge)
		left, uncounted := a.kernel.Leaving()
		if soon := time.Now().Add(afterEnvoy); !envoy.Running(a.config.RunDir) && end.After(soon) {
			end = soon
		}
		switch {
		case left == 0 || time.Now().After(end):
			if left > 0 {
				a.config.Log.Warn("pods' connections are counted still: going on", "pods", left)
			}
			return errors.Join(err, failed, uncounted)
		case !said:
			said = true
			a.config.Log.Info("pods have connections in Envoy: waiting for their end", "pods", left, "limit", a.config.DrainTimeout)
		}
	}
}

func kernelConfig(c Config, boot string) redirect.Config {
	k := redirect.Config{CgroupRoot: c.CgroupRoot, PinDir: filepath.Join(c.BPFFS, "weft"), BootID: boot, Log: c.Log}
	if c.KubeletCgroup != "" {
		k.KubeletCgroup = filepath.Join(c.CgroupRoot, c.KubeletCgroup)
	}
	return k
}

// run is the agent until ctx ends. When it returns nothing of it is at work any more.
func (a *agent) run(ctx context.Context, cancel context.CancelCauseFunc) error {
	defer a.ended.Store(true)
	var jobs sync.WaitGroup
	defer a.awaitEnd(&jobs)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	listener, err := a.listen()
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	(&relay.Service{Cache: a.cache}).Register(server)
	defer server.Stop()
	go func() {
		if err := server.Serve(listener); err != nil && ctx.Err() == nil {
			cancel(fmt.Errorf("serve Envoy: %w", err))
		}
	}()
	for generation := range uint32(names.Generations) {
		jobs.Go(func() {
			envoy.Watch(ctx, a.config.RunDir, generation, func(s envoy.State) { a.follow(generation, s) })
		})
		jobs.Go(func() { envoy.KeepListeners(ctx, a.config.RunDir, generation) })
	}
	jobs.Go(func() { a.upstream.Run(ctx) })
	jobs.Go(func() { a.reporter.Run(ctx) })
	jobs.Go(func() { a.followBundle(ctx) })
	jobs.Go(func() { a.record(ctx) })
	jobs.Go(func() {
		if err := a.start(ctx, &jobs); err != nil && ctx.Err() == nil {
			cancel(err)
		}
	})
	if err := a.kernel.Alive(); err != nil {
		return err
	}
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return failure(ctx)
		case <-tick.C:
			a.sweep()
		}
	}
}

// awaitEnd waits for what the agent does beside itself. Its process ends or begins anew right after, and takes the rest with it.
func (a *agent) awaitEnd(jobs *sync.WaitGroup) {
	ended := make(chan struct{})
	go func() { jobs.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(endLimit):
		a.config.Log.Warn("not everything has ended in time, going on", "limit", endLimit)
	}
}

// over tells whether the agent has ended: what comes late must not touch the kernel, for another may have the node.
func (a *agent) over() bool { return a.ended.Load() }

// Times of what the kernel needs now and then.
const (
	sweepEvery = 5 * time.Second
	// handoverAge is more than the time after which the kernel gives a connect up, about 130 s.
	handoverAge = 150 * time.Second
	// leaveEvery is how often an agent that leaves looks whether connections are left.
	leaveEvery = 200 * time.Millisecond
	// afterEnvoy is how soon the kernel has counted out the connections of an Envoy that has ended.
	afterEnvoy = 2 * time.Second
	// attachRetry is how soon hooks that could not be attached to Envoy's cgroup are tried again.
	attachRetry = 200 * time.Millisecond
	// drainMargin is how long after its drain time Envoy's last connection is surely cut: its workers do it one by one.
	drainMargin = time.Second
	// endLimit is how long the end of what the agent does is waited for.
	endLimit = 5 * time.Second
	// controllerLimit is how long a controller is waited for when there is a last known state to start from.
	controllerLimit = 5 * time.Second
)

// sweep does in the kernel what only time brings, and attaches what somebody else has taken away.
func (a *agent) sweep() {
	if err := a.kernel.Alive(); err != nil {
		a.config.Log.Warn("tell the hooks of the agent", "error", err)
	}
	if n, err := a.kernel.Sweep(handoverAge); err != nil {
		a.config.Log.Warn("sweep hand-overs", "error", err)
	} else if n > 0 {
		a.config.Log.Info("hand-overs without an end were forgotten", "count", n)
	}
	for generation := range uint32(names.Generations) {
		if s := a.proxies.get(generation); s.Cgroup != "" {
			a.attach(s)
		}
	}
	a.forgetLost()
}

// know waits until the controller's wishes and the runtime's pods are known, or the former's last known ones have to do. The
// runtime is not answered before there are wishes to judge its new pods by.
func (a *agent) know(ctx context.Context, jobs *sync.WaitGroup) error {
	if !a.upstream.Restored() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-a.upstream.Synced():
		}
	}
	jobs.Go(func() { a.table.Run(ctx) })
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-a.table.Synced():
	}
	var enough <-chan time.Time
	if a.upstream.Restored() {
		enough = time.After(controllerLimit)
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-a.upstream.Synced():
	case <-enough:
		a.config.Log.Warn("no controller answers: going on with the last known state")
	}
	return nil
}

// start begins to enrol once enough is known; Envoy is answered from then on.
func (a *agent) start(ctx context.Context, jobs *sync.WaitGroup) error {
	if err := a.know(ctx, jobs); err != nil {
		return err
	}
	a.await(ctx, 10*time.Second, a.proxies.known) // whose listeners are to be made
	close(a.started)
	if _, err := a.giveScopes(a.upstream.Services()); err != nil {
		return err
	}
	if err := a.enroller.Adopt(); err != nil {
		return err
	}
	held, err := a.kernel.Pods()
	if err != nil {
		return fmt.Errorf("read enrolled pods: %w", err)
	}
	// A gated pod has no listeners that Envoy could lose.
	held = slices.DeleteFunc(held, func(p redirect.Pod) bool { now, err := a.kernel.Verify(p.UID); return err != nil || !now.Inbound })
	var uids []string
	for _, p := range held {
		uids = append(uids, p.UID)
	}
	a.cache.Expect(uids)
	jobs.Go(func() { a.enroller.Run(ctx) })
	for _, p := range a.table.All() {
		a.enroller.Changed(p.UID)
	}
	// Envoy outlives the agent: before it is answered, the listeners that it has should be in the cache again.
	a.await(ctx, 10*time.Second, func() bool {
		for _, p := range held {
			if wish := a.LocalPod(p.UID); wish != nil && wish.Stage != meshv1.Stage_STAGE_OUT && len(a.cache.Names(relay.TypeListener, "in/"+p.UID+"/")) == 0 {
				return false
			}
		}
		return true
	})
	a.cache.Prime()
	jobs.Go(func() { a.applyRestored(ctx) })
	a.await(ctx, 10*time.Second, func() bool {
		for _, p := range held {
			if s, err := a.kernel.Verify(p.UID); err == nil && s.Inbound && len(a.cache.Names(relay.TypeListener, "in/"+p.UID+"/")) == 0 {
				return false
			}
		}
		return true
	})
	a.reporter.Ready()
	return nil
}

// await waits until something is so, or the limit.
func (a *agent) await(ctx context.Context, limit time.Duration, so func() bool) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for !so() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// listen opens the socket that Envoy alone may use.
func (a *agent) listen() (net.Listener, error) {
	_ = os.Remove(a.config.AgentSocket)
	l, err := net.Listen("unix", a.config.AgentSocket)
	if err != nil {
		return nil, fmt.Errorf("listen for Envoy: %w", err)
	}
	if err := os.Chown(a.config.AgentSocket, 0, a.config.EnvoyGID); err != nil {
		return nil, fmt.Errorf("give Envoy the agent's socket: %w", err)
	}
	if err := os.Chmod(a.config.AgentSocket, 0o660); err != nil {
		return nil, fmt.Errorf("protect the agent's socket: %w", err)
	}
	return &onlyUID{l, a.config.EnvoyUID, a.config.Log}, nil
}

// onlyUID refuses callers of another user: the socket carries private keys.
type onlyUID struct {
	net.Listener
	uid int
	log *slog.Logger
}

func (o *onlyUID) Accept() (net.Conn, error) {
	for {
		c, err := o.Listener.Accept()
		if err != nil {
			return nil, err
		}
		raw, err := c.(*net.UnixConn).SyscallConn()
		if err != nil {
			_ = c.Close()
			continue
		}
		var peer *unix.Ucred
		var failed error
		err = raw.Control(func(fd uintptr) { peer, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
		if err == nil && failed == nil && int(peer.Uid) == o.uid {
			return c, nil
		}
		o.log.Warn("caller of the agent's socket refused", "peer", peer)
		_ = c.Close()
	}
}

// LocalPod finds the controller's wish for a pod.
func (a *agent) LocalPod(uid string) *meshv1.LocalPod { return a.upstream.LocalPod(a.config.Node, uid) }

// Policy finds an inbound policy.
func (a *agent) Policy(hash string) *meshv1.InboundPolicy { return a.upstream.Policy(hash) }
