//go:build e2e

package e2e

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/weftmesh/weft/test/kube"
)

const spiffe = "spiffe://cluster.local/ns/mesh/sa/"

// verdict is what a caller sees of its call.
type verdict string

const (
	answered  verdict = "answered"           // by the app
	forbidden verdict = "forbidden"          // 403, by the callee's chain that parses requests
	refused   verdict = "refused"            // 503, by the caller's Envoy: the callee ended the handshake
	closed    verdict = "closed"             // without a byte
	mismatch  verdict = "of another version" // neither the app's answer nor a denial: bytes of HTTP/2 to a chain of HTTP/1
)

// verdict: which chain the callee has for a port decides how it refuses; which way the caller takes decides what the
// caller is told.
func (c accessCase) verdict(a ask, r route) verdict {
	parsed, outside := c.requests && a.port == 8080, a.from == stranger
	switch {
	case a.h2c && parsed && !r.http:
		return mismatch // docs/LIMITS.md
	case a.allowed:
		return answered
	case parsed && (!outside || !c.identity()):
		return forbidden
	case !outside && r.http && a.port == 8080:
		return refused
	}
	return closed
}

// problem compares what the caller saw with the verdict; empty: it is right.
func (v trial) problem(server kube.Pod) string {
	switch v.want {
	case answered:
		want := "^" + server.Name + "$"
		switch {
		case v.port == 9000:
			want = "^" + server.Name + ` \S+ ` + regexp.QuoteMeta(v.marker) + "$"
		case v.port == 9001:
			want = "^welcome to " + server.Name + " "
		case v.path != "/pod":
			want = ""
		}
		if v.port == 8080 && v.Status != 200 || v.Error != "" || !regexp.MustCompile(want).MatchString(v.Body) {
			return "this is not the app's answer"
		}
	case forbidden:
		if v.Status != 403 || v.Error != "" || strings.Contains(v.Body, server.Name) {
			return "want status 403"
		}
	case refused:
		if v.Status != 503 || v.Error != "" || strings.Contains(v.Body, server.Name) {
			return "want status 503"
		}
	case closed:
		if !v.outcome.closed() {
			return "want the connection to end at once, without a byte"
		}
	case mismatch:
		if v.Status != 0 || v.Body != "" || v.Error == "" || strings.Contains(v.Error, "deadline") || strings.Contains(v.Error, "timeout") {
			return "want no answer"
		}
	}
	return ""
}

// records are what both nodes' Envoys logged: in, the callee's requests by marker and connections by the caller's
// address and the port; out, the callers' by marker and by the app's address and the port. A caller's line names the address that its Envoy called
// from.
type records struct {
	in, out lines
	// claimed are the addresses that callers called from.
	claimed map[netip.AddrPort]bool
}

// translated finds a connection from an address and a port from which nobody called: kube-proxy's translation of a Service's
// address chooses another port where the caller's own is still known in another connection to the same pod.
func (r records) translated(from netip.Addr, to int) (logLine, bool) {
	for end, l := range r.in.connections {
		if end.remote.Addr() == from && !r.claimed[end.remote] && end.port == to {
			return l, true
		}
	}
	return logLine{}, false
}

type lines struct {
	requests    map[string]logLine
	connections map[ends]logLine
}

// ends tell connections apart: the kernel gives a port of a client's again for another of the server's.
type ends struct {
	remote netip.AddrPort
	port   int
}

var markerIn = regexp.MustCompile(`m=[0-9.n]+`)

func readRecords(logged []nodeLine, trials []trial) records {
	r := records{
		lines{map[string]logLine{}, map[ends]logLine{}},
		lines{map[string]logLine{}, map[ends]logLine{}},
		map[netip.AddrPort]bool{},
	}
	for _, v := range trials {
		if local, ok := address(v.Local); ok {
			r.claimed[local] = true
		}
	}
	for _, l := range logged {
		side := r.in
		if l.Direction == "out" {
			side = r.out
		} else if l.node != "n1" {
			continue
		}
		if l.Kind == "request" {
			side.requests[markerIn.FindString(l.Path)] = l.logLine
		} else if remote, ok := address(l.Remote); ok {
			side.connections[ends{remote, l.port()}] = l.logLine
		}
	}
	return r
}

// address reads an address as apps and Envoy print it, IPv4 as such.
func address(text string) (netip.AddrPort, bool) {
	a, err := netip.ParseAddrPort(text)
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), err == nil
}

