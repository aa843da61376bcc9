package enrol

import (
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
)

// Envoy outlives the agent, and its chains are named by the changes that they have been through. An agent that did not know
// those would give listeners with other chains, and Envoy would cut every connection of the pod. So what Envoy has of a
// pod is written down when it has acknowledged it, before it is reported.

// record is what is kept of a pod.
type record struct {
	Sandbox string
	Settled string
	// Held: its containers waited until it was in the mesh.
	Held  bool
	Forms []recordForm
}

type recordForm struct {
	Stage meshv1.Stage
	Hash  string
	// Policy in protobuf's binary form; nil: none.
	Policy        []byte
	ServerFirst   []uint16
	MaxConnection time.Duration
	Revision      map[uint16]uint32
}

// remember writes down what Envoy has of a pod. Where that fails nothing may be kept: an older record would be wrong.
func (e *Enroller) remember(s *state) {
	raw, err := encode(s)
	if err == nil {
		err = e.config.Memory.Save(s.pod.UID, raw)
	}
	if err != nil {
		e.config.Log.Warn("the next agent will not know the pod's chains", "pod", s.pod.UID, "error", err)
		e.forget(s.pod.UID)
	}
}

func (e *Enroller) forget(podUID string) {
	if err := e.config.Memory.Drop(podUID); err != nil {
		e.config.Log.Warn("forget the pod's chains", "pod", podUID, "error", err)
	}
}

// recall takes over what an agent before this one gave Envoy of a pod. What cannot be used is not taken; a record that is
// more open than the kernel is not of the pod's last policy.
func (e *Enroller) recall(s *state, wish *meshv1.LocalPod) {
	if len(s.inbound.forms) > 0 {
		return
	}
	raw, err := e.config.Memory.Load(s.pod.UID)
	if err != nil || raw == nil {
		if err != nil {
			e.config.Log.Warn("the pod's chains are not known", "pod", s.pod.UID, "error", err)
		}
		return
	}
	kept, in, err := decode(raw)
	if err != nil {
		e.config.Log.Warn("the pod's chains are not known", "pod", s.pod.UID, "error", err)
		return
	}
	now, err := e.config.Kernel.Verify(s.pod.UID)
	if err != nil || kept.Sandbox != s.pod.Sandbox || len(in.forms) == 0 || now.Strict && in.current().stage != meshv1.Stage_STAGE_ENFORCED {
		return
	}
	if in.given, err = lds.Listeners(e.pod(s, wish, in.forms)); err != nil {
		return
	}
	if in.settled == "" { // a drain may be under way
		in.drained = e.now().Add(e.config.Drain)
	}
	s.inbound = in
	s.pod.Unheld = s.pod.Unheld && !kept.Held
}

func encode(s *state) ([]byte, error) {
	r := record{Sandbox: s.pod.Sandbox, Settled: s.inbound.settled, Held: !s.pod.Unheld}
	for _, f := range s.inbound.forms {
		kept := recordForm{Stage: f.stage, Hash: f.hash, ServerFirst: f.ServerFirst, MaxConnection: f.MaxConnection, Revision: f.Revision}
		if f.Policy != nil {
			policy, err := proto.Marshal(f.Policy)
			if err != nil {
				return nil, fmt.Errorf("write policy %s: %w", f.hash, err)
			}
			kept.Policy = append([]byte{}, policy...) // an empty policy is not none
		}
		r.Forms = append(r.Forms, kept)
	}
	return json.Marshal(r)
}

func decode(raw []byte) (r record, in inbound, err error) {
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, in, fmt.Errorf("read record: %w", err)
	}
	for _, kept := range r.Forms {
		f := form{stage: kept.Stage, hash: kept.Hash, Form: lds.Form{ServerFirst: kept.ServerFirst, MaxConnection: kept.MaxConnection, Revision: kept.Revision}}
		if kept.Policy != nil {
			f.Policy = &meshv1.InboundPolicy{}
			if err := proto.Unmarshal(kept.Policy, f.Policy); err != nil {
				return r, in, fmt.Errorf("read policy %s: %w", kept.Hash, err)
			}
		}
		in.forms = append(in.forms, f)
	}
	in.settled = r.Settled
	return r, in, nil
}
