package agent

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/envoy"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/redirect"
)

// forgetGeneration is how long a supervisor may be away until its generation is forgotten.
const forgetGeneration = 5 * time.Second

// proxies are the node's Envoys, as their supervisors tell. During an upgrade there are two: new connections go to the first, the
// other serves what it has. The zero value knows of none.
type proxies struct {
	mu     sync.Mutex
	states [names.Generations]envoy.State
	// heard: there was word of the generation, be it that it has no supervisor; gone is since when it has none.
	heard [names.Generations]bool
	gone  [names.Generations]time.Time
	// first is the generation that new connections go to.
	first uint32
}

// take notes what a supervisor says, and returns what it said before.
func (p *proxies) take(generation uint32, now envoy.State, own string) (old envoy.State) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old, p.states[generation], p.heard[generation] = p.states[generation], now, true
	switch {
	case now.Cgroup != "":
		p.gone[generation] = time.Time{}
	case p.gone[generation].IsZero():
		p.gone[generation] = time.Now()
	}
	p.first = choose(p.states, p.first, own)
	return old
}

// choose is the generation that new connections are to go to: that of the agent's own pod from when it serves, and as long as its
// supervisor lives; without it the one that has them; else any that serves.
func choose(states [names.Generations]envoy.State, first uint32, own string) uint32 {
	best, most := first, 0
	for g := range uint32(names.Generations) {
		s, points := states[g], 0
		switch {
		case s.Cgroup == "":
			continue
		case own != "" && s.Pod == own && (s.Live || g == first):
			points = 4
		case g == first:
			points = 3
		case s.Live:
			points = 2
		default:
			points = 1
		}
		if points > most {
			best, most = g, points
		}
	}
	return best
}

// serving is the state of the Envoy that new connections go to.
func (p *proxies) serving() (uint32, envoy.State) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.first, p.states[p.first]
}

func (p *proxies) get(generation uint32) envoy.State {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.states[generation]
}

// beside are the other generations that have a supervisor.
func (p *proxies) beside() (others []uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for g := range uint32(names.Generations) {
		if g != p.first && p.states[g].Cgroup != "" {
			others = append(others, g)
		}
	}
	return others
}

// known: there was word of every generation.
func (p *proxies) known() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, heard := range p.heard {
		if !heard {
			return false
		}
	}
	return true
}

// ended: no Envoy runs, of any generation.
func (p *proxies) ended() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for g, s := range p.states {
		if s.PID != 0 || !p.heard[g] {
			return false
		}
	}
	return true
}

// lost are generations whose supervisors have gone for good; each is named once.
func (p *proxies) lost(now time.Time) (lost []uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for g := range uint32(names.Generations) {
		if g != p.first && !p.gone[g].IsZero() && now.Sub(p.gone[g]) > forgetGeneration {
			p.gone[g] = time.Time{}
			lost = append(lost, g)
		}
	}
	return lost
}

// generation is that of the Envoy that new connections are to go to; false: it does not serve.
func (a *agent) generation() (uint32, bool) {
	g, s := a.proxies.serving()
	return g, s.PID != 0 && a.cache.Connected(g)
}

// follow takes a supervisor's news.
func (a *agent) follow(generation uint32, s envoy.State) {
	old := a.proxies.take(generation, s, a.config.PodUID)
	_, serving := a.proxies.serving()
	a.reporter.Health(healthOf(serving))
	a.cache.Ended(a.proxies.ended())
	switch {
	case s.Cgroup == "":
		a.cache.Pause(generation, true)
		if old.Cgroup != "" {
			a.look()
		}
	case old.Cgroup != s.Cgroup || old.PID != s.PID:
		if err := a.allow(); err != nil {
			a.config.Log.Error("tell Envoy's broker where it may go", "error", err)
		}
		a.attachSoon(s)
	default:
		a.look()
	}
}

// attachSoon attaches, and tries again until it worked or there is newer news of that Envoy.
func (a *agent) attachSoon(s envoy.State) {
	switch now := a.proxies.get(s.Generation); {
	case a.over(), now.Cgroup != s.Cgroup || now.PID != s.PID:
	case a.attach(s):
		a.config.Log.Info("Envoy's cgroup is attached", "generation", s.Generation, "pid", s.PID, "restarts", s.Restarts)
		a.look()
	default:
		time.AfterFunc(attachRetry, func() { a.attachSoon(s) })
	}
}

// attach makes Envoy's cgroup known to the kernel, which exempts its sockets from capture; until it is, Envoy gets no
// listeners. The folder may have been remade under its old name, so it is looked at again each time.
func (a *agent) attach(s envoy.State) bool {
	a.attaching.Lock()
	defer a.attaching.Unlock()
	if err := a.kernel.AttachProxy(s.Generation, filepath.Join(a.config.CgroupRoot, s.Cgroup)); err != nil {
		a.config.Log.Error("attach hooks to Envoy's cgroup", "cgroup", s.Cgroup, "error", err)
		if errors.Is(err, redirect.ErrStillAttached) {
			return true
		}
		a.cache.Pause(s.Generation, true)
		return false
	}
	a.cache.Pause(s.Generation, false)
	return true
}

// forgetLost takes away what is kept for Envoys that do not come back.
func (a *agent) forgetLost() {
	for _, g := range a.proxies.lost(time.Now()) {
		for _, name := range a.cache.Names(relay.TypeListener, "") {
			if of, one := names.ListenerGeneration(name); one && of == g {
				a.cache.Delete(relay.Key{TypeURL: relay.TypeListener, Name: name})
			}
		}
		if err := a.kernel.DetachProxy(g); err != nil {
			a.config.Log.Warn("forget an Envoy that has ended", "generation", g, "error", err)
		}
	}
}

// settled is nil when the agent's own Envoy has all of the node's new connections.
func (a *agent) settled() error {
	g, s := a.proxies.serving()
	switch _, live := a.generation(); {
	case !live:
		return errors.New("waiting for Envoy")
	case a.config.PodUID != "" && s.Pod != a.config.PodUID:
		return errors.New("waiting for this pod's Envoy; another one serves")
	}
	if n := a.enroller.Elsewhere(g); n > 0 {
		return fmt.Errorf("waiting for %d pods to go over to this pod's Envoy", n)
	}
	return nil
}
