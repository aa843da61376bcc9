package reports

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// agent is the stream of one node's agent: what it says, then the end.
type agent struct {
	grpc.ServerStream
	node string
	says []*meshv1.NodeReport
}

type nodeKey struct{}

func (a *agent) Context() context.Context {
	return context.WithValue(context.Background(), nodeKey{}, a.node)
}
func (a *agent) Send(*meshv1.ReportAck) error { return nil }
func (a *agent) Recv() (*meshv1.NodeReport, error) {
	if len(a.says) == 0 {
		return nil, io.EOF
	}
	r := a.says[0]
	a.says = a.says[1:]
	return r, nil
}

func store() *Store {
	return New(Config{Log: slog.New(slog.DiscardHandler), Changed: func() {}, Peer: func(ctx context.Context) (string, error) {
		if node := ctx.Value(nodeKey{}).(string); node != "" {
			return node, nil
		}
		return "", errors.New("no agent of ours")
	}})
}

func hello(node, boot string) *meshv1.NodeReport {
	return &meshv1.NodeReport{Kind: &meshv1.NodeReport_Hello{Hello: &meshv1.Hello{Node: node, BootId: boot}}}
}

func pod(uid string, s meshv1.PodState) *meshv1.NodeReport {
	return &meshv1.NodeReport{Kind: &meshv1.NodeReport_Pod{Pod: &meshv1.PodReport{Uid: uid, State: s}}}
}

var synced = &meshv1.NodeReport{Kind: &meshv1.NodeReport_Synced{Synced: &meshv1.Synced{}}}

const (
	captured = meshv1.PodState_POD_STATE_CAPTURED
	enforced = meshv1.PodState_POD_STATE_ENFORCED
	gone     = meshv1.PodState_POD_STATE_GONE
)

// of is what a pod's own node says of it.
func of(s *Store, node, uid string) meshv1.PodState {
	reports, _ := s.View()
	return reports.Of(&ir.Pod{UID: uid, Node: node}).GetState()
}

func TestReports(t *testing.T) {
	s := store()
	report := func(node string, says ...*meshv1.NodeReport) error { return s.Report(&agent{node: node, says: says}) }
	// step looks at pod u of n1 after a report.
	step := func(name string, code codes.Code, isSynced bool, want meshv1.PodState, err error) {
		t.Helper()
		_, nodes := s.View()
		if status.Code(err) != code || nodes["n1"] != isSynced || of(s, "n1", "u") != want {
			t.Errorf("%s: error %v, synced %v, pod %s; want %s, %v, %s", name, err, nodes["n1"], of(s, "n1", "u"), code, isSynced, want)
		}
	}
	step("a caller that is no agent is refused", codes.PermissionDenied, false, 0, report("", hello("n1", "b1"), pod("u", enforced), synced))
	step("an agent speaks for no other node", codes.PermissionDenied, false, 0, report("n2", hello("n1", "b1"), pod("u", enforced), synced))
	step("Hello comes first", codes.FailedPrecondition, false, 0, report("n1", pod("u", enforced)))
	step("half a report is none", codes.OK, false, 0, report("n1", hello("n1", "b1"), pod("u", captured)))
	step("a whole one counts", codes.OK, true, captured, report("n1", hello("n1", "b1"), pod("u", captured), synced))
	step("the next stream's first half changes nothing", codes.OK, true, captured, report("n1", hello("n1", "b1"), pod("u", gone)))
	step("but for what enforces", codes.OK, true, enforced, report("n1", hello("n1", "b1"), pod("u", enforced)))
	step("changes come after it", codes.OK, true, enforced, report("n1", hello("n1", "b1"), pod("u", captured), synced, pod("u", enforced)))
	step("another node's word changes nothing", codes.OK, true, enforced, report("n2", hello("n2", "b1"), pod("u", gone), synced, pod("u", captured), pod("u", gone)))
	step("a pod that is gone is forgotten", codes.OK, true, 0, report("n1", hello("n1", "b1"), pod("u", captured), synced, pod("u", gone)))
	step("it comes back", codes.OK, true, captured, report("n1", hello("n1", "b1"), pod("u", captured), synced))
	step("a boot voids what was", codes.OK, false, 0, report("n1", hello("n1", "b2")))
}

func TestAnOlderStreamIsNotListenedTo(t *testing.T) {
	s := store()
	older := s.Open("n1")
	if err := older.Take(hello("n1", "b")); err != nil {
		t.Fatal(err)
	}
	if err := s.Report(&agent{node: "n1", says: []*meshv1.NodeReport{hello("n1", "b"), pod("u", captured), synced}}); err != nil {
		t.Fatal(err)
	}
	if err := older.Take(pod("u", gone)); status.Code(err) != codes.Aborted || of(s, "n1", "u") != captured {
		t.Errorf("the older stream: %v, pod %s", err, of(s, "n1", "u"))
	}
}

