package report

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// leader takes reports.
type leader struct {
	meshv1.UnimplementedReportsServer
	got chan *meshv1.NodeReport
	cut chan struct{}
}

func (l *leader) Report(s meshv1.Reports_ReportServer) error {
	go func() {
		for {
			r, err := s.Recv()
			if err != nil {
				return
			}
			l.got <- r
		}
	}()
	select {
	case <-s.Context().Done():
		return nil
	case <-l.cut:
		return status.Error(codes.Unavailable, "not the leader any more")
	}
}

// next is the next report.
func (l *leader) next(t *testing.T) *meshv1.NodeReport {
	t.Helper()
	select {
	case r := <-l.got:
		return r
	case <-time.After(20 * time.Second):
		t.Fatal("no report within 20 s")
		return nil
	}
}

// pods takes reports of n pods, by uid.
func (l *leader) pods(t *testing.T, n int) map[string]meshv1.PodState {
	t.Helper()
	out := map[string]meshv1.PodState{}
	for range n {
		p := l.next(t).GetPod()
		if p == nil {
			t.Fatal("a report of something else came before the pods'")
		}
		out[p.Uid] = p.State
	}
	return out
}

func start(t *testing.T) (*leader, *Reporter) {
	t.Helper()
	l := &leader{got: make(chan *meshv1.NodeReport, 100), cut: make(chan struct{})}
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	meshv1.RegisterReportsServer(server, l)
	go server.Serve(listener) // ends with Stop
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:///leader", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	r := New(Config{Conn: func(context.Context) (grpc.ClientConnInterface, error) { return conn, nil }, Node: "n1", BootID: "boot", Version: "v",
		Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go r.Run(ctx)
	return l, r
}

func pod(uid string, s meshv1.PodState) *meshv1.PodReport {
	return &meshv1.PodReport{Uid: uid, State: s}
}

const (
	captured = meshv1.PodState_POD_STATE_CAPTURED
	enforced = meshv1.PodState_POD_STATE_ENFORCED
	gone     = meshv1.PodState_POD_STATE_GONE
)

func TestReports(t *testing.T) {
	l, r := start(t)
	if h := l.next(t).GetHello(); h.GetNode() != "n1" || h.GetBootId() != "boot" || h.GetVersion() != "v" {
		t.Errorf("the stream begins with %v", h)
	}
	r.Pod(pod("a", captured))
	l.pods(t, 1)
	r.Pod(pod("a", captured)) // the same: not sent
	r.Pod(pod("b", captured))
	if got := l.pods(t, 1); got["b"] != captured {
		t.Errorf("reported %v", got)
	}
	// A controller may conclude from silence only now.
	r.Ready()
	if l.next(t).GetSynced() == nil {
		t.Error("readiness was not reported")
	}
	r.Pod(pod("b", gone))
	r.Pod(pod("a", enforced))
	if got := l.pods(t, 2); got["a"] != enforced || got["b"] != gone {
		t.Errorf("reported %v", got)
	}

	// Another leader gets everything, and nothing of what is gone.
	l.cut <- struct{}{}
	if l.next(t).GetHello() == nil {
		t.Fatal("the second stream does not begin with a hello")
	}
	if got := l.pods(t, 1); len(got) != 1 || got["a"] != enforced {
		t.Errorf("reported %v", got)
	}
	if l.next(t).GetSynced() == nil {
		t.Error("readiness was not reported to the second leader")
	}
}

// TestHealth is said when it changes, and to every new leader: a Hello makes it forget.
func TestHealth(t *testing.T) {
	l, r := start(t)
	l.next(t) // hello
	trust := func(hash string) { r.Health(func(h *meshv1.NodeHealth) { h.TrustBundle = hash }) }
	expect := func(live bool, hash string) {
		t.Helper()
		if h := l.next(t).GetHealth(); h.GetProxyLive() != live || h.GetTrustBundle() != hash {
			t.Errorf("reported health %v, want live %t, bundle %q", h, live, hash)
		}
	}
	trust("one")
	expect(false, "one")
	trust("one") // the same: not sent
	r.Health(func(h *meshv1.NodeHealth) { h.ProxyLive = true })
	expect(true, "one")
	l.cut <- struct{}{}
	if l.next(t).GetHello() == nil {
		t.Fatal("the second stream does not begin with a hello")
	}
	expect(true, "one")
}
