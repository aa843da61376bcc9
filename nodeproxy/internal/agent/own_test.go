package agent

import (
	"context"
	"log/slog"
	"testing"
	"time"
)

// TestWhoOwnsTheNode: a later pod's agent takes it, an earlier one's only when nobody has it.
func TestWhoOwnsTheNode(t *testing.T) {
	dir := t.TempDir()
	config := func(pod string) Config {
		return Config{RunDir: dir, PodUID: pod, Log: slog.New(slog.DiscardHandler)}
	}
	type agent struct {
		release func()
		asked   chan bool
	}
	take := func(pod string) agent {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		release, err := own(ctx, config(pod))
		if err != nil {
			t.Fatalf("%s does not get the node: %v", pod, err)
		}
		watching, stop := context.WithCancel(t.Context())
		a := agent{func() { stop(); release() }, make(chan bool, 1)}
		go func() { a.asked <- succeeded(watching, config(pod)) }()
		return a
	}
	// yields lets one go as soon as it is asked, and stand by.
	yields := func(a agent, pod string) (back chan agent) {
		back = make(chan agent, 1)
		go func() {
			if !<-a.asked {
				return
			}
			a.release()
			back <- take(pod)
		}()
		return back
	}
	first := take("a")
	standby := yields(first, "a")
	second := take("b") // asks
	select {
	case <-standby:
		t.Fatal("two have the node")
	case <-second.asked:
		t.Fatal("an agent that stands by asks for the node")
	case <-time.After(5 * nextPoll):
	}
	second.release() // it died
	fallback := <-standby
	standby = yields(fallback, "a")
	second = take("b") // and is back
	second.release()
	third := <-standby
	third.release()

	// The earlier pod's agent that restarts does not ask.
	second = take("b")
	defer second.release()
	ctx, cancel := context.WithTimeout(t.Context(), 5*nextPoll)
	defer cancel()
	if _, err := own(ctx, config("a")); err == nil {
		t.Error("the agent of an earlier pod took the node")
	}
	select {
	case <-second.asked:
		t.Error("the agent of an earlier pod asked for the node")
	default:
	}
}
