package enrol

import (
	"context"
	"fmt"
	"strings"
	"time"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/redirect"
)

// listenerRoles are the roles in the order of lds.Listeners.
var listenerRoles = []redirect.Role{redirect.RoleOut, redirect.RoleIn, redirect.RoleInFirst}

// drift lists what the kernel holds otherwise than this process set it, besides what the kernel itself calls drift.
func (s *state) drift(now redirect.State) []string {
	drift := now.Drift
	add := func(wrong bool, what string, args ...any) {
		if wrong {
			drift = append(drift[:len(drift):len(drift)], fmt.Sprintf(what, args...))
		}
	}
	add(now.Gated, "the pod is gated")
	add(!now.Inbound, "inbound connections are not captured")
	add(!now.Outbound, "outbound connections are not captured")
	add(now.Strict != s.mode.Strict, "strict is %t, not %t", now.Strict, s.mode.Strict)
	add(now.Generation != s.generation, "connections go to Envoy generation %d, not %d", now.Generation, s.generation)
	return drift
}

// deaf are the listeners that the kernel has no socket of.
func (s *state) deaf(found []redirect.Listener) []*listener.Listener {
	var out []*listener.Listener
	have := roles(found, s.generation)
	for i, l := range s.inbound.given {
		if !have[listenerRoles[i]] {
			out = append(out, l)
		}
	}
	return out
}

// repair makes good what something else has changed in the kernel. While no Envoy is live nothing listens, and that is no
// drift.
func (e *Enroller) repair(ctx context.Context, s *state, live bool) error {
	why := e.wrong(ctx, s, live)
	if len(why) == 0 {
		return nil
	}
	e.config.Log.Warn("drift is repaired", "pod", s.pod.UID, "drift", why)
	e.config.Report(&meshv1.PodReport{Uid: s.pod.UID, Sandbox: s.pod.Sandbox, State: meshv1.PodState_POD_STATE_PREPARING, Reason: names.ReasonDrift,
		Message: "being repaired: " + strings.Join(why, "; ")})
	if err := e.config.Kernel.Enrol(kernelPod(s.pod)); err != nil {
		return refuse(err)
	}
	if live {
		if err := e.listenAgain(ctx, s); err != nil {
			return err
		}
		if err := e.config.Kernel.Flip(s.pod.UID, s.generation); err != nil {
			return fmt.Errorf("switch to Envoy generation %d: %w", s.generation, err)
		}
	}
	if err := e.config.Kernel.SetMode(s.pod.UID, s.mode); err != nil {
		return fmt.Errorf("set mode: %w", err)
	}
	if err := e.config.Kernel.Capture(s.pod.UID, true, true); err != nil {
		return err
	}
	s.drifted, s.mended = why, e.now()
	return nil
}

// unsure is how long the report on a pod that was repaired still tells of it: its conditions turn False, for who reads them
// to see, and True after another look. What the kernel holds is what it reports all the same: nobody acts on the drift.
func (e *Enroller) unsure(s *state) time.Duration {
	if s.mended.IsZero() {
		return 0
	}
	return s.mended.Add(lookAgain).Sub(e.now())
}

// wrong lists what is to be repaired. An Envoy that has just come back may be about to listen.
func (e *Enroller) wrong(ctx context.Context, s *state, live bool) []string {
	now, err := e.config.Kernel.Verify(s.pod.UID)
	if err != nil {
		return []string{"the kernel does not hold the pod any more"}
	}
	why := s.drift(now)
	if !live || len(s.deaf(now.Listeners)) == 0 {
		return why
	}
	soon, cancel := context.WithTimeout(ctx, hearLimit)
	defer cancel()
	if err := e.listening(soon, s, len(s.inbound.given)); err != nil {
		why = append(why[:len(why):len(why)], "the kernel has no socket of Envoy's for the pod")
	}
	return why
}

// listenAgain has Envoy listen anew where the kernel has no socket of it: only its listen(2) puts one there. What the
// listener took before drains.
func (e *Enroller) listenAgain(ctx context.Context, s *state) error {
	found, err := e.config.Kernel.Listening(s.pod.UID)
	if err != nil {
		return fmt.Errorf("read listeners: %w", err)
	}
	deaf := s.deaf(found)
	for _, l := range deaf {
		k := relay.Key{TypeURL: relay.TypeListener, Name: l.Name}
		e.config.Envoy.Delete(k)
		if err := e.config.Envoy.Wait(ctx, k, ""); err != nil {
			return err
		}
	}
	if len(deaf) == 0 {
		return nil
	}
	if err := e.give(ctx, s, s.generation, s.inbound.given); err != nil {
		return err
	}
	return e.listening(ctx, s, len(s.inbound.given))
}
