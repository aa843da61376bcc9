package enrol

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/redirect"
)

// listen gives Envoy a pod's secrets and listeners, made of some forms, and waits until it serves by them. When it does not,
// what it had stays.
func (e *Enroller) listen(ctx context.Context, s *state, wish *meshv1.LocalPod, forms []form) error {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	pod := e.pod(s, wish, forms)
	listeners, err := lds.Listeners(pod)
	if err != nil {
		return &Refusal{"Invalid", err}
	}
	rules := lds.RuleSecrets(pod)
	if err := e.serve(ctx, s, listeners, rules); err != nil {
		e.restore(s, wish)
		return err
	}
	if lds.Drops(s.inbound.given, listeners) {
		s.inbound.drained = e.now().Add(e.config.Drain)
	}
	s.inbound.forms, s.inbound.given = forms, listeners
	e.remember(s)
	e.accompany(ctx, s, wish)
	e.config.Envoy.Complete(s.pod.UID)
	if !s.inbound.behind { // else an Envoy may still need others
		e.dropRules(s.pod.UID, rules)
	}
	return nil
}

// accompany gives the Envoys of other generations a pod's listeners too: connections that they have are under the pod's policy as
// well. One that does not take them holds up nothing but the word that the policy is settled.
func (e *Enroller) accompany(ctx context.Context, s *state, wish *meshv1.LocalPod) {
	ctx, cancel := context.WithTimeout(ctx, accompanyLimit)
	defer cancel()
	pod := e.pod(s, wish, s.inbound.forms)
	late := s.inbound.behind
	s.inbound.behind = false
	for _, pod.Generation = range e.beside() {
		listeners, err := lds.Listeners(pod)
		if err == nil {
			err = e.give(ctx, s, pod.Generation, listeners)
		}
		if err != nil {
			e.config.Log.Warn("an Envoy that serves older connections is behind", "pod", s.pod.UID, "generation", pod.Generation, "error", err)
			s.inbound.behind = true
		}
	}
	if late && !s.inbound.behind { // what it had goes now
		s.inbound.drained = e.now().Add(e.config.Drain)
		e.dropRules(s.pod.UID, lds.RuleSecrets(pod))
	}
}

func (e *Enroller) beside() []uint32 {
	if e.config.Beside == nil {
		return nil
	}
	return e.config.Beside()
}

// serve brings listeners into force. A rule that Envoy has by its name changes after them, for it only ever lets more in
// (lds.Revise), and they may be refused; one of a new name comes before, for they wait for it.
func (e *Enroller) serve(ctx context.Context, s *state, listeners []*listener.Listener, rules []lds.RuleSecret) error {
	if _, err := e.authorise(e.unknown(rules)); err != nil {
		return err
	}
	if err := e.give(ctx, s, s.generation, listeners); err != nil {
		return err
	}
	versions, err := e.authorise(rules)
	if err != nil {
		return err
	}
	if err := e.acknowledged(ctx, versions); err != nil {
		return err
	}
	return e.listening(ctx, s, len(listeners))
}

// restore gives Envoy again what it served by before a change that went wrong. A pod that had nothing keeps nothing: undo
// sees to that.
func (e *Enroller) restore(s *state, wish *meshv1.LocalPod) {
	if s.inbound.given == nil {
		return
	}
	rules := lds.RuleSecrets(e.pod(s, wish, s.inbound.forms))
	_, err := e.authorise(rules)
	for _, l := range s.inbound.given {
		if err == nil {
			_, err = e.config.Envoy.Set(l.Name, l)
		}
	}
	if err != nil {
		e.config.Log.Warn("give Envoy the last good listeners", "pod", s.pod.UID, "error", err)
		return
	}
	e.dropListeners(s, s.generation, s.inbound.given)
	e.dropRules(s.pod.UID, rules)
}

// unknown are the rules that Envoy has not by their names.
func (e *Enroller) unknown(rules []lds.RuleSecret) []lds.RuleSecret {
	e.trust.Lock()
	defer e.trust.Unlock()
	return slices.DeleteFunc(slices.Clone(rules), func(r lds.RuleSecret) bool { _, known := e.rules[r.Name]; return known })
}