// unlogged looks for the call's own lines; empty: they are there and right.
func (v trial) unlogged(r records) string {
	switch {
	case v.want == mismatch:
		return ""
	case v.want == forbidden, v.want == answered && v.port == 8080 && (v.parsed || v.from == stranger):
		l, ok := r.in.requests[v.marker]
		status := map[verdict]string{forbidden: "403", answered: "200"}[v.want]
		if !ok || fmt.Sprint(l.Status) != status || l.denied() != (v.want == forbidden) || l.port() != v.port {
			return fmt.Sprintf("the callee's line of the request is %+v", l)
		}
		return ""
	case v.port == 8080 && v.route.http && v.from != stranger:
		l, ok := r.out.requests[v.marker]
		if !ok {
			return "the caller's Envoy has no line of the request"
		}
		if v.want == answered {
			// The callee's connection serves others after this request: its line comes when it ends.
			if fmt.Sprint(l.Status) != "200" || l.Peer != spiffe+"server" || l.Local != spiffe+v.from.app {
				return fmt.Sprintf("the caller's line of the request is %+v", l)
			}
			return ""
		}
		return v.connection(r, l.Source)
	case v.from == stranger:
		return v.connection(r, v.Local)
	}
	local, _ := address(v.Local)
	l, ok := r.out.connections[ends{local, v.route.ports[v.port]}]
	if !ok {
		return "the caller's Envoy has no line of the connection from " + v.Local
	}
	return v.connection(r, l.Source)
}

// connection looks at the callee's line of a connection from an address.
func (v trial) connection(r records, from string) string {
	source, ok := address(from)
	if !ok {
		return fmt.Sprintf("the caller's line says that it called from %q", from)
	}
	l, ok := r.in.connections[ends{source, v.port}]
	if !ok && v.from == stranger {
		l, ok = r.translated(source.Addr(), v.port)
	}
	if !ok {
		return "the callee has no line of the connection from " + from
	}
	peer := spiffe + v.from.app
	if v.from == stranger {
		peer = ""
	}
	if l.denied() != (v.want != answered) || v.want == answered && strings.Trim(l.Peer, "-") != peer {
		return fmt.Sprintf("the callee's line of the connection is %+v", l)
	}
	return ""
}

// port is the one that was called.
func (l logLine) port() int {
	a, _ := address(l.Destination)
	return int(a.Port())
}

// denied: a request that a rule refused, or a connection whose peer was not let in.
func (l logLine) denied() bool {
	if l.Direction != "in" {
		return false
	}
	return l.Kind == "request" && strings.HasPrefix(l.Details, "rbac_access_denied") ||
		l.Kind == "connection" && (l.Failure != "" && l.Failure != "-" || strings.HasPrefix(l.Details, "rbac_access_denied") || strings.Contains(l.Flags, "NR"))
}

// denials are the counters of a callee's chains: requests that the rules of port 8080 denied, and connections that the
// pod's listener refused.
type denials struct{ requests, connections int }

var denialStat = regexp.MustCompile(`(?m)^(\S*(?:rbac\.denied|fail_verify_san|fail_verify_no_cert|fail_verify_error|no_filter_chain_match)): (\d+)$`)

func denialsOf(t *testing.T, callee kube.Pod) denials {
	t.Helper()
	var d denials
	for _, m := range denialStat.FindAllStringSubmatch(admin(t, callee.Node, "/stats"), -1) {
		n, _ := strconv.Atoi(m[2])
		switch {
		case !strings.Contains(m[1], callee.UID):
		case m[1] == "http.in-"+callee.UID+"-8080.rbac.denied":
			d.requests += n
		case !strings.Contains(m[1], "rbac"):
			d.connections += n
		}
	}
	return d
}

// expected is what the counters must have risen by. Who is refused in the handshake is counted once for each
// connection; the caller's Envoy tries a request that met such an end once more (connect-failure, reset-before-request).
type expected struct{ requests, connections, again int }

func count(trials []trial) expected {
	var e expected
	for _, v := range trials {
		switch v.want {
		case forbidden:
			e.requests++
		case closed:
			e.connections++
		case refused:
			e.connections++
			e.again++
		}
	}
	return e
}

func (e expected) compare(t *testing.T, requests, connections int) {
	t.Helper()
	if requests != e.requests {
		t.Errorf("the counter of denied requests rose by %d, want %d", requests, e.requests)
	}
	if connections < e.connections || connections > e.connections+e.again {
		t.Errorf("the counters of refused connections rose by %d, want %d and up to %d more for requests that were tried again", connections, e.connections, e.again)
	}
}
