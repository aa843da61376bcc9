package agent

import (
	"slices"
	"testing"
	"time"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/envoy"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
)

// TestWhichEnvoyServes during an upgrade: the own pod's from when it serves, the other until then and when the own is gone.
func TestWhichEnvoyServes(t *testing.T) {
	const own, other = "pod-b", "pod-a"
	none := envoy.State{}
	starting := func(pod string) envoy.State { return envoy.State{Pod: pod, Cgroup: "/" + pod} }
	dead := starting
	live := func(pod string) envoy.State {
		return envoy.State{Pod: pod, Cgroup: "/" + pod, PID: 7, Live: true}
	}
	for _, c := range []struct {
		name   string
		states [names.Generations]envoy.State
		before uint32
		want   uint32
	}{
		{"nothing is known", [2]envoy.State{none, none}, 0, 0},
		{"the own alone", [2]envoy.State{live(own), none}, 0, 0},
		{"the own alone, second row", [2]envoy.State{none, live(own)}, 0, 1},
		{"the own starts beside another", [2]envoy.State{live(other), starting(own)}, 0, 0},
		{"the own serves beside another", [2]envoy.State{live(other), live(own)}, 0, 1},
		{"the own died for a moment", [2]envoy.State{live(other), dead(own)}, 1, 1},
		{"the own has no supervisor any more", [2]envoy.State{live(other), none}, 1, 0},
		{"the other has none", [2]envoy.State{none, live(own)}, 1, 1},
		{"the other comes back", [2]envoy.State{starting(other), live(own)}, 1, 1},
		{"the other starts before the own", [2]envoy.State{starting(other), none}, 1, 0},
		{"neither serves", [2]envoy.State{starting(other), starting(own)}, 1, 1},
		{"all gone", [2]envoy.State{none, none}, 1, 1},
		{"another pod's two", [2]envoy.State{live(other), live("pod-c")}, 1, 1},
	} {
		if got := choose(c.states, c.before, own); got != c.want {
			t.Errorf("%s: generation %d, want %d", c.name, got, c.want)
		}
	}
}

// TestTwoEnvoys: both are attached, the second is the agent's own; when the first has gone, what was for it goes too.
func TestTwoEnvoys(t *testing.T) {
	b := newBench(t, t.TempDir())
	b.config.PodUID = "b"
	if b.proxies.known() {
		t.Error("word of every generation, before any came")
	}
	old := envoy.State{Generation: 0, Pod: "a", PID: 7, Cgroup: "/a", Live: true}
	next := envoy.State{Generation: 1, Pod: "b", PID: 8, Cgroup: "/b"}
	b.follow(0, old)
	b.follow(1, next)
	if !b.proxies.known() {
		t.Error("no word of a generation")
	}
	if g, _ := b.proxies.serving(); g != 0 || !slices.Equal(b.proxies.beside(), []uint32{1}) {
		t.Errorf("generation %d serves beside %v", g, b.proxies.beside())
	}
	if n := b.kernel.attachments(); n != 2 {
		t.Errorf("%d cgroups are attached", n)
	}
	next.Live = true
	b.follow(1, next)
	if g, _ := b.proxies.serving(); g != 1 || !slices.Equal(b.proxies.beside(), []uint32{0}) {
		t.Errorf("generation %d serves beside %v", g, b.proxies.beside())
	}
	for g := range uint32(2) {
		name := names.Listener("in", "1", "sandbox", g)
		if _, err := b.cache.Set(name, &listener.Listener{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	b.follow(0, envoy.State{})
	b.forgetLost()
	if got := b.cache.Names(relay.TypeListener, "in/"); len(got) != 2 {
		t.Errorf("a supervisor that may come back lost its listeners: %v are left", got)
	}
	b.proxies.gone[0] = time.Now().Add(-2 * forgetGeneration)
	b.forgetLost()
	b.forgetLost()
	if got := b.cache.Names(relay.TypeListener, "in/"); !slices.Equal(got, []string{"in/1/sandbox/1"}) || !slices.Equal(b.kernel.detached, []uint32{0}) {
		t.Errorf("left are the listeners %v; detached were %v", got, b.kernel.detached)
	}
}
