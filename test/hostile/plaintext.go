package hostile

import "github.com/weftmesh/weft/test/hostile/attack"

// forged names whose address the attacker says is its own.
const (
	asAllowed4, asAllowed6 = "{allowed4}:0", "[{allowed6}]:0"
	notReached             = "answers go to whom the address belongs"
)

func plaintext() []Attempt {
	closed := func(id, what string, make *attack.Attempt) Attempt {
		return Attempt{ID: id, What: what, By: outsiders, Where: Both, Verdict: Closed, Shown: Here, Make: make}
	}
	mapped := func(a *attack.Attempt) *attack.Attempt { a.Mapped = true; return a }
	pieces := func(a *attack.Attempt) *attack.Attempt { a.Pieces = true; return a }
	short := func(a *attack.Attempt) *attack.Attempt { a.Millis = 1500; return a }
	// by a stranger alone, for whom the node's own translation of addresses counts.
	stranger := func(a Attempt) Attempt { a.By = []Attacker{Stranger}; return a }
	uncontrolled := func(why string, a Attempt) Attempt { a.Uncontrolled = why; return a }
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	all := []Attempt{
		closed("http-vip4", "HTTP to the Service's IPv4 address", dial("{vip4}:80", get("/ok"))),
		closed("http-vip6", "HTTP to the Service's IPv6 address", dial("[{vip6}]:80", get("/ok"))),
		closed("http-vip-mapped", "HTTP to the Service's address, IPv4-mapped", mapped(dial("{vip4}:80", get("/ok")))),
		closed("http-second", "HTTP to a second Service that calls the port TCP", dial("{second4}:80", get("/ok"))),
		closed("http-second6", "HTTP to the second Service's IPv6 address", dial("[{second6}]:80", get("/ok"))),
		closed("http-headless", "HTTP by the name of a headless Service", dial("{headless}:8080", get("/ok"))),
		closed("http-pod4", "HTTP to the pod's IPv4 address", dial("{pod4}:8080", get("/ok"))),
		closed("http-pod6", "HTTP to the pod's IPv6 address", dial("[{pod6}]:8080", get("/ok"))),
		closed("http-pod-mapped", "HTTP to the pod's address, IPv4-mapped", mapped(dial("{pod4}:8080", get("/ok")))),
		closed("http-node-port-own", "HTTP to the NodePort of the pod's own node", dial("{node1}:{nodeport}", get("/ok"))),
		closed("http-node-port-other", "HTTP to the NodePort of the other node", dial("{node2}:{nodeport}", get("/ok"))),
		closed("http-node-port6", "HTTP to the NodePort by IPv6", dial("[{node6}]:{nodeport}", get("/ok"))),
		{ID: "http-link-local", What: "HTTP to the pod's fe80:: address", By: outsiders, Where: SameNode, Verdict: Closed, Shown: Here, Make: dial("[{local6}%eth0]:8080", get("/ok"))},
		closed("h2c-vip", "HTTP/2 with prior knowledge to the Service", dial("{vip4}:80", preface)),
		closed("h2c-pod", "HTTP/2 with prior knowledge to the pod's address", dial("{pod4}:8080", preface)),
		closed("http09", "a request without a version", dial("{pod4}:8080", "GET /ok?{mark}\r\n\r\n")),
		closed("http-pieces", "a request byte by byte", pieces(dial("{pod4}:8080", get("/ok")))),
		closed("tcp-vip4", "a line to a TCP port, by the Service's IPv4 address", dial("{vip4}:9000", "{mark}\n")),
		closed("tcp-vip6", "a line to a TCP port, by the Service's IPv6 address", dial("[{vip6}]:9000", "{mark}\n")),
		closed("tcp-pod4", "a line to a TCP port, by the pod's IPv4 address", dial("{pod4}:9000", "{mark}\n")),
		closed("tcp-pod6", "a line to a TCP port, by the pod's IPv6 address", dial("[{pod6}]:9000", "{mark}\n")),
		closed("tcp-pod-mapped", "a line to a TCP port, by the pod's address, IPv4-mapped", mapped(dial("{pod4}:9000", "{mark}\n"))),
		closed("first-vip4", "nothing to a server that speaks first, by the Service's IPv4 address", dial("{vip4}:9001", "")),
		closed("first-vip6", "nothing to a server that speaks first, by the Service's IPv6 address", dial("[{vip6}]:9001", "")),
		closed("first-pod4", "nothing to a server that speaks first, by the pod's IPv4 address", dial("{pod4}:9001", "")),
		closed("first-pod6", "nothing to a server that speaks first, by the pod's IPv6 address", dial("[{pod6}]:9001", "")),
		closed("first-second", "a line to a server that speaks first, by a Service that does not say so", dial("{second4}:9001", "{mark}\n")),
		closed("unnamed-pod4", "a line to a port that no Service names, IPv4", dial("{pod4}:9002", "{mark}\n")),
		closed("unnamed-pod6", "a line to a port that no Service names, IPv6", dial("[{pod6}]:9002", "{mark}\n")),
		closed("source-80", "from source port 80", from(with(dial("{pod4}:8080", get("/ok")), "reuseaddr", "reuseport"), "0.0.0.0:80")),
		closed("source-10250", "from source port 10250, kubelet's", from(with(dial("{pod4}:8080", get("/ok")), "reuseaddr", "reuseport"), "0.0.0.0:10250")),
		closed("source-15021", "from source port 15021, the agent's metrics'", from(with(dial("{pod4}:9000", "{mark}\n"), "reuseaddr", "reuseport"), "0.0.0.0:15021")),
		stranger(closed("source-15001", "from source port 15001, Envoy's for what apps dial", from(with(dial("{pod4}:8080", get("/ok")), "reuseaddr", "reuseport"), "0.0.0.0:15001"))),
		stranger(closed("source-15006", "from source port 15006, Envoy's for what others dial", from(with(dial("[{pod6}]:8080", get("/ok")), "reuseaddr", "reuseport"), "[::]:15006"))),
		uncontrolled(notReached, closed("transparent4", "IP_TRANSPARENT, bound to the allowed pod's address", short(from(with(dial("{pod4}:8080", get("/ok")), "transparent4"), asAllowed4)))),
		uncontrolled(notReached, closed("transparent6", "IPV6_TRANSPARENT, bound to the allowed pod's address", short(from(with(dial("[{pod6}]:8080", get("/ok")), "transparent6"), asAllowed6)))),
		uncontrolled(notReached, closed("freebind4", "IP_FREEBIND, bound to the allowed pod's address", short(from(with(dial("{pod4}:8080", get("/ok")), "freebind4"), asAllowed4)))),
		uncontrolled(notReached, closed("freebind6", "IPV6_FREEBIND, bound to the allowed pod's address", short(from(with(dial("[{pod6}]:8080", get("/ok")), "freebind6"), asAllowed6)))),
		closed("mark", "SO_MARK", with(dial("{pod4}:8080", get("/ok")), "mark")),
		closed("priority", "SO_PRIORITY 7", with(dial("{pod4}:8080", get("/ok")), "priority")),
		closed("device", "SO_BINDTODEVICE to the pod's link", with(dial("{vip4}:80", get("/ok")), "device=eth0")),
		uncontrolled("the loopback leads nowhere else", closed("device-lo", "SO_BINDTODEVICE to the loopback", short(with(dial("{vip4}:80", get("/ok")), "device=lo")))),
		closed("fastopen4", "data on the SYN, IPv4", with(dial("{pod4}:8080", get("/ok")), "fastopen")),
		closed("fastopen6", "data on the SYN, IPv6", with(dial("[{pod6}]:8080", get("/ok")), "fastopen")),
		closed("mptcp4", "MPTCP, IPv4", with(dial("{pod4}:8080", get("/ok")), "mptcp")),
		closed("mptcp6", "MPTCP, IPv6", with(dial("[{pod6}]:8080", get("/ok")), "mptcp")),
		uncontrolled("urgent data is no part of the stream", closed("urgent", "TCP's urgent data alone", with(dial("{pod4}:9000", "{mark}\n"), "urgent"))),
		uncontrolled("no router follows it", closed("source-route", "a source route by way of the allowed pod", short(with(dial("{pod4}:8080", get("/ok")), "source-route={allowed4}")))),
		closed("proxy-v1", "a PROXY line that names the allowed pod's address", dial("{pod4}:9000", "PROXY TCP4 {allowed4} {pod4} 40000 9000\r\n{mark}\n")),
		closed("proxy-v2", "the binary PROXY head, LOCAL", dial("{pod4}:9000", "\r\n\r\n\x00\r\nQUIT\n\x20\x11\x00\x00{mark}\n")),
	}
	for i, tag := range []string{"tag-local", "tag-outbound"} {
		all = append(all, Attempt{ID: tag, What: "the socket option that marks Envoy's " + []string{"local", "outbound"}[i] + " legs", By: outsiders, Where: Inside,
			Verdict: NoOption, Shown: Here, Make: with(dial("{pod4}:8080", get("/ok")), tag), Uncontrolled: "no kernel has the option"})
	}
	return append(all,
		Attempt{ID: "repair", What: "TCP_REPAIR, to make up a connection", By: outsiders, Where: Inside, Verdict: Permission, Shown: Here,
			Make: with(dial("{pod4}:8080", get("/ok")), "repair"), Uncontrolled: "it needs NET_ADMIN"},
		Attempt{ID: "foreign-slice", What: "a Service of another namespace whose slice names the pod", By: outsiders, Where: Both, Verdict: Closed, Shown: "e2e.TestForeignSlice"},
		Attempt{ID: "own-slice", What: "a Service without selector whose slice names the pod", By: outsiders, Where: Both, Verdict: Closed, Shown: "e2e.TestAccessPolicy"},
		Attempt{ID: "weighted", What: "a route that spreads over two Services of the pod", By: []Attacker{Barred}, Where: Both, Verdict: Closed, Shown: "e2e.TestAccessPolicy"},
		Attempt{ID: "second-address4", What: "an IPv4 address that the running pod gets later", By: outsiders, Where: Both, Verdict: Closed, Shown: "netns.TestHooks/fe80:: addresses and second interfaces lead to Envoy"},
		Attempt{ID: "second-address6", What: "an IPv6 address that the running pod gets later", By: outsiders, Where: Both, Verdict: Closed, Shown: "netns.TestHooks/fe80:: addresses and second interfaces lead to Envoy"},
		Attempt{ID: "syn-cookies", What: "a flood of SYNs, so that cookies open connections", By: []Attacker{Stranger}, Where: Both, Verdict: Closed, Shown: "netns.TestHooks/SYN cookies and a full backlog do not open the pod"},
		Attempt{ID: "host-network", What: "a labelled pod of the host's network, on either node", By: []Attacker{Stranger}, Where: Both, Verdict: Closed, Shown: "e2e.TestProbes"},
		Attempt{ID: "permissive-identity", What: "plaintext to a Permissive port that has a rule about identities", By: []Attacker{Stranger}, Where: Both, Verdict: Closed, Shown: "e2e.TestAccessPolicy"},
		Attempt{ID: "shown-on-wire", What: "to read a Strict pod's traffic on any link of a node", By: []Attacker{Stranger}, Where: Both, Verdict: Ciphertext, Shown: "e2e.TestNoPlaintext"},
	)
}
