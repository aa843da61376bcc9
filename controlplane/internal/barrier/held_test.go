package barrier

import (
	"testing"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

const (
	out       = meshv1.PodState_POD_STATE_OUT
	preparing = meshv1.PodState_POD_STATE_PREPARING
	permits   = meshv1.PodState_POD_STATE_CAPTURED
	enforces  = meshv1.PodState_POD_STATE_ENFORCED
	failed    = meshv1.PodState_POD_STATE_FAILED
)

// happening is what happens, and what the controller makes of it.
type happening struct {
	name string
	do   func(*world)
	want resolve.Decision
}

func held(s meshv1.PodState) func(*world)      { return func(w *world) { w.holds("s1", s) } }
func heldAgain(s meshv1.PodState) func(*world) { return func(w *world) { w.holds("s2", s) } }
func runs(s meshv1.PodState) func(*world)      { return func(w *world) { w.says(s) } }
func answer(w *world)                          { w.answered = w.generation }
func join(w *world)                            { w.goal = ir.Enforced }
func leave(w *world)                           { w.goal = ir.Out }

func start(seed resolve.Decision) func(*world) {
	return func(w *world) {
		w.barrier, w.fresh = New(map[string]resolve.Decision{uid: seed}), true
		if seed == (resolve.Decision{}) {
			w.barrier = New(nil)
		}
	}
}

var (
	closed   = resolve.Decision{Stage: ir.Captured, Lost: true}
	tells    = resolve.Decision{Stage: ir.Captured, MTLS: true, Policy: "p"}
	standing = resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p", Moved: "p"}
	eases    = resolve.Decision{Stage: ir.Captured, MTLS: true, Policy: "p", Moved: "p"}
	plain    = resolve.Decision{Stage: ir.Captured}
)

// leaves is the rest of a withdrawal, and an enrolment of the same pod, which runs by then.
var leaves = []happening{
	{"Permissive: peers are told", runs(permits), plain},
	{"all have answered: out", answer, resolve.Decision{}},
	{"gone from the kernel", runs(out), resolve.Decision{}},
	{"it is to be in again", join, plain},
	{"it prepares as it runs: plaintext goes on", runs(preparing), plain},
	{"its node has answered", answer, plain},
	{"captured: peers are told", runs(permits), resolve.Decision{Stage: ir.Captured, MTLS: true}},
	{"all have answered", answer, resolve.Decision{Stage: ir.Enforced, MTLS: true}},
}

// TestHeldPods: a pod that is closed while it is new enforces without having been told to. Strict, it is spoken plaintext to at no
// time, and it leaves like any other.
func TestHeldPods(t *testing.T) {
	for name, happenings := range map[string][]happening{
		"it enforces": {
			{"it prepares: closed", held(preparing), closed},
			{"it enforces: peers are told", held(enforces), tells},
			{"all have answered", answer, standing},
		},
		"its node has not found this controller yet": {
			{"it may enforce already: closed", func(w *world) { w.silent = true; w.goal = ir.Enforced; start(resolve.Decision{})(w) }, closed},
			{"it does: peers are told", func(w *world) { w.silent = false; w.holds("s1", enforces) }, resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p"}},
			{"all have answered", answer, standing},
		},
		"its node has not found this controller yet, and it runs": {
			{"it may enforce already: closed", func(w *world) { w.silent = true; w.goal = ir.Enforced; start(resolve.Decision{})(w) }, closed},
			{"it does not: plaintext goes on", func(w *world) { w.silent = false; w.says(preparing) }, plain},
		},
		"it is to leave before it enforces": append([]happening{
			{"it prepares", held(preparing), closed},
			{"it is to leave: peers are told", leave, plain},
			{"all have answered: forgotten", answer, resolve.Decision{}},
			{"its node had not heard: no peer is told, Permissive first", held(enforces), resolve.Decision{Stage: ir.Captured, Policy: "p"}},
			{"all have answered that: it still enforces", answer, resolve.Decision{Stage: ir.Captured, Policy: "p"}},
			{"Permissive: out", held(permits), resolve.Decision{}},
		}, leaves[2:]...),
		"it is to leave and enforces before all have answered": {
			{"it prepares", held(preparing), closed},
			{"it is to leave", leave, plain},
			{"its node had not heard", held(enforces), resolve.Decision{Stage: ir.Captured, Policy: "p"}},
			{"all have answered: it still enforces", answer, resolve.Decision{Stage: ir.Captured, Policy: "p"}},
			{"it is to be in again", join, tells},
			{"all have answered", answer, standing},
		},
		"it is to leave for a moment": {
			{"it prepares", held(preparing), closed},
			{"it is to leave", leave, plain},
			{"it is to be in again: closed", join, closed},
			{"it enforces", held(enforces), tells},
			{"all have answered", answer, standing},
		},
		"it is to leave before callers know": append([]happening{
			{"it prepares", held(preparing), closed},
			{"it enforces", held(enforces), tells},
			{"it is to leave: peers stay while it enforces", leave, tells},
		}, leaves...),
		"it is to leave": append([]happening{
			{"it prepares", held(preparing), closed},
			{"it enforces", held(enforces), tells},
			{"all have answered", answer, standing},
			{"it is to leave: Permissive first", leave, eases},
		}, leaves...),
		"it is not to leave after all": {
			{"it enforces", held(enforces), resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p"}},
			{"all have answered", answer, standing},
			{"it is to leave", leave, eases},
			{"it is to be in", join, standing},
		},
		"it fails": {
			{"it prepares", held(preparing), closed},
			{"it fails: closed", held(failed), closed},
			{"the attempt is undone: closed", held(out), closed},
			{"it tries again", held(preparing), closed},
			{"it enforces", held(enforces), tells},
			{"all have answered", answer, standing},
		},
		"it fails before anything was heard of it": {
			{"it fails: closed", held(failed), closed},
			{"it is to leave", leave, plain},
			{"it is to be in again: closed", join, closed},
			{"it enforces", held(enforces), tells},
		},
		"it fails after it enforced": {
			{"it prepares", held(preparing), closed},
			{"it enforces", held(enforces), tells},
			{"it fails: closed", held(failed), closed},
			{"it enforces again", held(enforces), tells},
			{"all have answered", answer, standing},
		},
		"a controller starts while it is held": {
			{"it prepares", held(preparing), closed},
			{"another controller", start(resolve.Decision{}), closed},
			{"it fails", held(failed), closed},
			{"another controller", start(resolve.Decision{}), closed},
			{"it enforces", held(enforces), tells},
		},
		"a controller starts that knows an earlier sandbox": {
			{"it prepares", held(preparing), closed},
			{"another controller: what peers were told stands", start(standing), standing},
			{"it fails: closed", held(failed), closed},
			{"it enforces", held(enforces), tells},
		},
		"a controller starts while it enforces": {
			{"it prepares", held(preparing), closed},
			{"it enforces", held(enforces), tells},
			{"one that does not know it", start(resolve.Decision{}), resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p"}},
			{"one that knows that it was captured", start(plain), resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p"}},
			{"one that knows all", start(standing), standing},
		},
		"a controller that does not know it starts to withdraw it": append([]happening{
			{"it enforces", held(enforces), resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p"}},
			{"another controller: nodes may have been told of mTLS", func(w *world) { start(resolve.Decision{})(w); leave(w) }, resolve.Decision{Stage: ir.Captured, Policy: "p"}},
		}, leaves...),
		"a controller that knows it starts to withdraw it": append([]happening{
			{"it enforces", held(enforces), resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p"}},
			{"another controller: Permissive first", func(w *world) { start(standing)(w); leave(w) }, eases},
		}, leaves...),
		"a new sandbox": {
			{"it prepares", held(preparing), closed},
			{"it enforces", held(enforces), tells},
			{"all have answered", answer, standing},
			{"the next prepares: closed", heldAgain(preparing), closed},
			{"it enforces", heldAgain(enforces), tells},
			{"all have answered", answer, standing},
		},
		"a new sandbox that is heard of when it enforces": {
			{"it prepares", held(preparing), closed},
			{"it enforces", held(enforces), tells},
			{"so does the next", heldAgain(enforces), tells},
			{"all have answered", answer, standing},
		},
		"a new sandbox of a pod that is to leave": append([]happening{
			{"it prepares", held(preparing), closed},
			{"it enforces", held(enforces), tells},
			{"it is to leave", leave, tells},
			{"the next prepares: peers are told", heldAgain(preparing), plain},
		}, leaves[1:]...),
	} {
		t.Run(name, func(t *testing.T) {
			w := &world{barrier: New(nil), goal: ir.Enforced}
			for _, h := range happenings {
				h.do(w)
				if got := w.step(); got != h.want {
					t.Fatalf("%s: %+v, want %+v", h.name, got, h.want)
				}
			}
		})
	}
}
