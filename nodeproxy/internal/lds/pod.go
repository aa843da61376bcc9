package lds

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
)

// Pod is what a pod's listeners are made of.
type Pod struct {
	UID, Namespace string
	// SPIFFEID is the pod's identity and the name of its SVID among the SDS secrets.
	SPIFFEID string
	// Sandbox is the runtime's id of the pod sandbox; a new one gets new listeners.
	Sandbox string
	// Generation of the Envoy process that the listeners are for; it decides the ports.
	Generation uint32
	// NetnsPath is where Envoy opens the pod's network namespace.
	NetnsPath string
	// Stage: STAGE_OUT has no listeners, STAGE_CAPTURED is Permissive without rules, STAGE_ENFORCED applies Policy.
	Stage meshv1.Stage
	// Form is what the callee enforces.
	Form
	// Previous are earlier forms, until callers have moved to new connections: their chains for mesh TLS stay, without
	// taking new connections. Envoy cuts a chain's connections its drain time after the chain goes, busy or not. Chains for
	// callers without mesh TLS go at once, for those callers follow no endpoint's generation.
	Previous []Form
	// AccessLog writes a JSON line per request and per connection to Envoy's standard output.
	AccessLog bool
}

// Captured is the policy of STAGE_CAPTURED, for a Form among Pod.Previous.
func Captured() *meshv1.InboundPolicy { return proto.CloneOf(captured) }

// Form is a policy as chains are made of it.
type Form struct {
	// Policy is what is enforced. Nil under STAGE_ENFORCED: every inbound connection is refused.
	Policy *meshv1.InboundPolicy
	// ServerFirst are the ports whose server sends the first bytes.
	ServerFirst []uint16
	// MaxConnection bounds the age of mTLS connections at the callee, so that none outlives the certificate that its peer
	// showed: HTTP connections drain, others are cut, up to maxAgeJitter later. 0: no bound.
	MaxConnection time.Duration
	// Revision of a port's chains, 0 for the ports that the policy does not list. It stands in the names of chains and
	// secrets, so that those of two forms can stand side by side. Revise says when to raise it.
	Revision map[uint16]uint32
}

// Problem says why a port of a policy cannot be enforced as written. That port refuses everything.
type Problem struct {
	// Port, 0 for the ports that the policy does not list.
	Port uint16
	// Reason is a condition reason, CamelCase.
	Reason  string
	Message string
}

// Reasons of a Problem.
const (
	ReasonServerFirst = "HTTPRuleOnServerFirstPort"
	ReasonTooLarge    = "IdentityRuleTooLarge"
	ReasonMode        = "ModeMissing"
	ReasonDuplicate   = "PortListedTwice"
)

func (p Pod) validate() error {
	switch {
	case p.UID == "" || p.Namespace == "" || p.SPIFFEID == "" || p.Sandbox == "":
		return fmt.Errorf("build listeners of pod %q: uid, namespace, SPIFFE ID and sandbox are all needed", p.UID)
	case !filepath.IsAbs(p.NetnsPath):
		return fmt.Errorf("build listeners of pod %q: network namespace path %q is not absolute", p.UID, p.NetnsPath)
	}
	return nil
}

// Problems lists what of the pod's policy cannot be enforced as written, by port. Their ports refuse everything.
func Problems(p Pod) []Problem {
	var found []Problem
	for _, port := range p.ports() {
		if port.problem != nil {
			found = append(found, *port.problem)
		}
	}
	return found
}

// port is one PortPolicy made ready for building: rules sorted out, problems turned into refusal.
type port struct {
	number      uint16
	permissive  bool
	refuse      bool
	http        bool
	http2       bool
	serverFirst bool
	// plain: callers without mesh TLS are let in.
	plain bool
	// parsePlain: plaintext is worth looking for HTTP in.
	parsePlain  bool
	deny, allow []*meshv1.Rule
	restricted  bool
	peers       peerSet
	problem     *Problem
	revision    uint32
}

// captured is the policy of STAGE_CAPTURED: Permissive and without any rule.
var captured = &meshv1.InboundPolicy{DefaultPort: &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_PERMISSIVE}}