// TestTheStreamThatWasOpenedLastCounts, whichever replica passes on what when.
func TestTheStreamThatWasOpenedLastCounts(t *testing.T) {
	s := store()
	opened := func(at uint64) *meshv1.NodeReport {
		return &meshv1.NodeReport{Kind: &meshv1.NodeReport_Hello{Hello: &meshv1.Hello{Node: "n1", BootId: "b", Opened: at}}}
	}
	newer, older := s.Open("n1"), s.Open("n1")
	for _, r := range []*meshv1.NodeReport{opened(7), pod("u", captured), synced} {
		if err := newer.Take(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := older.Take(opened(6)); status.Code(err) != codes.Aborted {
		t.Errorf("an older stream, passed on late: %v", err)
	}
	if err := older.Take(pod("u", gone)); err == nil || of(s, "n1", "u") != captured {
		t.Errorf("what it says: %v, pod %s", err, of(s, "n1", "u"))
	}
	if err := newer.Take(pod("u", enforced)); err != nil || of(s, "n1", "u") != enforced {
		t.Errorf("the newer one goes on: %v, pod %s", err, of(s, "n1", "u"))
	}
	s.Begin()
	if of(s, "n1", "u") != 0 {
		t.Error("a leader begins with what another replica passed on to the one before")
	}
}

func TestWhatWasHandedOutDoesNotChange(t *testing.T) {
	s := store()
	says := []*meshv1.NodeReport{hello("n1", "b"), pod("u", captured), synced}
	if err := s.Report(&agent{node: "n1", says: says}); err != nil {
		t.Fatal(err)
	}
	view, _ := s.View()
	if err := s.take("n1", s.nodes["n1"].stream, pod("u", gone)); err != nil {
		t.Fatal(err)
	}
	if view["n1"]["u"].GetState() != captured {
		t.Error("a report changed under the hands of its reader")
	}
}

func TestANodeIsBounded(t *testing.T) {
	t.Run("pods", func(t *testing.T) {
		for _, first := range []bool{true, false} {
			says := []*meshv1.NodeReport{hello("n1", "b")}
			if !first {
				says = append(says, synced)
			}
			for i := range maxPods + 1 {
				says = append(says, pod(fmt.Sprint(i), captured))
			}
			if err := store().Report(&agent{node: "n1", says: says}); status.Code(err) != codes.ResourceExhausted {
				t.Errorf("more than %d pods, before Synced %v: %v", maxPods, first, err)
			}
		}
	})
	t.Run("text", func(t *testing.T) {
		long := strings.Repeat("ä", maxText)
		r := pod("u", captured)
		p := r.GetPod()
		p.Reason, p.Message, p.Refused, p.InboundPolicy, p.SettledPolicy, p.Sandbox = long, long, long, long, long, long
		for range maxProblems + 1 {
			p.PolicyProblems = append(p.PolicyProblems, long)
		}
		s := store()
		if err := s.Report(&agent{node: "n1", says: []*meshv1.NodeReport{hello("n1", "b"), r, synced}}); err != nil {
			t.Fatal(err)
		}
		reports, _ := s.View()
		got := reports["n1"]["u"]
		for _, text := range append([]string{got.Message, got.Refused}, got.PolicyProblems...) {
			if len(text) == 0 || len(text) > maxText || !utf8.ValidString(text) {
				t.Errorf("a text of %d bytes, valid %v", len(text), utf8.ValidString(text))
			}
		}
		for _, name := range []string{got.Reason, got.InboundPolicy, got.SettledPolicy, got.Sandbox} {
			if len(name) == 0 || len(name) > maxName {
				t.Errorf("a name of %d bytes", len(name))
			}
		}
		if len(got.PolicyProblems) != maxProblems {
			t.Errorf("%d problems", len(got.PolicyProblems))
		}
	})
}

// TestBoundedReportKeepsEveryField that there is.
func TestBoundedReportKeepsEveryField(t *testing.T) {
	p := &meshv1.PodReport{PolicyProblems: []string{"x"}, Took: durationpb.New(time.Second)}
	r := p.ProtoReflect()
	for i := range r.Descriptor().Fields().Len() {
		f := r.Descriptor().Fields().Get(i)
		switch {
		case f.IsList() || f.Message() != nil:
		case f.Kind() == protoreflect.StringKind:
			r.Set(f, protoreflect.ValueOfString("x"))
		case f.Kind() == protoreflect.BoolKind:
			r.Set(f, protoreflect.ValueOfBool(true))
		case f.Kind() == protoreflect.EnumKind:
			r.Set(f, protoreflect.ValueOfEnum(1))
		case f.Kind() == protoreflect.Uint32Kind:
			r.Set(f, protoreflect.ValueOfUint32(1))
		case f.Kind() == protoreflect.Uint64Kind:
			r.Set(f, protoreflect.ValueOfUint64(1))
		}
		if !r.Has(f) {
			t.Errorf("the test sets no %s", f.Name())
		}
	}
	if got := bounded(p); !proto.Equal(got, p) {
		t.Errorf("%v is kept as %v", p, got)
	}
}
