// Command controlplane turns Kubernetes and mesh resources into xDS for the node agents, issues their SVIDs, orders
// enrolment, and writes status.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ca"
)

type options struct {
	namespace, trustDomain, listen, metrics, kubeconfig, logLevel, address string
	ttl, mountDelay                                                        time.Duration
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
	f.StringVar(&o.address, "address", os.Getenv("POD_IP"), "address at which other replicas reach this one; default: $POD_IP")
	f.DurationVar(&o.ttl, "svid-ttl", ca.DefaultTTL, fmt.Sprintf("life of an SVID, %s to %s; agents renew at half of it", ca.MinTTL, ca.MaxTTL))
	f.DurationVar(&o.mountDelay, "mount-delay", ca.DefaultMountDelay, "how long kubelets take at most to mount a ConfigMap that has changed; a new root waits for it")
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
	r, err := newReplica(ctx, o, config, p, log)
	if err != nil {
		return err
	}
	return r.run(ctx)
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
