package main

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/engine"
)

// metrics are what an operator watches of the controller.
type metrics struct {
	leader, nodes, behind, away, refusals, services, pods, problems prometheus.Gauge
	states                                                          *prometheus.GaugeVec
	svids                                                           *prometheus.CounterVec
	resolve, converge                                               prometheus.Histogram
}

func newMetrics(r *prometheus.Registry) *metrics {
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "weft_controlplane_" + name, Help: help})
		r.MustRegister(g)
		return g
	}
	m := &metrics{
		leader:   gauge("leader", "1 while this replica leads."),
		nodes:    gauge("nodes", "Connected node agents of all replicas; this one and those below are the leader's."),
		behind:   gauge("nodes_behind", "Connected node agents that have not acknowledged the newest resources."),
		away:     gauge("nodes_away", "Node agents whose stream ended less than a minute ago."),
		refusals: gauge("refusals", "Resources that some node's Envoy refused."),
		services: gauge("services", "Services."),
		pods:     gauge("pods", "Pods that could be in the mesh."),
		problems: gauge("problems", "Conditions of objects that are not as asked for."),
		states:   prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "weft_controlplane_pods_by_state", Help: "Pods by what their node's kernel holds."}, []string{"state"}),
		svids:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "weft_controlplane_svids_total", Help: "SVIDs that agents asked for, by what they were answered; OK: issued."}, []string{"code"}),
		converge: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "weft_controlplane_converge_seconds", Help: "Time from a snapshot to the last node's answer to it.", Buckets: prometheus.ExponentialBuckets(0.005, 2, 14)}),
		resolve:  prometheus.NewHistogram(prometheus.HistogramOpts{Name: "weft_controlplane_resolve_seconds", Help: "Time to make a snapshot.", Buckets: prometheus.ExponentialBuckets(0.0005, 2, 12)}),
	}
	r.MustRegister(m.states, m.svids, m.resolve, m.converge, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) picture(all engine.Picture) {
	m.nodes.Set(float64(len(all.Nodes.Nodes)))
	m.behind.Set(float64(len(all.Nodes.Behind)))
	m.away.Set(float64(len(all.Nodes.Away)))
	m.refusals.Set(float64(len(all.Nodes.Refusals)))
	m.services.Set(float64(len(all.Snapshot.Services)))
	m.pods.Set(float64(len(all.Snapshot.Pods)))
	m.problems.Set(float64(len(all.Problems)))
	m.states.Reset()
	for _, p := range all.Snapshot.Pods {
		if r := all.Reports.Of(p); r != nil {
			m.states.WithLabelValues(r.State.String()).Inc()
		}
	}
}

// forget takes back what only a leader knows.
func (m *metrics) forget() {
	for _, g := range []prometheus.Gauge{m.nodes, m.behind, m.away, m.refusals, m.services, m.pods, m.problems} {
		g.Set(0)
	}
	m.states.Reset()
}

// replica tells of this replica what it knows itself.
func (m *metrics) replica(r *prometheus.Registry, roots, agents, followers func() int, follows func() bool) {
	value := func(name, help string, value func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "weft_controlplane_" + name, Help: help}, value))
	}
	value("roots", "Roots in the trust bundle: two while the root is changed.", func() float64 { return float64(roots()) })
	value("agents", "Node agents that this replica serves.", func() float64 { return float64(agents()) })
	value("followers", "Replicas that follow this one; 0 on those that do not lead.", func() float64 { return float64(followers()) })
	value("following", "1 while this replica serves the orders of a leader that is there.", func() float64 {
		if follows() {
			return 1
		}
		return 0
	})
}

// signs counts the SVIDs that are issued and refused.
func (m *metrics) signs(ctx context.Context, request any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	answer, err := next(ctx, request)
	if info.FullMethod == meshv1.Identity_Sign_FullMethodName || info.FullMethod == meshv1.Identity_Bootstrap_FullMethodName {
		m.svids.WithLabelValues(status.Code(err).String()).Inc()
	}
	return answer, err
}
