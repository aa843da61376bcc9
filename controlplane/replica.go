package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/ca"
	"github.com/weftmesh/weft/controlplane/internal/engine"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/recall"
	"github.com/weftmesh/weft/controlplane/internal/replica"
	"github.com/weftmesh/weft/controlplane/internal/reports"
	"github.com/weftmesh/weft/controlplane/internal/serve"
	"github.com/weftmesh/weft/controlplane/internal/status"
	"github.com/weftmesh/weft/controlplane/internal/watch"
)

// replicaServer is one replica of the controller. All serve agents; the one that holds the Lease decides and writes.
type replicaServer struct {
	options options
	process *process
	log     *slog.Logger
	clients *kubernetes.Clientset
	writer  client.Client
	known   recall.Known

	election  *election
	turn      *engine.Engine
	server    *serve.Server
	reports   *reports.Store
	authority *ca.Authority
	hub       *replica.Hub
	follower  *replica.Follower
	watcher   *watch.Watcher
	conns     *connectionTable

	mu sync.Mutex
	// picture is what a leader does with each picture; nil: this replica does not lead.
	picture func(engine.Picture)
}

// newReplica wires a replica; run runs it.
func newReplica(ctx context.Context, o options, config *rest.Config, p *process, log *slog.Logger) (*replicaServer, error) {
	clients, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("make Kubernetes client: %w", err)
	}
	scheme, err := watch.Scheme()
	if err != nil {
		return nil, err
	}
	writer, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("make Kubernetes client: %w", err)
	}
	name, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("stand for election: %w", err)
	}
	r := &replicaServer{options: o, process: p, log: log, clients: clients, writer: writer, conns: newConnectionTable()}
	// The same process alone is the same candidate: what another one decided under this name is not known here.
	r.election = newElection(clients, o.namespace, identity{name, o.address, rand.Text()[:6]}, log)
	changed := func() { r.turn.Changed(); r.follower.Changed() }
	r.server = serve.New(serve.Config{Log: log, Changed: changed})
	peer := func(ctx context.Context) (string, error) { return r.authority.Node(ctx) }
	r.reports = reports.New(reports.Config{Peer: peer, Changed: changed, Log: log})
	r.hub = replica.NewHub(replica.HubConfig{
		Peer: func(ctx context.Context) error { return r.authority.Replica(ctx) }, Server: r.server, Reports: r.reports, Log: log,
	})
	r.turn = engine.New(engine.Config{
		Server: r.server, Reports: r.reports.View, Give: r.hub.Give, Status: r.take,
		Served:    func(*ir.Snapshot) { r.follower.Changed() },
		Resolved:  func(took time.Duration) { p.metrics.resolve.Observe(took.Seconds()) },
		Converged: func(took time.Duration) { p.metrics.converge.Observe(took.Seconds()) },
	})
	r.follower = replica.New(replica.FollowerConfig{
		Name: name, Leader: r.election.presence, Dial: r.dial, Server: r.server, Reports: r.reports, Take: r.turn.Take, Log: log,
	})
	if r.authority, err = ca.Open(ctx, ca.Config{Client: clients, Namespace: o.namespace, TrustDomain: o.trustDomain, TTL: o.ttl, MountDelay: o.mountDelay, Snapshot: r.turn.Snapshot, Log: log,
		Behind: func(hash string) []string {
			nodes := r.server.State() // connected, or gone not long ago
			return r.reports.Lacking(hash, slices.Concat(nodes.Nodes, nodes.Away))
		}}); err != nil {
		return nil, err
	}
	if _, r.known, err = recall.Open(ctx, recall.Config{Client: clients, Namespace: o.namespace, Log: log}); err != nil {
		return nil, err
	}
	r.watcher, err = watch.New(watch.Config{REST: config, Namespace: o.namespace, TrustDomain: o.trustDomain, SVIDLife: o.ttl, Log: log, MeshConfig: r.known.MeshConfig, Good: r.known.Policies})
	if err != nil {
		return nil, err
	}
	p.watch(r.turn.Busy, r.server.Ready)
	p.metrics.replica(p.registry, r.authority.Roots, r.server.Connected, r.server.Followers, r.follower.Current)
	return r, nil
}

