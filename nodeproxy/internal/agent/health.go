package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// health answers probes and metrics, of an agent that stands by as well.
type health struct{ owner atomic.Pointer[agent] }

// shows sets the agent that is shown; nil: another one has the node.
func (h *health) shows(a *agent) { h.owner.Store(a) }

var ownsNode = prometheus.NewDesc("weft_agent_owns_node", "1 while this agent has the node, 0 while it stands by for another one.", nil, nil)

// Describe is prometheus.Collector's.
func (h *health) Describe(out chan<- *prometheus.Desc) {
	out <- ownsNode
	(&collector{}).Describe(out)
}

// Collect is prometheus.Collector's.
func (h *health) Collect(out chan<- prometheus.Metric) {
	a, owns := h.owner.Load(), 0.0
	if a != nil {
		owns = 1
		(&collector{a}).Collect(out)
	}
	out <- prometheus.MustNewConstMetric(ownsNode, prometheus.GaugeValue, owns)
}

// ready says what an agent waits for; nil: nothing.
func (a *agent) ready() error {
	if a == nil {
		return errors.New("waiting for the node, which another agent has")
	}
	for what, known := range map[string]<-chan struct{}{"the container runtime's pods (NRI)": a.table.Synced(), "the controller's index": a.started} {
		select {
		case <-known:
		default:
			return fmt.Errorf("waiting for %s", what)
		}
	}
	return a.settled()
}

// serveHTTP serves /metrics, /healthz and /readyz until ctx ends.
func serveHTTP(ctx context.Context, c Config, cancel context.CancelCauseFunc) *health {
	h := &health{}
	registry := prometheus.NewRegistry()
	registry.MustRegister(h)
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		a := h.owner.Load()
		if err := a.ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
		if err := a.kernel.ProbesRefused(); err != nil { // the node serves all the same
			fmt.Fprintln(w, "kubelet's probes do not pass Strict pods:", err)
		}
	})
	s := &http.Server{Addr: c.Metrics, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { _ = s.Close() })
	go func() {
		if err := s.ListenAndServe(); err != nil && ctx.Err() == nil {
			cancel(fmt.Errorf("serve metrics on %s: %w", c.Metrics, err))
		}
	}()
	return h
}
