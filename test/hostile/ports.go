package hostile

import (
	"github.com/weftmesh/weft/test/hostile/attack"
)

// everyPort is an attempt of a kind at every proxy port of an address.
func everyPort(kind, to string, options ...string) *attack.Attempt {
	return &attack.Attempt{Kind: kind, To: to, First: 15000, Last: 15019, Count: 20, Options: options}
}

const notCaptured = "in a pod outside the mesh they are ports like any"

func proxyPorts() []Attempt {
	own := func(id, what string, make *attack.Attempt) Attempt {
		return Attempt{ID: id, What: what, By: []Attacker{Barred}, Where: Inside, Verdict: Permission, Shown: Here, Make: make}
	}
	mapped := func(a *attack.Attempt) *attack.Attempt { a.Mapped = true; return a }
	var all []Attempt
	for _, at := range []struct{ id, name, address string }{
		{"lo4", "127.0.0.1", "127.0.0.1"}, {"any4", "0.0.0.0", "0.0.0.0"}, {"own4", "the pod's IPv4 address", "{own4}"}, {"steer4", "127.64.0.1", "127.64.0.1"},
		{"lo6", "::1", "::1"}, {"any6", "::", "::"}, {"own6", "the pod's IPv6 address", "{own6}"}, {"steer6", "fd77:5eed::1", "fd77:5eed::1"},
	} {
		all = append(all, own("dial-"+at.id, "dial them at "+at.name, everyPort("scan", at.address)))
	}
	all = append(all,
		own("dial-mapped", "dial them at 127.0.0.1, IPv4-mapped", mapped(everyPort("scan", "127.0.0.1"))),
		own("dial-own-mapped", "dial them at the pod's address, IPv4-mapped", mapped(everyPort("scan", "{own4}"))),
	)
	for _, family := range []string{"4", "6"} {
		all = append(all, Attempt{ID: "dial-other" + family, What: "dial them at another pod by IPv" + family, By: outsiders, Where: Both, Verdict: Closed, Shown: Here,
			Make: everyPort("scan", "{pod"+family+"}"), Uncontrolled: notCaptured})
	}
	for _, at := range []struct{ id, name, address string }{
		{"any4", "0.0.0.0", "0.0.0.0"}, {"lo4", "127.0.0.1", "127.0.0.1"}, {"own4", "the pod's IPv4 address", "{own4}"},
		{"any6", "::", "::"}, {"lo6", "::1", "::1"}, {"own6", "the pod's IPv6 address", "{own6}"},
	} {
		all = append(all, own("bind-"+at.id, "bind them at "+at.name, everyPort("bind", at.address)))
	}
	return append(all,
		own("bind-mapped", "bind them at 0.0.0.0, IPv4-mapped", mapped(everyPort("bind", "0.0.0.0"))),
		own("bind-reuseport4", "bind them beside Envoy with SO_REUSEPORT, IPv4", everyPort("bind", "0.0.0.0", "reuseport")),
		own("bind-reuseport6", "bind them beside Envoy with SO_REUSEPORT, IPv6", everyPort("bind", "::", "reuseport")),
		own("bind-reuseaddr4", "bind them with SO_REUSEADDR, IPv4", everyPort("bind", "0.0.0.0", "reuseaddr")),
		own("bind-reuseaddr6", "bind them with SO_REUSEADDR, IPv6", everyPort("bind", "::", "reuseaddr")),
		own("bind-v6only", "bind them for IPv6 alone", everyPort("bind", "::", "v6only")),
		own("bind-freebind", "bind them at an address that is not there", everyPort("bind", "192.0.2.1", "freebind4")),
		own("bind-mptcp4", "bind them by MPTCP, IPv4", everyPort("bind", "0.0.0.0", "mptcp")),
		own("bind-mptcp6", "bind them by MPTCP, IPv6", everyPort("bind", "::", "mptcp")),
		Attempt{ID: "listen-unbound", What: "listen without binding until the kernel gives one of them", By: []Attacker{Barred}, Where: Inside, Verdict: Closed, Shown: "netns.TestHooks/nobody but Envoy binds a proxy port"},
		Attempt{ID: "bind-range", What: "bind port 0 with IP_LOCAL_PORT_RANGE 15000-15019", By: []Attacker{Barred}, Where: Inside, Verdict: Closed, Shown: "netns.TestHooks/nobody but Envoy binds a proxy port"},
		Attempt{ID: "source-range", What: "dial from one of them by IP_LOCAL_PORT_RANGE", By: outsiders, Where: Both, Verdict: Closed, Shown: Here,
			Make: from(with(dial("{pod4}:9000", "{mark}\n"), "proxy-range", "no-port"), "0.0.0.0:0")},
		Attempt{ID: "dial-mptcp", What: "dial them by MPTCP", By: []Attacker{Barred}, Where: Inside, Verdict: Permission, Shown: "netns.TestHooks/MPTCP falls back and shows the address dialled"},
		Attempt{ID: "original4", What: "ask SO_ORIGINAL_DST of an app's connection, IPv4", By: outsiders, Where: Inside, Verdict: NoEntry, Shown: Here,
			Make: &attack.Attempt{Kind: "original", To: "127.0.0.1:8080"}, Uncontrolled: notCaptured},
		Attempt{ID: "original6", What: "ask SO_ORIGINAL_DST of an app's connection, IPv6", By: outsiders, Where: Inside, Verdict: NoEntry, Shown: Here,
			Make: &attack.Attempt{Kind: "original", To: "[::1]:8080", Mapped: true}, Uncontrolled: notCaptured},
		Attempt{ID: "bound-before", What: "bind one before the pod joins, and stay out of the mesh by it", By: []Attacker{Barred}, Where: Inside, Verdict: Ignored, Shown: "e2e.TestRefusedPods/a proxy port in use"},
		Attempt{ID: "loop", What: "make Envoy connect to itself without end", By: []Attacker{Barred}, Where: Inside, Verdict: Bounded, Shown: "netns.TestHooks/a map that fills up between two hooks loses a connection, never loops it"},
	)
}

