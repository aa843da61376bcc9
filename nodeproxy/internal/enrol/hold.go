package enrol

import (
	"context"
	"errors"
	"fmt"
	"time"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/pods"
)

// Limits of a container's wait. The runtime makes one at a time on a node: whoever waits holds up all others, those that would
// end the wait (Envoy's, the controller's) among them. So each wait is short, and all waits that end in vain share a budget.
const (
	admitPoll   = 10 * time.Millisecond
	admitLimit  = 3 * time.Second
	admitBudget = 3 * time.Second
	admitWindow = 15 * time.Second
)

// hold is a new pod whose containers wait until it is in the mesh.
type hold struct {
	sandbox string
	// begun counts the looks at the pod; failed is the newest that ended without letting it go, and why what was missing.
	begun, failed int
	why           error
}

// budget is what waits in vain have taken since a moment.
type budget struct {
	since time.Time
	spent time.Duration
}

// Hold closes a pod in which no container has been made yet: nothing goes in or out. It is let go when its policy is in force,
// without having been Permissive on the way, or when the controller says that it is not to be in the mesh.
func (e *Enroller) Hold(p pods.Pod) {
	e.mu.Lock()
	e.holds[p.UID] = &hold{sandbox: p.Sandbox, why: errors.New("its enrolment has not begun: see that the agent of its node reaches the controller")}
	e.mu.Unlock()
	e.gate(p)
}

// Ended says that a sandbox is gone: nothing of it waits any more.
func (e *Enroller) Ended(uid, sandbox string) { e.letGo(uid, sandbox) }

// gate closes a held pod. Where that fails its containers wait all the same.
func (e *Enroller) gate(p pods.Pod) {
	if err := e.config.Kernel.Gate(kernelPod(p)); err != nil {
		e.config.Log.Warn("close the pod until it is in the mesh", "pod", p.UID, "error", err)
	}
}

// Admit waits until a held pod is let go, and fails with what is missing: its container must not be made then. It ends as soon as
// a look at the pod that began after the call has failed. Another mesh's sidecar is not made in a pod of this one.
func (e *Enroller) Admit(ctx context.Context, c pods.Container) error {
	if c.Name == otherSidecar {
		if now, known, err := e.look(c.UID); err != nil || known && (now.Gated || now.Inbound) {
			return errOtherSidecar
		}
	}
	h, held := e.holding(c.UID, c.Sandbox)
	if !held {
		return nil
	}
	started := h.begun
	ctx, cancel := context.WithTimeout(ctx, e.patience())
	defer cancel()
	began := time.Now()
	e.Changed(c.UID)
	tick := time.NewTicker(admitPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
		h, held := e.holding(c.UID, c.Sandbox)
		switch {
		case !held:
			return nil
		case h.failed > started, ctx.Err() != nil:
			e.spend(time.Since(began))
			return fmt.Errorf("the pod is not in the mesh yet: %w", h.why)
		}
	}
}

// patience is how long the next wait may be.
func (e *Enroller) patience() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	if time.Since(e.waits.since) > admitWindow {
		e.waits = budget{since: time.Now()}
	}
	return max(5*admitPoll, min(admitLimit, admitBudget-e.waits.spent))
}

func (e *Enroller) spend(d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.waits.spent += d
}

// holding finds the hold of a pod in a sandbox.
func (e *Enroller) holding(uid, sandbox string) (hold, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if h := e.holds[uid]; h != nil && h.sandbox == sandbox {
		return *h, true
	}
	return hold{}, false
}

// heldBack tells whether a pod is held in the sandbox that it runs in.
func (e *Enroller) heldBack(p pods.Pod) bool {
	_, held := e.holding(p.UID, p.Sandbox)
	return held
}

// looks notes that a look at a held pod begins, and returns its number; 0: the pod is not held in that sandbox.
func (e *Enroller) looks(p pods.Pod) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	h := e.holds[p.UID]
	if h == nil || h.sandbox != p.Sandbox {
		return 0
	}
	h.begun++
	return h.begun
}

// wait notes why a look did not let a pod go.
func (e *Enroller) wait(p pods.Pod, look int, why error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if h := e.holds[p.UID]; h != nil && h.sandbox == p.Sandbox && look > 0 {
		h.failed, h.why = look, why
	}
}

func (e *Enroller) letGo(uid, sandbox string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if h := e.holds[uid]; h != nil && h.sandbox == sandbox {
		delete(e.holds, uid)
	}
}

// judgeHold lets a held pod go once it is where it is to be.
func (e *Enroller) judgeHold(s *state, wish *meshv1.LocalPod, look int, left bool, err error) {
	switch {
	case left && wish.Goal == meshv1.Stage_STAGE_OUT, s.stage == meshv1.Stage_STAGE_ENFORCED && s.complete:
		e.letGo(s.pod.UID, s.pod.Sandbox)
	case err != nil:
		e.wait(s.pod, look, err)
	}
}
