package netns

import (
	"net/netip"
	"testing"

	"github.com/weftmesh/weft/redirect"
)

// What one connection costs: dial, greeting, reset. The difference of the two is the hooks'.
func BenchmarkConnection(b *testing.B) {
	for _, c := range []struct {
		name     string
		captured bool
	}{{"uncaptured", false}, {"captured", true}} {
		b.Run(c.name, func(b *testing.B) {
			w := newWorld(b, limits(redirect.Limits{ConnectionsPerPod: 65536}))
			p := w.enrolled("a", podIPv4, podIPv6)
			p.serve("app", 80)
			to := "127.0.0.1:80"
			if c.captured {
				w.services()
				to = serviceIPv4
			}
			at := netip.MustParseAddrPort(to)
			b.ResetTimer()
			w.ok(p.run(func() error {
				for range b.N {
					st, err := socket(domainOf(at), 0)
					if err != nil {
						return err
					}
					if err := st.connectOrClose(to); err != nil {
						return err
					}
					if _, err := st.readLine(); err != nil {
						return err
					}
					st.reset()
				}
				return nil
			}))
		})
	}
}

// From a pod's netns to the sk_lookup program attached, routes and sysctls set; and back.
func BenchmarkPod(b *testing.B) {
	w := newWorld(b)
	p := w.pod("a", podIPv4, podIPv6)
	cycle := func(name string, enter func(redirect.Pod) error, timeEntry bool) {
		b.Run(name, func(b *testing.B) {
			for range b.N {
				b.StopTimer()
				if timeEntry {
					b.StartTimer()
				}
				w.ok(enter(p.description()))
				if timeEntry {
					b.StopTimer()
				} else {
					b.StartTimer()
				}
				w.ok(w.redirect.Withdraw(p.uid))
			}
		})
	}
	cycle("gate", w.redirect.Gate, true)
	cycle("enrol", w.redirect.Enrol, true)
	cycle("withdraw", w.redirect.Enrol, false)
}

func BenchmarkVerify(b *testing.B) {
	w := newWorld(b)
	p := w.enrolled("a", podIPv4, podIPv6)
	b.ResetTimer()
	for range b.N {
		state, err := w.redirect.Verify(p.uid)
		if err != nil || !state.Captured() {
			b.Fatal(state, err)
		}
	}
}

func BenchmarkLoadAndRelease(b *testing.B) {
	w := newWorld(b)
	for range b.N {
		w.ok(w.redirect.Release(true))
		w.load()
	}
}
