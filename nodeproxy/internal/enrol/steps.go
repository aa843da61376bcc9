package enrol

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/pods"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/redirect"
)

// target is the stage that a pod is to be brought to now. One that is closed needs no stage between, for nobody speaks
// plaintext to it; and one that enforces goes on while it is to: a step back would open it.
func (s *state) target(wish *meshv1.LocalPod) meshv1.Stage {
	if wish.Goal == meshv1.Stage_STAGE_ENFORCED && (s.gated || s.strict || s.stage == meshv1.Stage_STAGE_ENFORCED) {
		return meshv1.Stage_STAGE_ENFORCED
	}
	return wish.Stage
}

// step moves a pod towards the stage that is wanted.
func (e *Enroller) step(ctx context.Context, s *state, wish *meshv1.LocalPod) error {
	target := s.target(wish)
	if target == meshv1.Stage_STAGE_OUT {
		return e.withdraw(ctx, s)
	}
	if err := e.capture(ctx, s, wish); err != nil {
		return err
	}
	if err := e.shortcut(s, wish); err != nil {
		return err
	}
	policy := (*meshv1.InboundPolicy)(nil)
	target = s.target(wish) // by now it may enforce, as the agent before this one left it
	if target != meshv1.Stage_STAGE_ENFORCED {
		s.moved = time.Time{}
	} else {
		if s.moved.IsZero() {
			s.moved = e.now()
		}
		if e.early(s) > 0 {
			return nil
		}
		if policy = e.config.Wishes.Policy(wish.InboundPolicy); policy == nil {
			if s.stage == meshv1.Stage_STAGE_ENFORCED {
				return e.retire(ctx, s, wish) // the next policy is on its way: the last one stays
			}
			return fmt.Errorf("policy %s has not come from the controller yet", wish.InboundPolicy)
		}
	}
	return e.enforce(ctx, s, wish, policy)
}

// early is how long a captured pod still waits for callers' workers before plaintext is refused.
func (e *Enroller) early(s *state) time.Duration {
	if s.stage != meshv1.Stage_STAGE_CAPTURED || s.moved.IsZero() {
		return 0
	}
	return s.moved.Add(e.config.Settle).Sub(e.now())
}

// capture makes a pod's listeners and hands its connections to them: Permissive and without rules, or a gated pod's by its
// policy.
func (e *Enroller) capture(ctx context.Context, s *state, wish *meshv1.LocalPod) error {
	generation, live := e.config.Generation()
	if s.complete && s.generation == generation {
		if s.inbound.behind {
			e.accompany(ctx, s, wish)
		}
		return e.repair(ctx, s, live)
	}
	s.complete = false
	now, known, err := e.look(s.pod.UID)
	if err != nil {
		return err
	}
	held := s.prepared || known && (!now.Gated || len(now.Listeners) > 0)
	if !held { // else it is Envoy that listens there, and that has connections
		if err := e.check(s.pod, wish, now.Gated); err != nil {
			return err
		}
		if s.older, err = e.count(s.pod.NetnsPath); err != nil {
			return refuse(err)
		}
	}
	if !live {
		return errors.New("no Envoy serves on this node yet")
	}
	if s.stage == meshv1.Stage_STAGE_OUT {
		e.config.Report(&meshv1.PodReport{Uid: s.pod.UID, Sandbox: s.pod.Sandbox, State: meshv1.PodState_POD_STATE_PREPARING, StartedUnheld: s.pod.Unheld})
	}
	adopted := now.Inbound && !now.Gated
	if err := e.identify(ctx, s, wish, adopted); err != nil {
		return err
	}
	if err := e.config.Kernel.Enrol(kernelPod(s.pod)); err != nil {
		return refuse(err)
	}
	if s.prepared = true; s.generation != generation {
		s.generation, s.inbound.given = generation, nil // the other's are not these
	}
	if held {
		e.recall(s, wish)
	}
	if err := e.open(ctx, s, wish, adopted); err != nil {
		return err
	}
	if err := e.config.Kernel.Flip(s.pod.UID, generation); err != nil {
		return fmt.Errorf("switch to Envoy generation %d: %w", generation, err)
	}
	e.goes(s.pod.UID, generation)
	current := s.inbound.current()
	mode := modeOf(wish, current)
	if err := e.config.Kernel.SetMode(s.pod.UID, mode); err != nil {
		return fmt.Errorf("set mode: %w", err)
	}
	if err := e.switchOn(s, adopted); err != nil {
		return err
	}
	s.stage, s.mode, s.leaving, s.left, s.complete, s.gated = current.stage, mode, time.Time{}, time.Time{}, true, false
	return nil
}