// authorise gives Envoy rules with the trust bundle of now, and returns their versions.
func (e *Enroller) authorise(rules []lds.RuleSecret) (map[relay.Key]string, error) {
	e.trust.Lock()
	defer e.trust.Unlock()
	return e.giveRules(rules)
}

// giveRules is authorise with trust held.
func (e *Enroller) giveRules(rules []lds.RuleSecret) (map[relay.Key]string, error) {
	roots, err := e.config.Roots()
	if err != nil {
		return nil, err
	}
	versions := map[relay.Key]string{}
	for _, rule := range rules {
		version, err := e.config.Envoy.Set(rule.Name, lds.ValidationSecret(rule, roots))
		if err != nil {
			return nil, err
		}
		e.rules[rule.Name] = rule
		versions[relay.Key{TypeURL: relay.TypeSecret, Name: rule.Name}] = version
	}
	return versions, nil
}

// TrustChanged brings a new trust bundle to every rule that Envoy has.
func (e *Enroller) TrustChanged() error {
	e.trust.Lock()
	defer e.trust.Unlock()
	_, err := e.giveRules(slices.Collect(maps.Values(e.rules)))
	return err
}

// dropRules takes a pod's rules away but those that stay.
func (e *Enroller) dropRules(podUID string, stay []lds.RuleSecret) {
	e.trust.Lock()
	defer e.trust.Unlock()
	for _, name := range e.config.Envoy.Names(relay.TypeSecret, "rule/"+podUID+"/") {
		if !slices.ContainsFunc(stay, func(r lds.RuleSecret) bool { return r.Name == name }) {
			delete(e.rules, name)
			e.config.Envoy.Delete(relay.Key{TypeURL: relay.TypeSecret, Name: name})
		}
	}
}

// give gives a generation of Envoy listeners, and takes the pod's others away when it has acknowledged them.
func (e *Enroller) give(ctx context.Context, s *state, generation uint32, listeners []*listener.Listener) error {
	versions := map[relay.Key]string{}
	for _, l := range listeners {
		version, err := e.config.Envoy.Set(l.Name, l)
		if err != nil {
			return err
		}
		versions[relay.Key{TypeURL: relay.TypeListener, Name: l.Name}] = version
	}
	if err := e.acknowledged(ctx, versions); err != nil {
		return err
	}
	e.dropListeners(s, generation, listeners)
	return nil
}

// dropListeners takes a pod's listeners of a generation away but those that stay.
func (e *Enroller) dropListeners(s *state, generation uint32, stay []*listener.Listener) {
	for _, direction := range []string{"out", "in", "in-first"} {
		for _, name := range e.config.Envoy.Names(relay.TypeListener, direction+"/"+s.pod.UID+"/") {
			of, _ := names.ListenerGeneration(name)
			if of == generation && !slices.ContainsFunc(stay, func(l *listener.Listener) bool { return l.Name == name }) {
				e.config.Envoy.Delete(relay.Key{TypeURL: relay.TypeListener, Name: name})
			}
		}
	}
}

func (e *Enroller) acknowledged(ctx context.Context, versions map[relay.Key]string) error {
	for k, version := range versions {
		if err := e.config.Envoy.Wait(ctx, k, version); err != nil {
			return err
		}
	}
	return nil
}

// listening waits until the kernel's socket map holds the pod's listeners: Envoy acknowledges before its workers listen.
func (e *Enroller) listening(ctx context.Context, s *state, want int) error {
	tick := time.NewTicker(listenPoll)
	defer tick.Stop()
	for {
		found, err := e.config.Kernel.Listening(s.pod.UID)
		if err != nil {
			return fmt.Errorf("read listeners: %w", err)
		}
		have := len(roles(found, s.generation))
		if have >= want {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for Envoy to listen in the pod: %d of %d listeners: %w", have, want, ctx.Err())
		case <-tick.C:
		}
	}
}

// roles are those that a generation of Envoy listens for.
func roles(found []redirect.Listener, generation uint32) map[redirect.Role]bool {
	out := map[redirect.Role]bool{}
	for _, l := range found {
		if l.Generation == generation {
			out[l.Role] = true
		}
	}
	return out
}
