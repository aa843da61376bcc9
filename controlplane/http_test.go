package main

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/barrier"
	"github.com/weftmesh/weft/controlplane/internal/engine"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/serve"
)

func get(t *testing.T, s *httptest.Server, path string) (int, string) {
	t.Helper()
	r, err := s.Client().Get(s.URL + path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Body.Close() }()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(body)
}

func TestHealthAndReadiness(t *testing.T) {
	p := newProcess()
	s := httptest.NewServer(p.handler())
	defer s.Close()
	look := func(name, path string, code int, says string) {
		t.Helper()
		if got, body := get(t, s, path); got != code || !strings.Contains(body, says) {
			t.Errorf("%s: %s answers %d %s, want %d %s", name, path, got, body, code, says)
		}
	}
	look("a replica that starts", "/healthz", http.StatusOK, "ok")
	look("a replica that starts", "/readyz", http.StatusServiceUnavailable, "orders are still being read")
	busy := time.Duration(0)
	ready := false
	p.watch(func() time.Duration { return busy }, func() bool { return ready })
	look("a replica that serves nobody", "/readyz", http.StatusServiceUnavailable, "behind the leader")
	ready = true
	look("a replica that serves", "/healthz", http.StatusOK, "ok")
	look("a replica that serves", "/readyz", http.StatusOK, "ok")
	busy = stuck
	look("in a long turn", "/healthz", http.StatusOK, "ok")
	busy = stuck + time.Second
	look("stuck in a turn", "/healthz", http.StatusServiceUnavailable, "one turn for 31s")
	busy = 0
	look("after it", "/healthz", http.StatusOK, "ok")
}

func TestMetrics(t *testing.T) {
	p := newProcess()
	s := httptest.NewServer(p.handler())
	defer s.Close()
	p.metrics.leader.Set(1)
	p.metrics.converge.Observe(0.1)
	p.metrics.picture(engine.Picture{
		Snapshot: &ir.Snapshot{Pods: map[string]*ir.Pod{"u": {UID: "u", Node: "n1"}, "v": {UID: "v", Node: "n1"}}},
		Nodes:    serve.State{Nodes: []string{"n1", "n2", "n3"}, Behind: []string{"n2"}, Away: []string{"n4"}},
		Reports: barrier.Reports{
			"n1": {"u": {State: meshv1.PodState_POD_STATE_ENFORCED}},
			"n2": {"v": {State: meshv1.PodState_POD_STATE_ENFORCED}}, // not its pod
		},
	})
	answer := func(method string, err error) {
		_, _ = p.metrics.signs(context.Background(), nil, &grpc.UnaryServerInfo{FullMethod: method}, func(context.Context, any) (any, error) { return nil, err })
	}
	answer(meshv1.Identity_Sign_FullMethodName, nil)
	answer(meshv1.Identity_Sign_FullMethodName, status.Error(codes.FailedPrecondition, "no such pod"))
	answer(meshv1.Identity_Bootstrap_FullMethodName, nil)
	answer("/another/Call", nil)
	code, body := get(t, s, "/metrics")
	if code != http.StatusOK {
		t.Fatalf("%d %s", code, body)
	}
	for _, want := range []string{
		"weft_controlplane_leader 1", "weft_controlplane_nodes 3", "weft_controlplane_nodes_behind 1", "weft_controlplane_nodes_away 1", "weft_controlplane_pods 2",
		`weft_controlplane_pods_by_state{state="POD_STATE_ENFORCED"} 1`, "weft_controlplane_converge_seconds_count 1",
		`weft_controlplane_svids_total{code="OK"} 2`, `weft_controlplane_svids_total{code="FailedPrecondition"} 1`, "go_goroutines",
	} {
		if !strings.Contains(body, want+"\n") && !strings.Contains(body, want+" ") {
			t.Errorf("want %s in\n%s", want, body)
		}
	}
}

func TestMetricsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/METRICS.md")
	if err != nil {
		t.Fatal(err)
	}
	p := newProcess()
	none := func() int { return 0 }
	p.metrics.replica(p.registry, none, none, none, func() bool { return false })
	p.metrics.states.WithLabelValues("any")
	p.metrics.svids.WithLabelValues("OK")
	families, err := p.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if name := f.GetName(); strings.HasPrefix(name, "weft_") && !strings.Contains(string(page), "\n| `"+name) {
			t.Errorf("docs/METRICS.md has no %s", name)
		}
	}
}
