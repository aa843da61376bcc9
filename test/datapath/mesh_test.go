package datapath

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/test/contract/proxy"
	"github.com/weftmesh/weft/test/datapath/lab"
)

var ports = []lab.PortSpec{
	{Port: 80, Target: httpPort, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP1},
	{Port: 90, Target: h2Port, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP2},
	{Port: 91, Target: grpcPort, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP2},
	{Port: 81, Target: httpPort, Class: meshv1.Class_CLASS_AUTO, Protocol: meshv1.Protocol_PROTOCOL_HTTP1},
	{Port: 82, Target: httpPort, Class: meshv1.Class_CLASS_TCP, Protocol: meshv1.Protocol_PROTOCOL_TCP},
	{Port: 443, Target: tlsPort, Class: meshv1.Class_CLASS_TCP, Protocol: meshv1.Protocol_PROTOCOL_TCP},
	{Port: 444, Target: tlsPort, Class: meshv1.Class_CLASS_AUTO, Protocol: meshv1.Protocol_PROTOCOL_HTTP1},
	{Port: halfPort, Target: halfPort, Class: meshv1.Class_CLASS_TCP, Protocol: meshv1.Protocol_PROTOCOL_TCP},
	{Port: whoPort, Target: whoPort, Class: meshv1.Class_CLASS_TCP, Protocol: meshv1.Protocol_PROTOCOL_TCP},
	{Port: echoPort, Target: echoPort, Class: meshv1.Class_CLASS_TCP, Protocol: meshv1.Protocol_PROTOCOL_TCP},
	{Port: bannerPort, Target: bannerPort, Class: meshv1.Class_CLASS_TCP, Protocol: meshv1.Protocol_PROTOCOL_TCP_SERVER_FIRST},
}

// sticky are the ports with ClientIP affinity.
func sticky() []lab.PortSpec {
	out := slices.Clone(ports)
	for i := range out {
		out[i].Affinity = 3 * time.Hour
	}
	return out
}

// strict takes mesh TLS alone.
func strict(ports ...*meshv1.PortPolicy) *meshv1.InboundPolicy {
	return &meshv1.InboundPolicy{DefaultPort: &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_STRICT}, Ports: ports}
}

func only(port uint32, http bool, id string) *meshv1.PortPolicy {
	return &meshv1.PortPolicy{Port: port, Mode: meshv1.Mode_MODE_STRICT, Http: http, Identity: true, Restricted: true,
		Allow: []*meshv1.Rule{{Name: "shop/only[0]", Peers: []*meshv1.Peer{{Match: &meshv1.Peer_SpiffeId{SpiffeId: id}}}}}}
}

func noAdmin(port uint32) *meshv1.PortPolicy {
	return &meshv1.PortPolicy{Port: port, Mode: meshv1.Mode_MODE_STRICT, Http: true, Deny: []*meshv1.Rule{{Name: "shop/no-admin[0]",
		Requests: []*meshv1.Request{{Paths: []*meshv1.StringMatch{{Match: &meshv1.StringMatch_Prefix{Prefix: "/admin"}}}}}}}}
}

// allowAll has every request judged, and lets every peer pass.
func allowAll(port uint32) *meshv1.PortPolicy {
	p := only(port, true, "")
	p.Allow[0].Peers = []*meshv1.Peer{{Match: &meshv1.Peer_SpiffePrefix{SpiffePrefix: "spiffe://cluster.local/"}}}
	if port == h2Port || port == grpcPort {
		p.Protocol = meshv1.Protocol_PROTOCOL_HTTP2
	}
	return p
}

// asBytes lists a port without any rule: it has an L4 chain of its own, which goes when the port needs HTTP.
func asBytes(port uint32) *meshv1.PortPolicy {
	return &meshv1.PortPolicy{Port: port, Mode: meshv1.Mode_MODE_STRICT}
}

type mesh struct {
	*lab.Lab
	t testing.TB
	// apps of the servers, by pod.
	apps map[string]served
}

