// Package hostile is the list of what hostile pods try, and what becomes of it. docs/HOSTILE.md is made of it, and
// e2e.TestHostile makes those attempts that have one here.
package hostile

import (
	"slices"
	"strings"

	"github.com/weftmesh/weft/test/hostile/attack"
)

// Attacker is a pod from which an attempt is made, root in a container with the default capabilities.
type Attacker string

// The attackers.
const (
	// Stranger is not in the mesh.
	Stranger Attacker = "a stranger"
	// Barred is in the mesh, and no rule allows it.
	Barred Attacker = "a pod that is not allowed"
	// Allowed is in the mesh, and allowed but for what a Deny names.
	Allowed Attacker = "an allowed pod"
)

// Place is where the attacker stands as the attacked pod sees it.
type Place string

// The places.
const (
	Both     Place = "same node, across nodes"
	SameNode Place = "same node"
	Across   Place = "across nodes"
	Inside   Place = "in its own pod"
	Nowhere  Place = "not a pod's"
)

// Verdict is what becomes of an attempt.
type Verdict string

// The verdicts.
const (
	// Closed: a refused connect, a reset or an end; to a pod of the mesh on an HTTP port also an error by its own Envoy or the callee's.
	// The app sees nothing.
	Closed Verdict = "closed"
	// Unheard: nothing comes back at all.
	Unheard Verdict = "unheard"
	// Denied: 403 by the callee's Envoy.
	Denied Verdict = "403"
	// Invalid: 400 by an Envoy.
	Invalid Verdict = "400"
	// Stripped: the request passes without what was forged.
	Stripped Verdict = "passes without it"
	// Harmless: it passes, and decides nothing.
	Harmless Verdict = "passes, means nothing"
	// Split: the request is answered for itself, what was hidden in it is judged or dropped.
	Split Verdict = "what is hidden does not pass"
	// Permission: the kernel says EPERM.
	Permission Verdict = "EPERM"
	// NoEntry: the kernel says ENOENT.
	NoEntry Verdict = "ENOENT"
	// NoOption: the kernel says ENOPROTOOPT.
	NoOption Verdict = "ENOPROTOOPT"
	// Bounded: what is too much is refused and counted, others are served.
	Bounded Verdict = "bounded"
	// Ciphertext: only TLS of the mesh is seen.
	Ciphertext Verdict = "ciphertext alone"
	// Broken: the connection ends; nothing of what was forged reaches an app.
	Broken Verdict = "ends the connection, no more"
	// Ignored: counts for nothing.
	Ignored Verdict = "counts for nothing"
	// Open is a known hole; docs/SECURITY.md says what to do.
	Open Verdict = "open"
)

// The tests that make the attempts of this list; Alone those that would disturb other tests.
const (
	Here  = "e2e.TestHostile"
	Alone = "e2e.TestHostileAlone"
)

// Attempt is one line of the list.
type Attempt struct {
	ID      string
	Group   string
	What    string
	By      []Attacker
	Where   Place
	Verdict Verdict
	// Shown names the test, "package.TestName", with the subtest's name behind a slash if it has one.
	Shown string

	// Make is what the attacker does, where that says all; else the test has code of its own for the ID. {names} are
	// filled in.
	Make *attack.Attempt
	// Over are the ways to the attacked port that are tried, keys of Ways; To stands for the first if it is empty.
	Over []string
	// Status begins the answer, a regular expression; empty: Verdict says it.
	Status string
	// Hidden must never be part of what the app sees.
	Hidden string
	// Uncontrolled says why an unprotected pod need not be reached in the same way; empty: it must be, or the attempt shows
	// nothing.
	Uncontrolled string
}

// groups in the order of the document.
var groups = []struct {
	name, about string
	all         func() []Attempt
}{
	{"Plaintext to a Strict pod", "The pod is under Strict, an AccessPolicy allows one account and denies a path, a method and a header.", plaintext},
	{"TLS", "By the address of the pod, to ports of every kind.", handshakes},
	{"Proxy ports", "15000 to 15019, each port.", proxyPorts},
	{"Steering and leg addresses", "127.64.0.0/10 and fd77:5eed::/64, by which captured connections find Envoy and apps their clients.", steering},
	{"Paths and methods", "An allowed pod against a Deny of a path and a method, by the VIP, a pod address and a Service that says TCP.", paths},
	{"Headers", "An allowed pod, on the same three ways, to a port whose rules are about requests.", headers},
	{"Requests within requests", "An allowed pod, on the same three ways.", smuggling},
	{"Packets", "Root with NET_RAW: sockets that make any packet and see every frame.", packets},
	{"Identity", "To be taken for another pod.", identity},
	{"Load", "To take from others what they need.", exhaustion},
	{"While something is away", "Envoy, its supervisor, its broker, the agent or the controller is killed.", crashes},
	{"From within Envoy", "Whoever runs code in Envoy itself.", escapes},
	{"The Kubernetes API", "A tenant with every right in a namespace of its own.", objects},
	{"Agent, controller and node", "An agent that is not weft's any more, and what pods reach of weft's own processes.", processes},
}

// All is the whole list, in the order of the document.
func All() []Attempt {
	var all []Attempt
	for _, g := range groups {
		for _, a := range g.all() {
			a.Group = g.name
			all = append(all, a)
		}
	}
	return all
}

// Made are the attempts whose program stands in the list, for one attacker.
func Made(by Attacker) []Attempt {
	return slices.DeleteFunc(All(), func(a Attempt) bool { return a.Make == nil || !slices.Contains(a.By, by) })
}

// everyone outside the rules.
var outsiders = []Attacker{Stranger, Barred}

// dial is an attempt to connect and to send.
func dial(to, send string) *attack.Attempt {
	return &attack.Attempt{Kind: "dial", To: to, Send: []byte(send)}
}

// with gives an attempt options of the socket.
func with(a *attack.Attempt, options ...string) *attack.Attempt {
	a.Options = options
	return a
}

// from binds an attempt.
func from(a *attack.Attempt, address string) *attack.Attempt {
	a.From = address
	return a
}

// get is a request that says who makes it.
func get(path string, lines ...string) string {
	return "GET " + path + "?{mark} HTTP/1.1\r\nHost: target\r\n" + strings.Join(append(lines, "Connection: close"), "\r\n") + "\r\n\r\n"
}
