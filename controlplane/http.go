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

// process is what the HTTP endpoints tell of: every replica has one, the leader fills it.
type process struct {
	registry *prometheus.Registry
	metrics  *metrics
	ready    atomic.Bool
	// busy is how long the engine has been in a turn.
	busy atomic.Pointer[func() time.Duration]
}

func newProcess() *process {
	r := prometheus.NewRegistry()
	return &process{registry: r, metrics: newMetrics(r)}
}

func (p *process) watch(busy func() time.Duration) { p.busy.Store(&busy) }

// health asks the part that a hung controller hangs in. A replica that does not lead has none.
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
		if !p.ready.Load() {
			http.Error(w, "not leading, or objects are still being read", http.StatusServiceUnavailable)
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
