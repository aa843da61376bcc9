package enrol

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/nodeproxy/internal/svid"
)

// mostForms bounds the policies whose chains stand side by side in a pod's listener, each as dear as the pod's own: when
// policies change faster than callers move, the oldest connections are cut.
const mostForms = 4

// form is a policy as a pod's listeners are made of it.
type form struct {
	stage meshv1.Stage
	// hash names the policy. "" under STAGE_CAPTURED, and of the form that refuses everything.
	hash string
	lds.Form
}

// inbound is what a pod's Envoy lets in, and what it still has of what it let in before.
type inbound struct {
	// forms, oldest first. The last judges new connections; the chains of the others serve until callers have moved.
	forms []form
	// given are the listeners made of them.
	given []*listener.Listener
	// drained is when Envoy has cut the connections of the chains that went last.
	drained time.Time
	// settled is the policy that alone is in force.
	settled string
	refused *refused
	// behind: an Envoy of another generation has not taken the listeners yet.
	behind bool
}

// refused is a policy that Envoy did not take, and what it said.
type refused struct{ hash, text string }

// current is the form that judges new connections.
func (i inbound) current() form {
	if len(i.forms) == 0 {
		return form{}
	}
	return i.forms[len(i.forms)-1]
}

// wished is the form that the controller wants; policy nil: captured, Permissive and without rules.
func wished(s *state, wish *meshv1.LocalPod, policy *meshv1.InboundPolicy) form {
	f := form{stage: meshv1.Stage_STAGE_CAPTURED, Form: lds.Form{Policy: policy, MaxConnection: maxConnection(s.svid, s.inbound.current().MaxConnection)}}
	if policy != nil {
		f.stage, f.hash = meshv1.Stage_STAGE_ENFORCED, wish.InboundPolicy
	}
	for _, p := range wish.ServerFirstPorts {
		f.ServerFirst = append(f.ServerFirst, uint16(p))
	}
	return f
}

// same tells whether listeners need no change from one form to another.
func (f form) same(other form) bool {
	return f.stage == other.stage && f.hash == other.hash && slices.Equal(f.ServerFirst, other.ServerFirst)
}

// maxConnection bounds connections by the life of SVIDs. They are renewed at half of it, give or take a tenth of it: what
// a peer shows lives on for 45 % at least, and the bound's jitter fits in between. It is the same at each renewal, for a
// change replaces chains; so a last bound that is about right stays.
func maxConnection(id *svid.SVID, last time.Duration) time.Duration {
	if id == nil {
		return last
	}
	bound := (id.NotAfter.Sub(id.NotBefore) * 2 / 5).Truncate(time.Second)
	if last > 0 && (bound-last).Abs() <= last/20 {
		return last
	}
	return max(bound, time.Second)
}

// pod is what lds makes the listeners of, for some forms.
func (e *Enroller) pod(s *state, wish *meshv1.LocalPod, forms []form) lds.Pod {
	last := len(forms) - 1
	p := lds.Pod{
		UID: s.pod.UID, Namespace: wish.Namespace, SPIFFEID: wish.SpiffeId, Sandbox: s.pod.Sandbox, Generation: s.generation,
		NetnsPath: s.pod.NetnsPath, Stage: forms[last].stage, Form: forms[last].Form, AccessLog: e.config.AccessLog,
	}
	for _, f := range forms[:last] {
		kept := f.Form
		if f.stage == meshv1.Stage_STAGE_CAPTURED {
			kept.Policy = lds.Captured()
		}
		p.Previous = append(p.Previous, kept)
	}
	return p
}

// enforce brings the inbound side to a policy; nil: Permissive and without rules. It is the callee's half of a policy
// change (docs/LIFECYCLE.md): new connections meet the new policy once Envoy has acknowledged it, the report of which makes
// the controller move callers; when they have moved, the old chains go, and when Envoy has cut what was left, settle says so.
func (e *Enroller) enforce(ctx context.Context, s *state, wish *meshv1.LocalPod, policy *meshv1.InboundPolicy) error {
	next := wished(s, wish, policy)
	if !s.inbound.current().same(next) {
		err := e.change(ctx, s, wish, next)
		var no *relay.Refused
		if errors.As(err, &no) {
			s.inbound.refused = &refused{next.hash, no.Text}
			return errors.Join(err, e.deny(ctx, s, wish))
		}
		if err != nil {
			return err
		}
	}
	s.inbound.refused = nil
	if err := e.judge(s, wish); err != nil {
		return err
	}
	return e.retire(ctx, s, wish)
}