// enrolled is a mesh of a client, two servers (near: on the client's node, far: on the other), another client and a
// stranger outside the mesh; everything Strict.
func enrolled(t testing.TB) *mesh {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	l, err := lab.New(ctx, withRoutes(t, lab.Spec{
		Module: "../..",
		Pods: []lab.PodSpec{
			{Name: "client", Account: "client", Node: 0, Last: 2},
			{Name: "other", Account: "other", Node: 0, Last: 3},
			{Name: "stranger", Node: 0, Last: 4},
			{Name: "near", Account: "server", Node: 0, Last: 5, ServerFirst: []uint16{bannerPort}},
			{Name: "far", Account: "server", Node: 1, Last: 6, ServerFirst: []uint16{bannerPort}},
		},
		Services: []lab.ServiceSpec{{Name: "near", Last: 1, Ports: ports, Pods: []string{"near"}}, {Name: "far", Last: 2, Ports: ports, Pods: []string{"far"}},
			{Name: "both", Last: 4, Ports: ports, Pods: []string{"near", "far"}},
			{Name: "sticky", Last: 5, Ports: sticky(), Pods: []string{"near", "far"}},
		},
	}))
	t.Cleanup(func() {
		if t.Failed() {
			for i := range 2 {
				t.Logf("Envoy of node %d:\n%s", i, tail(l.Log(i), 60))
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{Lab: l, t: t, apps: map[string]served{}}
	for _, name := range []string{"near", "far"} {
		m.apps[name] = serve(t, m.Pod(name))
	}
	for _, name := range []string{"client", "other", "near", "far"} {
		m.Pod(name).Policy = strict()
	}
	if err := l.Enrol(ctx); err != nil {
		t.Fatal(err)
	}
	return m
}

func tail(s string, lines int) string {
	all := strings.Split(s, "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func (m *mesh) apply() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	if err := m.Apply(ctx); err != nil {
		m.t.Fatal(err)
	}
}

// policy puts a policy into force at both servers, by the steps of a policy change.
func (m *mesh) policy(policy *meshv1.InboundPolicy) {
	m.t.Helper()
	m.begin(policy, 0)
	m.end()
}

// begin lets new connections meet a policy, while old ones stay; raise is what the policy's chains that would go on with
// too much are raised by.
func (m *mesh) begin(policy *meshv1.InboundPolicy, raise uint32) {
	m.t.Helper()
	for _, server := range []string{"near", "far"} {
		pod := m.Pod(server)
		pod.Policy, pod.Previous = policy, pod.Policy
		pod.Revision, pod.PreviousRevision = map[uint16]uint32{0: pod.Revision[0] + raise}, pod.Revision
	}
	m.apply()
}

// end moves callers, and has Envoy cut what is left.
func (m *mesh) end() {
	m.t.Helper()
	m.Bump()
	m.apply()
	m.Pod("near").Previous, m.Pod("far").Previous = nil, nil
	m.apply()
}

// everywhere runs a test for both servers and both families.
func everywhere(t *testing.T, f func(t *testing.T, server string, ipv6 bool)) {
	for _, server := range []string{"near", "far"} {
		for _, family := range []string{"IPv4", "IPv6"} {
			t.Run(server+"/"+family, func(t *testing.T) { f(t, server, family == "IPv6") })
		}
	}
}

func (m *mesh) direct(server string, port uint16, ipv6 bool) string {
	a := m.Pod(server).Addresses[0]
	if ipv6 {
		a = m.Pod(server).Addresses[1]
	}
	if ipv6 {
		return fmt.Sprintf("[%s]:%d", a, port)
	}
	return fmt.Sprintf("%s:%d", a, port)
}

func node(server string) int { return map[string]int{"near": 0, "far": 1}[server] }

// logged waits for a line in the access log of the server's node that has the fields, given whole or as patterns.
func (m *mesh) logged(t *testing.T, server string, want object) {
	t.Helper()
	eventually(t, func() error {
		for _, record := range m.Records(node(server)) {
			if contains(record, want) {
				return nil
			}
		}
		return fmt.Errorf("no line with %v in the access log of %s's node", want, server)
	})
}

func contains(record, want object) bool {
	for key, value := range want {
		if pattern, ok := value.(*regexp.Regexp); ok {
			if text, _ := record[key].(string); !pattern.MatchString(text) {
				return false
			}
		} else if record[key] != value {
			return false
		}
	}
	return true
}

func eventually(t *testing.T, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := proxy.Until(ctx, f); err != nil {
		t.Error(err)
	}
}