// run serves and stands for election until ctx ends.
func (r *replicaServer) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	listener, err := net.Listen("tcp", r.options.listen)
	if err != nil {
		return fmt.Errorf("serve agents: %w", err)
	}
	peer := func(ctx context.Context) (string, error) { return r.authority.Node(ctx) }
	agents := grpc.NewServer(append(connections(r.options.ttl), grpc.Creds(credentials.NewTLS(r.authority.TLS())), grpc.UnaryInterceptor(r.process.metrics.signs),
		grpc.InTapHandle(admit), grpc.MaxConcurrentStreams(streams))...)
	discovery.RegisterAggregatedDiscoveryServiceServer(agents, &serve.Service{Server: r.server, Peer: peer, HangUp: r.conns.hangUp})
	meshv1.RegisterIdentityServer(agents, r.authority)
	meshv1.RegisterReportsServer(agents, r.reports)
	meshv1.RegisterReplicasServer(agents, r.hub)
	go r.turn.Run(ctx)
	go r.follower.Run(ctx)
	go r.authority.Follow(ctx)
	go func() {
		if err := r.watcher.Run(ctx, r.turn.Input); err != nil {
			cancel(err)
		}
	}()
	go func() {
		if err := agents.Serve(r.conns.listen(listener)); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			cancel(fmt.Errorf("serve agents: %w", err))
		}
	}()
	var elected sync.WaitGroup
	elected.Go(func() { cancel(r.stand(ctx)) })
	<-ctx.Done()
	agents.Stop()
	elected.Wait() // the next leader begins when this returns
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// stand stands for election, again and again: a Lease that is lost is no reason to leave the agents.
func (r *replicaServer) stand(ctx context.Context) error {
	for ctx.Err() == nil {
		r.election.await(ctx, r.server.Ready)
		if err := r.election.run(ctx, r.lead); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(renewEvery):
		}
	}
	return nil
}

// lead is what the leader does besides serving.
func (r *replicaServer) lead(ctx context.Context) error {
	current := r.server.Ready() // it served until now, and was not behind the leader before
	term, err := r.term(ctx)
	if err != nil {
		return nil // the Lease was lost meanwhile
	}
	if err := r.authority.Publish(ctx); err != nil && ctx.Err() == nil {
		r.log.Warn("publish the trust bundle, trying again", "error", err)
	}
	memory, _, err := recall.Open(ctx, recall.Config{Client: r.clients, Namespace: r.options.namespace, Log: r.log})
	if err != nil {
		r.log.Warn("this replica cannot lead", "error", err)
		return nil
	}
	conditions := status.New(status.Config{Client: r.writer, Log: r.log})
	decides := make(chan struct{})
	began := sync.OnceFunc(func() { close(decides) })
	r.setPicture(func(now engine.Picture) {
		began()
		r.process.metrics.picture(now)
		conditions.Take(now)
		memory.Take(now.Input, now.Good)
	})
	r.log.Info("leading", "term", term)
	r.process.metrics.leader.Set(1)
	r.server.Begin()
	r.reports.Begin()
	r.hub.Lead(term)
	r.turn.Lead(term, current)
	defer func() {
		r.turn.Lead(0, false)
		r.hub.Lead(0)
		r.setPicture(nil)
		r.process.metrics.leader.Set(0)
		r.process.metrics.forget()
	}()
	// Nothing is written before it is known what all nodes say: what they have not said yet would count as not so.
	select {
	case <-ctx.Done():
		return nil
	case <-decides:
	}
	var writers sync.WaitGroup
	writers.Go(func() { conditions.Run(ctx) })
	writers.Go(func() { r.authority.Rotate(ctx) })
	writers.Go(func() { memory.Run(ctx) })
	<-ctx.Done()
	writers.Wait()
	return nil
}

// term numbers this leader's time: the Lease's resource version when it was taken. It rises with every leader, also when the
// Lease was deleted in between.
func (r *replicaServer) term(ctx context.Context) (uint64, error) {
	for {
		lease, err := r.clients.CoordinationV1().Leases(r.options.namespace).Get(ctx, leaseName, metav1.GetOptions{})
		if err == nil {
			term, err := strconv.ParseUint(lease.ResourceVersion, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("read the Lease's resource version: %w", err)
			}
			return term, nil
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(renewEvery):
		}
	}
}

func (r *replicaServer) setPicture(to func(engine.Picture)) {
	r.mu.Lock()
	r.picture = to
	r.mu.Unlock()
}

func (r *replicaServer) take(now engine.Picture) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.picture != nil {
		r.picture(now)
	}
}

// largestOrders bounds the orders that come at once: some 100 bytes for each pod.
const largestOrders = 256 << 20

// dial connects to another replica.
func (r *replicaServer) dial(address string) (*grpc.ClientConn, error) {
	_, port, err := net.SplitHostPort(r.options.listen)
	if err != nil {
		return nil, fmt.Errorf("read --listen: %w", err)
	}
	return grpc.NewClient("passthrough:///"+net.JoinHostPort(address, port), grpc.WithTransportCredentials(credentials.NewTLS(r.authority.PeerTLS())),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(largestOrders)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}))
}
