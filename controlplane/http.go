package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// stuck is how long a turn of the engine may take before the process counts as hung; the longest seen takes seconds.
const stuck = 30 * time.Second

// process is what the HTTP endpoints tell of.
type process struct {
	registry *prometheus.Registry
	metrics  *metrics
	// busy is how long the engine has been in a turn; ready: agents are served.
	busy  atomic.Pointer[func() time.Duration]
	ready atomic.Pointer[func() bool]
}

func newProcess() *process {
	r := prometheus.NewRegistry()
	return &process{registry: r, metrics: newMetrics(r)}
}

func (p *process) watch(busy func() time.Duration, ready func() bool) {
	p.busy.Store(&busy)
	p.ready.Store(&ready)
}

// health asks the part that a hung controller hangs in.
func (p *process) health() error {
	busy := p.busy.Load()
	if busy == nil {
		return nil
	}
	if took := (*busy)(); took > stuck {
		return fmt.Errorf("the engine has been in one turn for %s", took.Round(time.Second))
	}
	return nil
}

// handler answers /metrics, /healthz and /readyz.
func (p *process) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(p.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if err := p.health(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if ready := p.ready.Load(); ready == nil || !(*ready)() {
			http.Error(w, "objects or the leader's orders are still being read, or this replica is behind the leader", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

func serveHTTP(ctx context.Context, address string, h http.Handler, log *slog.Logger) {
	s := &http.Server{Addr: address, Handler: h, ReadHeaderTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { _ = s.Close() })
	if err := s.ListenAndServe(); err != nil && ctx.Err() == nil {
		log.Error("serve metrics", "address", address, "error", err)
	}
}
