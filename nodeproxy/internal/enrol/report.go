package enrol

import (
	"strings"

	"google.golang.org/protobuf/types/known/durationpb"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
)

// report says what the kernel holds; left: the pod is out and nothing of it is left.
func (e *Enroller) report(s *state, wish *meshv1.LocalPod) (left bool) {
	r := &meshv1.PodReport{Uid: s.pod.UID, Sandbox: s.pod.Sandbox, StartedUnheld: s.pod.Unheld, PreexistingConnections: s.older, Reason: s.reason, Message: s.failure}
	e.reportPolicy(s, wish, r)
	if s.took > 0 {
		r.Took = durationpb.New(s.took)
	}
	now, err := e.config.Kernel.Verify(s.pod.UID)
	r.Shortcut, r.ShortcutRefused = now.Shortcut, s.noShortcut
	drift := now.Drift
	if err == nil && s.complete {
		drift = s.drift(now)
	}
	serves := err == nil && now.Captured() && len(drift) == 0
	switch {
	case err == nil && now.Inbound && !s.leaving.IsZero() && s.failure == "":
		r.State, r.NetnsCookie = meshv1.PodState_POD_STATE_CAPTURED, now.Pod.Cookie // inbound still
	case s.stage == meshv1.Stage_STAGE_OUT && wish.Stage == meshv1.Stage_STAGE_OUT && s.failure == "":
		r.State = meshv1.PodState_POD_STATE_OUT
		left = !s.prepared && s.leaving.IsZero()
	case serves && s.stage == meshv1.Stage_STAGE_ENFORCED:
		r.State, r.NetnsCookie = meshv1.PodState_POD_STATE_ENFORCED, now.Pod.Cookie
	case serves:
		r.State, r.NetnsCookie = meshv1.PodState_POD_STATE_CAPTURED, now.Pod.Cookie
	case s.failure != "":
		r.State = meshv1.PodState_POD_STATE_FAILED
	default:
		r.State = meshv1.PodState_POD_STATE_PREPARING
		if len(drift) > 0 {
			r.Reason, r.Message = names.ReasonDrift, strings.Join(drift, "; ")
		}
	}
	if serves && r.Reason == "" && e.unsure(s) > 0 {
		r.Reason, r.Message = names.ReasonDrift, "repaired, to be looked at once more: "+strings.Join(s.drifted, "; ")
	}
	r.ProxyGeneration = now.Generation
	e.config.Report(r)
	return left
}

// reportPolicy says which policy is in force, since when it alone is, and what of it is not as written.
func (e *Enroller) reportPolicy(s *state, wish *meshv1.LocalPod, r *meshv1.PodReport) {
	in := s.inbound
	if no := in.refused; no != nil && no.hash == wish.InboundPolicy {
		r.Refused = no.text
	}
	if s.stage != meshv1.Stage_STAGE_ENFORCED {
		return
	}
	current := in.current()
	r.InboundPolicy, r.SettledPolicy = current.hash, in.settled
	if current.hash == "" {
		return
	}
	for _, p := range lds.Problems(e.pod(s, wish, []form{current})) {
		r.PolicyProblems = append(r.PolicyProblems, p.Reason+": "+p.Message)
	}
}