// judge tells the kernel the mode of the form that is in force.
func (e *Enroller) judge(s *state, wish *meshv1.LocalPod) error {
	current := s.inbound.current()
	if mode := modeOf(wish, current); s.stage != current.stage || !sameMode(s.mode, mode) {
		if err := e.config.Kernel.SetMode(s.pod.UID, mode); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
		s.stage, s.mode = current.stage, mode
	}
	return nil
}

// change makes a form judge new connections. What would be cut by that alone, and need not be, stays until callers have
// moved.
func (e *Enroller) change(ctx context.Context, s *state, wish *meshv1.LocalPod, next form) error {
	next.Revision = e.revision(s, wish, next)
	alone := []form{next}
	beside := append(slices.Clone(s.inbound.forms[max(0, len(s.inbound.forms)-mostForms+1):]), next)
	only, err := lds.Listeners(e.pod(s, wish, alone))
	if err != nil {
		return &Refusal{"Invalid", err}
	}
	all, err := lds.Listeners(e.pod(s, wish, beside))
	if err != nil {
		return &Refusal{"Invalid", err}
	}
	if lds.Drops(all, only) {
		return e.listen(ctx, s, wish, beside)
	}
	return e.listen(ctx, s, wish, alone)
}

func (e *Enroller) revision(s *state, wish *meshv1.LocalPod, next form) map[uint16]uint32 {
	var before []lds.Pod
	for _, f := range s.inbound.forms {
		before = append(before, e.pod(s, wish, []form{f}))
	}
	return lds.Revise(before, e.pod(s, wish, []form{next}))
}

// deny refuses everybody after Envoy refused a policy, unless an earlier one is in force: that one stays.
func (e *Enroller) deny(ctx context.Context, s *state, wish *meshv1.LocalPod) error {
	if s.inbound.current().stage != meshv1.Stage_STAGE_ENFORCED {
		if err := e.nobody(ctx, s, wish); err != nil {
			return err
		}
	}
	return e.judge(s, wish)
}

// nobody lets nobody in.
func (e *Enroller) nobody(ctx context.Context, s *state, wish *meshv1.LocalPod) error {
	nobody := wished(s, wish, nil)
	if len(s.inbound.forms) > 0 {
		nobody.Form = s.inbound.current().Form
	}
	nobody.stage, nobody.Policy = meshv1.Stage_STAGE_ENFORCED, nil
	if err := e.listen(ctx, s, wish, []form{nobody}); err != nil {
		return fmt.Errorf("refuse everybody for want of a policy that Envoy takes: %w", err)
	}
	return nil
}

// retire takes the chains of earlier policies away once callers have moved to a later one.
func (e *Enroller) retire(ctx context.Context, s *state, wish *meshv1.LocalPod) error {
	forms := s.inbound.forms
	for at := len(forms) - 1; at > 0; at-- {
		if forms[at].hash != "" && forms[at].hash == wish.MovedPolicy {
			return e.listen(ctx, s, wish, forms[at:])
		}
	}
	return nil
}

// settle notes when a policy alone is in force; again: look after that time.
func (e *Enroller) settle(s *state) (again time.Duration) {
	in := &s.inbound
	current := in.current()
	alone := s.stage == meshv1.Stage_STAGE_ENFORCED && len(in.forms) == 1 && !in.behind
	if wait := in.drained.Sub(e.now()); alone && wait > 0 {
		alone, again = false, wait
	}
	settled := ""
	if alone {
		settled = current.hash
	}
	if in.settled != settled {
		in.settled = settled
		e.remember(s)
	}
	return again
}