// ports returns the default port first, then the listed ones by number.
func (p Pod) ports() []port {
	policy := p.Policy
	if p.Stage != meshv1.Stage_STAGE_ENFORCED {
		policy = captured
	}
	if policy.GetDefaultPort() == nil {
		policy = &meshv1.InboundPolicy{DefaultPort: &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_STRICT, Closed: true}, Ports: policy.GetPorts()}
	}
	listed := slices.Clone(policy.GetPorts())
	slices.SortStableFunc(listed, func(a, b *meshv1.PortPolicy) int { return cmp.Compare(a.GetPort(), b.GetPort()) })
	seen := make(map[uint32]bool, len(listed))
	ports := []port{p.port(0, policy.GetDefaultPort())}
	for _, policy := range listed {
		if seen[policy.GetPort()] || policy.GetPort() == 0 || policy.GetPort() > 65535 {
			i := slices.IndexFunc(ports, func(q port) bool { return uint32(q.number) == policy.GetPort() })
			ports[max(i, 0)].fail(ReasonDuplicate, "the policy lists port %d twice, or it is no port", policy.GetPort())
			continue
		}
		seen[policy.GetPort()] = true
		ports = append(ports, p.port(uint16(policy.GetPort()), policy))
	}
	// A port that speaks first needs its own entry, for its server must not wait for an inspector.
	for _, number := range p.ServerFirst {
		if !seen[uint32(number)] {
			seen[uint32(number)] = true
			ports = append(ports, p.port(number, policy.GetDefaultPort()))
		}
	}
	slices.SortFunc(ports, func(a, b port) int { return cmp.Compare(a.number, b.number) })
	return ports
}

// previous is the pod under each of its previous forms.
func (p Pod) previous() []Pod {
	var pods []Pod
	for _, form := range p.Previous {
		old := p
		old.Form, old.Previous, old.Stage = form, nil, meshv1.Stage_STAGE_ENFORCED
		pods = append(pods, old)
	}
	return pods
}

func (p Pod) port(number uint16, policy *meshv1.PortPolicy) port {
	q := port{
		number:      number,
		permissive:  policy.GetMode() == meshv1.Mode_MODE_PERMISSIVE,
		refuse:      policy.GetClosed(),
		http:        policy.GetHttp(),
		http2:       policy.GetProtocol() == meshv1.Protocol_PROTOCOL_HTTP2,
		serverFirst: policy.GetProtocol() == meshv1.Protocol_PROTOCOL_TCP_SERVER_FIRST || number != 0 && slices.Contains(p.ServerFirst, number),
		deny:        policy.GetDeny(),
		allow:       policy.GetAllow(),
		restricted:  policy.GetRestricted(),
		revision:    p.Revision[number],
	}
	identity := policy.GetIdentity()
	for _, rule := range slices.Concat(q.deny, q.allow) {
		identity = identity || len(rule.GetPeers()) > 0
		q.http = q.http || len(rule.GetRequests()) > 0
	}
	q.parsePlain = !q.serverFirst && policy.GetProtocol() != meshv1.Protocol_PROTOCOL_TCP
	q.plain = q.permissive && !identity && !q.refuse
	if policy.GetMode() == meshv1.Mode_MODE_UNSPECIFIED {
		q.fail(ReasonMode, "the policy of port %d has no mTLS mode", number)
	}
	if q.http {
		if q.serverFirst {
			q.fail(ReasonServerFirst, "port %d has rules about HTTP requests but its server speaks first, which no HTTP server does: remove the rule or correct the port's appProtocol", number)
		}
		return q
	}
	var err error
	if q.peers, err = allowedPeers(q.restricted, q.allow, q.deny); err != nil {
		q.fail(ReasonTooLarge, "the identity rules of port %d: %v", number, err)
	}
	// Without identities or HTTP a rule concerns everyone alike.
	q.plain = q.plain && !q.peers.empty()
	return q
}

func (q *port) fail(reason, format string, args ...any) {
	q.refuse, q.plain = true, false
	if q.problem == nil {
		q.problem = &Problem{Port: q.number, Reason: reason, Message: fmt.Sprintf(format, args...)}
	}
}

// name stands in the names of the port's statistics.
func (q port) name() string {
	if q.number == 0 {
		return "any"
	}
	return fmt.Sprint(q.number)
}

// chain names one of the port's filter chains: "<port>/<kind>", with the revision behind it where there is one.
func (q port) chain(kind string) string { return q.revised(q.name() + "/" + kind) }

// secret names the port's validation secret likewise.
func (q port) secret(podUID string) string { return q.revised(names.RuleSecret(podUID, q.number)) }

func (q port) revised(name string) string {
	if q.revision > 0 {
		name += fmt.Sprintf("/%d", q.revision)
	}
	return name
}