// shortcut switches the short circuit of a captured pod. A kernel that cannot have it is no failure: the pod says so.
func (e *Enroller) shortcut(s *state, wish *meshv1.LocalPod) error {
	err := e.config.Kernel.SetShortcut(s.pod.UID, wish.Shortcut)
	s.noShortcut = ""
	if errors.Is(err, redirect.ErrUnsupported) {
		s.noShortcut, err = err.Error(), nil
	}
	return err
}

// open gives Envoy the listeners of a pod that is to be captured. Those of a pod that is captured already come back as they
// were: what has changed since is put into force by the steps of a policy change.
func (e *Enroller) open(ctx context.Context, s *state, wish *meshv1.LocalPod, adopted bool) error {
	current := s.inbound.current()
	switch {
	case s.gated && s.target(wish) == meshv1.Stage_STAGE_ENFORCED:
		policy := e.config.Wishes.Policy(wish.InboundPolicy)
		if policy == nil {
			return fmt.Errorf("policy %s has not come from the controller yet", wish.InboundPolicy)
		}
		err := e.change(ctx, s, wish, wished(s, wish, policy))
		var no *relay.Refused
		if errors.As(err, &no) { // the pod starts, and nobody is let in
			return e.nobody(ctx, s, wish)
		}
		return err
	case current.stage == meshv1.Stage_STAGE_CAPTURED, adopted && current.stage == meshv1.Stage_STAGE_ENFORCED:
		return e.listen(ctx, s, wish, s.inbound.forms)
	case adopted && s.target(wish) == meshv1.Stage_STAGE_ENFORCED: // and nobody knows what Envoy has
		policy := e.config.Wishes.Policy(wish.InboundPolicy)
		if policy == nil {
			return fmt.Errorf("policy %s has not come from the controller yet", wish.InboundPolicy)
		}
		s.inbound.drained = e.now().Add(e.config.Drain)
		return e.change(ctx, s, wish, wished(s, wish, policy))
	}
	return e.change(ctx, s, wish, wished(s, wish, nil))
}

// identify makes sure of the pod's SVID. A pod that is captured does not wait for it: the controller may be away.
func (e *Enroller) identify(ctx context.Context, s *state, wish *meshv1.LocalPod, adopted bool) error {
	if adopted {
		limited, cancel := context.WithTimeout(ctx, adoptLimit)
		defer cancel()
		ctx = limited
	}
	id, err := e.config.Identities.Use(ctx, s.account, s.pod.UID)
	switch {
	case err != nil && adopted:
		e.config.Log.Warn("no SVID yet, Envoy goes on with the one it has", "pod", s.pod.UID, "error", err)
		return nil
	case err != nil:
		return err
	case id.ID != wish.SpiffeId:
		return fmt.Errorf("the SVID is for %s, the pod is %s", id.ID, wish.SpiffeId)
	}
	s.svid = id
	return nil
}

// switchOn captures inbound connections, then outbound ones. What is captured already stays so.
func (e *Enroller) switchOn(s *state, adopted bool) error {
	if !adopted {
		if err := e.config.Kernel.Capture(s.pod.UID, true, false); err != nil {
			return fmt.Errorf("capture inbound connections: %w", err)
		}
	}
	if err := e.config.Kernel.Capture(s.pod.UID, true, true); err != nil {
		return fmt.Errorf("capture outbound connections: %w", err)
	}
	return nil
}

