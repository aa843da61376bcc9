// Package barrier owns the order of enrolment and withdrawal across the mesh (docs/LIFECYCLE.md): what every node's
// agent is to do with a pod now, and whether peers speak mTLS to it. A step is taken only when the kernel of the pod's
// node holds what the step before asked for, and every connected node has acknowledged it.
package barrier

import (
	"maps"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

// Reports is what each node last said of pods, by node and pod uid. Maps are not changed once they are here.
type Reports map[string]map[string]*meshv1.PodReport

// Of returns what the pod's own node says of it, nil while it says nothing. No other node has a say.
func (r Reports) Of(p *ir.Pod) *meshv1.PodReport { return r[p.Node][p.UID] }

// View is what a step is decided from.
type View struct {
	// Pods by uid, with their goals.
	Pods    map[string]*ir.Pod
	Reports Reports
	// Synced nodes have reported all of their pods; what another node's pods were stays as it was.
	Synced map[string]bool
	// Answered is the newest generation that every node has answered with all before it.
	Answered uint64
	// Nodes that are connected, with the newest generation that each has answered.
	Nodes map[string]uint64
}

// Barrier remembers how far each pod has come. Not safe for concurrent use.
type Barrier struct {
	pods map[string]*pod
}

type pod struct {
	resolve.Decision
	// published is the generation with which MTLS as it is now reached the nodes, policyPublished the one with which Policy
	// became the generation of the pod's endpoints; 0: it is in none yet.
	published, policyPublished uint64
	// stagePublished is that of the order into capture.
	stagePublished uint64
	heard          bool // its node has spoken of it
	enforced       bool // has been enforced in this sandbox
	seeded         bool // by the controller before this one
	sandbox        string
}

// New makes a Barrier; seed holds the decisions of a controller before this one, as the pods' conditions tell. They hold
// until the pods' nodes report.
func New(seed map[string]resolve.Decision) *Barrier {
	b := &Barrier{pods: map[string]*pod{}}
	for uid, d := range seed {
		b.pods[uid] = &pod{Decision: d, enforced: d.Stage == ir.Enforced, seeded: true}
	}
	return b
}

// Decisions are what the next snapshot is to be made with.
func (b *Barrier) Decisions() map[string]resolve.Decision {
	out := make(map[string]resolve.Decision, len(b.pods))
	for uid, p := range b.pods {
		out[uid] = p.Decision
	}
	return out
}

// Published tells that a generation was made of the current decisions.
func (b *Barrier) Published(generation uint64) {
	for _, p := range b.pods {
		if p.published == 0 {
			p.published = generation
		}
		if p.policyPublished == 0 {
			p.policyPublished = generation
		}
		if p.stagePublished == 0 {
			p.stagePublished = generation
		}
	}
}

// Step moves every pod as far as it may go now; true: a generation is to be made of the decisions.
func (b *Barrier) Step(v View) bool {
	before, stale := b.Decisions(), false
	for uid := range b.pods {
		if v.Pods[uid] == nil {
			delete(b.pods, uid)
		}
	}
	for uid, target := range v.Pods {
		p := b.pods[uid]
		report := v.Reports.Of(target)
		switch {
		case p == nil && target.Goal == ir.Out && !captured(report):
			continue // never in, not to be in
		case p == nil:
			p = &pod{}
			p.Lost = report == nil && !v.Synced[target.Node] && target.Goal != ir.Out // its node may have it enforce without a word yet
			if captured(report) {                                                     // by an order that is not known here, or by its node alone: it leaves as any other does
				p.Stage = ir.Captured
			}
			b.pods[uid] = p
		}
		if report != nil {
			p.follow(report, target.Goal)
		} else if v.Synced[target.Node] {
			p.lose()
		}
		p.step(target.Goal, report, v.Answered, v.Nodes[target.Node])
		if target.Goal == ir.Out && p.Stage == ir.Out && !p.MTLS && !captured(report) {
			delete(b.pods, uid)
			continue
		}
		stale = stale || p.published == 0 || p.policyPublished == 0 // even if it is again what it was
	}
	return stale || !maps.Equal(before, b.Decisions())
}

func captured(r *meshv1.PodReport) bool {
	return r.GetState() == meshv1.PodState_POD_STATE_CAPTURED || r.GetState() == meshv1.PodState_POD_STATE_ENFORCED
}

// follow takes over what the kernel holds: after a restart of the controller, a reboot, a new sandbox.
func (p *pod) follow(r *meshv1.PodReport, goal ir.Stage) {
	if !p.heard && !p.seeded {
		p.Lost = false // now there is a word of it
	}
	if p.sandbox != "" && r.Sandbox != "" && p.sandbox != r.Sandbox {
		p.lose()
	}
	if r.Sandbox != "" {
		p.sandbox = r.Sandbox
	}
	switch r.State {
	case meshv1.PodState_POD_STATE_ENFORCED:
		p.enforced, p.Lost = true, false
		// The controller before this one had brought it this far, and a step back would open it; or its node did so while nobody
		// could speak to it. If it is to leave all the same, nobody has been told of it.
		if !p.heard && (p.seeded || goal != ir.Out) {
			p.Stage = ir.Enforced
			p.setMTLS(true)
		}
		p.setPolicy(r.InboundPolicy)
	case meshv1.PodState_POD_STATE_CAPTURED:
		p.Lost = false
		p.setPolicy("") // connections made from now on are under none
	case meshv1.PodState_POD_STATE_OUT, meshv1.PodState_POD_STATE_FAILED, meshv1.PodState_POD_STATE_GONE:
		if p.MTLS {
			p.lose()
		}
	}
	if (r.State == meshv1.PodState_POD_STATE_PREPARING || r.State == meshv1.PodState_POD_STATE_FAILED) && !r.StartedUnheld && !p.MTLS {
		p.Lost = true // a pod that is held will enforce at once: no plaintext to it meanwhile if it is Strict
	}
	if captured(r) {
		p.Proxy = r.ProxyGeneration
	}
	p.heard = true
}

// lose voids what was: peers no longer speak mTLS to the pod, and plaintext not either if it is Strict.
func (p *pod) lose() {
	p.Lost = p.Lost || p.enforced
	p.setMTLS(false)
	p.setPolicy("")
	if p.Stage == ir.Enforced {
		p.Stage = ir.Captured
	}
}

func (p *pod) setMTLS(on bool) {
	if p.MTLS != on {
		p.MTLS, p.published = on, 0
	}
}

// setPolicy takes the policy in force. Callers have yet to move to it, even if they were there before.
func (p *pod) setPolicy(hash string) {
	if p.Policy != hash {
		p.Policy, p.Moved, p.policyPublished = hash, "", 0
	}
}

// step goes on; answered is what all nodes have answered, own what the pod's own has.
func (p *pod) step(goal ir.Stage, r *meshv1.PodReport, answered, own uint64) {
	agreed := p.published != 0 && p.published <= answered
	if p.MTLS && agreed && p.policyPublished != 0 && p.policyPublished <= answered {
		p.Moved = p.Policy
	}
	if goal == ir.Out {
		if p.Stage == ir.Enforced && r.GetState() == meshv1.PodState_POD_STATE_CAPTURED && (r.GetReason() == "" || r.GetReason() == names.ReasonDrift) {
			return // the node may be about to enforce: this is no answer to an order to stop it
		}
		p.Lost, p.enforced = false, false
		if p.Stage == ir.Enforced {
			p.Stage = ir.Captured
		}
		// Permissive again: peers may go back to plaintext.
		if p.MTLS && r.GetState() == meshv1.PodState_POD_STATE_CAPTURED {
			p.setMTLS(false)
			return
		}
		if !p.MTLS && agreed && r.GetState() != meshv1.PodState_POD_STATE_ENFORCED {
			p.Stage = ir.Out
		}
		return
	}
	if p.Stage == ir.Out {
		p.Stage, p.stagePublished = ir.Captured, 0
	}
	// Until the pod's node has answered the order, its report may be older than an order to leave that is still on its way.
	if r.GetState() == meshv1.PodState_POD_STATE_CAPTURED && !p.MTLS && (p.stagePublished == 0 || p.stagePublished > own) {
		return
	}
	if captured(r) && !p.MTLS {
		p.setMTLS(true)
		return
	}
	if p.MTLS && agreed && captured(r) {
		p.Stage = ir.Enforced
	}
}
