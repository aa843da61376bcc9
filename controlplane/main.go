// Command controlplane turns Kubernetes and mesh resources into xDS for the node agents, issues their SVIDs, orders
// enrolment, and writes status.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ca"
	"github.com/weftmesh/weft/controlplane/internal/engine"
	"github.com/weftmesh/weft/controlplane/internal/recall"
	"github.com/weftmesh/weft/controlplane/internal/reports"
	"github.com/weftmesh/weft/controlplane/internal/serve"
	"github.com/weftmesh/weft/controlplane/internal/status"
	"github.com/weftmesh/weft/controlplane/internal/watch"
)

type options struct {
	namespace, trustDomain, listen, metrics, kubeconfig, logLevel string
	leaderElect                                                   bool
	ttl                                                           time.Duration
}

func main() {
	var o options
	command := &cobra.Command{
		Use: "controlplane", Short: "weft's controller", Args: cobra.NoArgs, SilenceUsage: true,
		RunE: func(c *cobra.Command, _ []string) error { return run(c.Context(), o) },
	}
	f := command.Flags()
	f.StringVar(&o.namespace, "namespace", "weft-system", "weft's own namespace")
	f.StringVar(&o.trustDomain, "trust-domain", names.DefaultTrustDomain, "SPIFFE trust domain")
	f.StringVar(&o.listen, "listen", ":15020", "address of the gRPC server for node agents")
	f.StringVar(&o.metrics, "metrics", ":15021", "address of /metrics, /healthz and /readyz")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig file; empty: the pod's own account")
	f.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
	f.BoolVar(&o.leaderElect, "leader-elect", true, "serve only while holding the Lease weft-controlplane")
	f.DurationVar(&o.ttl, "svid-ttl", ca.DefaultTTL, fmt.Sprintf("life of an SVID, %s to %s; agents renew at half of it", ca.MinTTL, ca.MaxTTL))
	command.AddCommand(newUninstallCommand())
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command.ExecuteContext(ctx); err != nil {
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return fmt.Errorf("read --log-level: %w", err)
	}
	log := slog.New(slog.NewJSONHandler(os.Stdout, &slog.HandlerOptions{Level: level}))
	klog.SetSlogLogger(log)
	ctrl.SetLogger(logr.FromSlogHandler(log.Handler()))
	if o.kubeconfig != "" {
		if err := os.Setenv("KUBECONFIG", o.kubeconfig); err != nil {
			return fmt.Errorf("use kubeconfig: %w", err)
		}
	}
	config, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find the API server: %w; set --kubeconfig outside a cluster", err)
	}
	config.QPS, config.Burst = 200, 400
	p := newProcess()
	go serveHTTP(ctx, o.metrics, p.handler(), log)
	if !o.leaderElect {
		return lead(ctx, o, config, p, log)
	}
	clients, err := kubernetes.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("make Kubernetes client: %w", err)
	}
	name, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("stand for election: %w", err)
	}
	e := election{clients: clients, namespace: o.namespace, identity: name, log: log}
	return e.run(ctx, func(ctx context.Context) error { return lead(ctx, o, config, p, log) })
}

// lead is everything the leader does.
func lead(ctx context.Context, o options, config *rest.Config, p *process, log *slog.Logger) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	clients, err := kubernetes.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("make Kubernetes client: %w", err)
	}
	scheme, err := watch.Scheme()
	if err != nil {
		return err
	}
	writer, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("make Kubernetes client: %w", err)
	}
	m := p.metrics
	m.leader.Set(1)
	defer m.leader.Set(0)

	var turn *engine.Engine
	changed := func() { turn.Changed() }
	server := serve.New(serve.Config{Log: log, Changed: changed})
	var authority *ca.Authority
	peer := func(ctx context.Context) (string, error) { return authority.Node(ctx) }
	store := reports.New(reports.Config{Peer: peer, Changed: changed, Log: log})
	memory, known, err := recall.Open(ctx, recall.Config{Client: clients, Namespace: o.namespace, Log: log})
	if err != nil {
		return err
	}
	conditions := status.New(status.Config{Client: writer, Log: log})
	turn = engine.New(engine.Config{
		Expect: server.Expect, SetSnapshot: server.SetSnapshot, Answered: server.Answered, State: server.State, Reports: store.View,
		Status: func(now engine.Picture) {
			p.ready.Store(true)
			m.picture(now)
			conditions.Take(now)
			memory.Take(now.Input, now.Good)
		},
		Resolved:  func(took time.Duration) { m.resolve.Observe(took.Seconds()) },
		Converged: func(took time.Duration) { m.converge.Observe(took.Seconds()) },
	})
	p.watch(turn.Busy)
	authority, err = ca.Open(ctx, ca.Config{Client: clients, Namespace: o.namespace, TrustDomain: o.trustDomain, TTL: o.ttl, Snapshot: turn.Snapshot, Log: log,
		Behind: func(hash string) []string {
			nodes := server.State() // connected, or gone not long ago
			return store.Lacking(hash, slices.Concat(nodes.Nodes, nodes.Away))
		}})
	if err != nil {
		return err
	}
	m.roots(p.registry, authority.Roots)
	watcher, err := watch.New(watch.Config{REST: config, Namespace: o.namespace, TrustDomain: o.trustDomain, Log: log, MeshConfig: known.MeshConfig, Good: known.Policies})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", o.listen)
	if err != nil {
		return fmt.Errorf("serve agents: %w", err)
	}
	agents := grpc.NewServer(append(connections(o.ttl), grpc.Creds(credentials.NewTLS(authority.TLS())), grpc.UnaryInterceptor(m.signs),
		grpc.InTapHandle(admit), grpc.MaxConcurrentStreams(streams))...)
	discovery.RegisterAggregatedDiscoveryServiceServer(agents, &serve.Service{Server: server, Peer: peer})
	meshv1.RegisterIdentityServer(agents, authority)
	meshv1.RegisterReportsServer(agents, store)

	go turn.Run(ctx)
	var writers sync.WaitGroup
	writers.Go(func() { conditions.Run(ctx) })
	writers.Go(func() { authority.Rotate(ctx) })
	writers.Go(func() { memory.Run(ctx) })
	go func() {
		if err := watcher.Run(ctx, turn.Input); err != nil {
			cancel(err)
		}
	}()
	go func() {
		// Agents are served once there is something to serve: an empty mesh would look like an order to withdraw.
		for s, newer := turn.Snapshot(); s == nil; s, newer = turn.Snapshot() {
			select {
			case <-ctx.Done():
				return
			case <-newer:
			}
		}
		log.Info("serving agents", "address", o.listen)
		if err := agents.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			cancel(fmt.Errorf("serve agents: %w", err))
		}
	}()
	<-ctx.Done()
	agents.Stop()
	writers.Wait() // the next leader begins when this returns
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// connections are the options that bound agents' connections. One ends at half the life of the SVID that opened it: what
// it carries must not outlive the attestation. Agents come back with the versions that they have, and lose nothing.
func connections(ttl time.Duration) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 5 * time.Second,
			MaxConnectionAge: ttl / 2, MaxConnectionAgeGrace: min(ttl/20, 30*time.Second)}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}