func kernelPod(p pods.Pod) redirect.Pod {
	return redirect.Pod{UID: p.UID, Sandbox: p.Sandbox, NetnsPath: p.NetnsPath, Addresses: p.Addresses}
}

func modeOf(wish *meshv1.LocalPod, f form) redirect.Mode {
	m := redirect.Mode{Strict: wish.Strict && f.stage == meshv1.Stage_STAGE_ENFORCED, ServerFirst: f.ServerFirst}
	for _, p := range wish.ProbePorts {
		m.Probes = append(m.Probes, uint16(p))
	}
	return m
}

func sameMode(a, b redirect.Mode) bool {
	return a.Strict == b.Strict && slices.Equal(a.ServerFirst, b.ServerFirst) && slices.Equal(a.Probes, b.Probes)
}

// withdraw ends capture, and takes the listeners away when nothing uses them any more.
func (e *Enroller) withdraw(ctx context.Context, s *state) error {
	if s.leaving.IsZero() {
		now, err := e.config.Kernel.Verify(s.pod.UID)
		switch {
		case !s.prepared && errors.Is(err, redirect.ErrUnknownPod):
			return nil
		case err == nil && now.Gated:
			return e.end(s) // nothing has begun yet
		case err == nil && !now.Inbound: // an agent before this one has ended it already
			s.left = time.Now()
		case ignoreUnknown(err) != nil:
			return fmt.Errorf("end capture: %w", err)
		default:
			if err := e.uncapture(s, true); err != nil {
				return err
			}
		}
		s.leaving, s.stage, s.complete = time.Now(), meshv1.Stage_STAGE_OUT, false
	}
	if s.left.IsZero() {
		if time.Since(s.leaving) < e.config.Settle {
			return nil
		}
		if err := e.uncapture(s, false); err != nil {
			return err
		}
		s.left = time.Now()
	}
	if time.Since(s.left) < e.config.Settle {
		return nil
	}
	if now, err := e.config.Kernel.Verify(s.pod.UID); err == nil && now.Outgoing+now.Incoming > 0 && time.Since(s.left) < e.config.Linger {
		return nil
	}
	return e.end(s)
}

// uncapture ends the capture of outbound connections, and of inbound ones unless they stay.
func (e *Enroller) uncapture(s *state, inboundStays bool) error {
	if err := ignoreUnknown(e.config.Kernel.Capture(s.pod.UID, inboundStays, false)); err != nil {
		return fmt.Errorf("end capture: %w", err)
	}
	return nil
}

// end removes everything of a pod.
func (e *Enroller) end(s *state) error {
	for _, direction := range []string{"out", "in", "in-first"} {
		for _, name := range e.config.Envoy.Names(relay.TypeListener, direction+"/"+s.pod.UID+"/"+short(s.pod.Sandbox)) {
			e.config.Envoy.Delete(relay.Key{TypeURL: relay.TypeListener, Name: name})
		}
	}
	e.config.Envoy.Complete(s.pod.UID)
	e.dropRules(s.pod.UID, nil)
	if err := ignoreUnknown(e.config.Kernel.Withdraw(s.pod.UID)); err != nil {
		return fmt.Errorf("withdraw: %w", err)
	}
	e.config.Identities.Leave(s.account, s.pod.UID)
	e.forget(s.pod.UID)
	e.gone(s.pod.UID)
	s.older = 0
	s.prepared, s.complete, s.stage, s.inbound, s.leaving, s.left, s.moved = false, false, meshv1.Stage_STAGE_OUT, inbound{}, time.Time{}, time.Time{}, time.Time{}
	return nil
}

func short(sandbox string) string { return sandbox[:min(len(sandbox), 12)] }

// undo leaves nothing of a refused pod; one whose containers wait is closed again.
func (e *Enroller) undo(s *state) {
	if err := e.end(s); err != nil {
		e.config.Log.Warn("undo enrolment", "pod", s.pod.UID, "error", err)
	}
	if e.heldBack(s.pod) {
		e.gate(s.pod)
	}
}