func steering() []Attempt {
	own := func(id, what string, verdict Verdict, make *attack.Attempt) Attempt {
		return Attempt{ID: id, What: what, By: []Attacker{Barred}, Where: Inside, Verdict: verdict, Shown: Here, Make: make, Uncontrolled: "an address of the loopback, where nobody listens"}
	}
	brief := func(to string) *attack.Attempt { a := dial(to, "{mark}\n"); a.Millis = 1500; return a }
	return []Attempt{
		own("steer-dial4", "dial a steering address, IPv4", Closed, brief("127.64.0.1:80")),
		own("steer-dial6", "dial a steering address, IPv6", Closed, brief("[fd77:5eed::1]:80")),
		{ID: "steer-app4", What: "dial its own app at a steering address, to be taken for Envoy's leg", By: []Attacker{Barred}, Where: Inside, Verdict: Harmless, Shown: "netns.TestHooks/steering addresses lead nowhere without a connect"},
		own("leg-bind4", "bind a leg's address, IPv4", Permission, from(brief("{pod4}:9000"), "127.112.0.1:0")),
		own("leg-bind-last4", "bind the last leg's address, with a port", Permission, from(brief("{pod4}:9000"), "127.127.255.254:7777")),
		own("leg-bind6", "bind a leg's address with IPV6_FREEBIND", Permission, from(with(brief("[{pod6}]:9000"), "freebind6"), "[fd77:5eed::1:0:1]:0")),
		{ID: "leg-bind-mapped", What: "bind a leg's address, IPv4-mapped", By: []Attacker{Barred}, Where: Inside, Verdict: Permission, Shown: "netns.TestHooks/nobody but Envoy's local legs has a leg's address"},
		own("leg-dial4", "dial a leg's address, IPv4", Permission, brief("127.112.0.1:8080")),
		own("leg-dial6", "dial a leg's address, IPv6", Permission, brief("[fd77:5eed::1:0:1]:8080")),
		{ID: "leg-forged", What: "a packet from a leg's address that no hand-over announces", By: []Attacker{Barred}, Where: Inside, Verdict: Closed, Shown: "netns.TestHooks/a client's address that no local leg brought counts for nothing"},
		{ID: "leg-untagged", What: "Envoy's own sockets without the local leg's tag, or with another's", By: []Attacker{Barred}, Where: Inside, Verdict: Permission, Shown: "netns.TestHooks/Envoy's legs are judged by their tag"},
		{ID: "leg-other-pod", What: "a local leg of Envoy's to another pod", By: []Attacker{Barred}, Where: Inside, Verdict: Permission, Shown: "netns.TestHooks/a client's address that no local leg brought counts for nothing"},
		{ID: "leg-lost", What: "a local leg whose client could not be noted", By: []Attacker{Stranger}, Where: Inside, Verdict: Ignored, Shown: "netns.TestHooks/a client that could not be noted is shown as the pod, never as the loopback"},
		{ID: "steer-wire4", What: "packets to 127.64.0.1 by the wire", By: outsiders, Where: SameNode, Verdict: Unheard, Shown: Here,
			Make: &attack.Attempt{Kind: "inject", From: "{own4}:40001", To: "127.64.0.1:9000", Segment: &attack.Segment{Flags: attack.SYN}, Count: 3}, Uncontrolled: "no router sends them on"},
		{ID: "steer-source4", What: "a SYN from 127.64.0.1 by the wire", By: outsiders, Where: Both, Verdict: Unheard, Shown: Here,
			Make: &attack.Attempt{Kind: "inject", From: "127.64.0.1:40001", To: "{pod4}:9000", Segment: &attack.Segment{Flags: attack.SYN}, Count: 3}, Uncontrolled: "no kernel takes them"},
		{ID: "steer-source6", What: "a SYN from fd77:5eed::1 by the wire", By: outsiders, Where: Both, Verdict: Unheard, Shown: Here,
			Make: &attack.Attempt{Kind: "inject", From: "[fd77:5eed::1]:40001", To: "[{pod6}]:9000", Segment: &attack.Segment{Flags: attack.SYN}, Count: 3}, Uncontrolled: "the answer goes into the pod's own loopback"},
		{ID: "leg-source4", What: "a SYN from a leg's address by the wire", By: outsiders, Where: Both, Verdict: Unheard, Shown: Here,
			Make: &attack.Attempt{Kind: "inject", From: "127.112.0.1:40001", To: "{pod4}:9000", Segment: &attack.Segment{Flags: attack.SYN}, Count: 3}, Uncontrolled: "no kernel takes them"},
		{ID: "leg-source6", What: "a SYN from a leg's IPv6 address by the wire", By: outsiders, Where: Both, Verdict: Unheard, Shown: Here,
			Make: &attack.Attempt{Kind: "inject", From: "[fd77:5eed::1:0:1]:40001", To: "[{pod6}]:9000", Segment: &attack.Segment{Flags: attack.SYN}, Count: 3}, Uncontrolled: "the answer goes into the pod's own loopback"},
	}
}
