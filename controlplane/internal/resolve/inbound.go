package resolve

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// about tells whether a policy is about a pod that these Services select: on the ports that the policy's own Services send
// to, or on all.
func (c *compiledPolicy) about(p *corev1.Pod, services []*corev1.Service) (ports []uint16, all, ok bool) {
	switch {
	case c.selector != nil:
		return nil, true, c.selector.Matches(labels.Set(p.Labels))
	case len(c.services) == 0:
		return nil, true, true
	}
	for _, s := range services {
		if !slices.Contains(c.services, s.Name) {
			continue
		}
		for _, port := range s.Spec.Ports {
			if number, found := targetPort(p, port); found {
				ports, ok = append(ports, number), true
			}
		}
	}
	return ports, false, ok
}

// declared are the pod's ports whose protocol a Service declares. Of two that disagree the one that parses wins.
func declared(p *corev1.Pod, services []*corev1.Service) map[uint16]ir.Protocol {
	ports := map[uint16]ir.Protocol{}
	for _, s := range services {
		for _, port := range s.Spec.Ports {
			protocol, ok := protocolOf(port)
			number, found := targetPort(p, port)
			if !ok || !found || cmp.Or(port.Protocol, corev1.ProtocolTCP) != corev1.ProtocolTCP {
				continue
			}
			if before, taken := ports[number]; !taken || protocol < before {
				ports[number] = protocol
			}
		}
	}
	return ports
}

// inbound builds what a pod enforces.
func (r *resolver) inbound(p *corev1.Pod, authentication, access []*compiledPolicy) {
	pod := r.snap.Pods[string(p.UID)]
	if pod.Goal == ir.Out && pod.Stage == ir.Out {
		return
	}
	services := r.servicesOf(p)
	protocols := declared(p, services)
	for number, protocol := range protocols {
		if protocol == ir.TCPServerFirst {
			pod.ServerFirstPorts = append(pod.ServerFirstPorts, number)
		}
	}
	slices.Sort(pod.ServerFirstPorts)

	modes, fallback := r.modes(p, services, authentication)
	policies := relevant(p, services, access)
	policy := &ir.InboundPolicy{Default: portPolicy(0, fallback, 0, policies)}
	pod.Strict = fallback == ir.Strict
	for _, n := range singledOut(modes, protocols, policies) {
		mode := fallback
		if m, ok := modes[n]; ok {
			mode = m
		}
		port := portPolicy(n, mode, protocols[n], policies)
		policy.Ports = append(policy.Ports, port)
		pod.Strict = pod.Strict || port.Mode == ir.Strict
		if carriesBytes(port.Protocol) {
			r.noteBlind(n, policies)
		}
	}
	content, err := json.Marshal(policy)
	if err != nil {
		panic(err) // plain data always marshals
	}
	sum := sha256.Sum256(content)
	policy.Hash = hex.EncodeToString(sum[:8])
	pod.Policy = policy.Hash
	r.snap.Policies[policy.Hash] = policy
}

// singledOut are the ports of a pod that may enforce something else than all others, sorted.
func singledOut(modes map[uint16]ir.Mode, protocols map[uint16]ir.Protocol, policies []relevantPolicy) []uint16 {
	numbers := slices.Collect(maps.Keys(modes))
	if len(policies) > 0 {
		numbers = slices.AppendSeq(numbers, maps.Keys(protocols))
	}
	for _, c := range policies {
		numbers = append(numbers, c.ports...)
		for _, rule := range c.rules {
			for _, o := range rule.operations {
				numbers = append(numbers, o.ports...)
			}
		}
	}
	slices.Sort(numbers)
	return slices.Compact(numbers)
}

func carriesBytes(p ir.Protocol) bool { return p == ir.TCP || p == ir.TCPServerFirst }

// noteBlind notes the policies with rules about requests on a port that carries bytes.
func (r *resolver) noteBlind(port uint16, policies []relevantPolicy) {
	for _, c := range policies {
		if (c.all || slices.Contains(c.ports, port)) && c.seesRequests(port) {
			r.blind[c.ref] = append(r.blind[c.ref], port)
		}
	}
}

// seesRequests tells whether a policy has a rule about requests on a port.
func (c *compiledPolicy) seesRequests(port uint16) bool {
	return slices.ContainsFunc(c.rules, func(rule compiledRule) bool {
		return slices.ContainsFunc(rule.operations, func(o compiledOperation) bool {
			return o.request != nil && (len(o.ports) == 0 || slices.Contains(o.ports, port))
		})
	})
}

// warnBlind says in a policy's condition what its rules about requests do where requests cannot be seen.
func (r *resolver) warnBlind(policies []*compiledPolicy) {
	const shown = 16
	for _, c := range policies {
		ports := r.blind[c.ref]
		if len(ports) == 0 {
			continue
		}
		slices.Sort(ports)
		ports = slices.Compact(ports)
		list, more := strings.Trim(fmt.Sprint(ports[:min(shown, len(ports))]), "[]"), ""
		if len(ports) > shown {
			more = fmt.Sprintf(" and %d more", len(ports)-shown)
		}
		effect := "allow nobody there"
		if c.deny {
			effect = "deny their peers altogether there"
		}
		r.problem(Problem{c.ref, -1, accepted, "True", accepted, fmt.Sprintf(
			"requests cannot be seen on ports that carry bytes (%s%s): rules about methods, paths or headers %s; declare HTTP by appProtocol, or name other ports", list, more, effect)})
	}
}

// modes finds the mTLS mode of each port that some policy singles out, and of all others.
func (r *resolver) modes(p *corev1.Pod, services []*corev1.Service, policies []*compiledPolicy) (ports map[uint16]ir.Mode, fallback ir.Mode) {
	ports, rank := map[uint16]ir.Mode{}, map[uint16]int{}
	fallback = r.config.mode
	fallbackRank := 0
	set := func(n uint16, m ir.Mode, how int) {
		if how > rank[n] {
			ports[n], rank[n] = m, how
		}
	}
	// Older policies come first and keep what they set against others that are as specific.
	for _, c := range policies {
		targets, all, ok := c.about(p, services)
		if !ok {
			continue
		}
		specific := 1
		switch {
		case len(c.services) > 0:
			specific = 3
		case c.selector != nil:
			specific = 2
		}
		if c.closed {
			c = &compiledPolicy{mode: ir.Strict}
		}
		for n, m := range c.ports {
			if all || slices.Contains(targets, n) {
				set(n, m, 10+specific)
			}
		}
		switch {
		case c.mode == 0:
		case !all:
			for _, n := range targets {
				set(n, c.mode, specific)
			}
		case specific > fallbackRank:
			fallback, fallbackRank = c.mode, specific
		}
	}
	return ports, fallback
}

// relevantPolicy is an access policy about a pod, with the ports that it is limited to; all: none.
type relevantPolicy struct {
	*compiledPolicy
	ports []uint16
	all   bool
}

// relevant are the access policies about a pod.
func relevant(p *corev1.Pod, services []*corev1.Service, policies []*compiledPolicy) []relevantPolicy {
	var l []relevantPolicy
	for _, c := range policies {
		if ports, all, ok := c.about(p, services); ok {
			l = append(l, relevantPolicy{c, ports, all})
		}
	}
	return l
}

// portPolicy compiles what one port enforces; port 0 stands for every port that is not listed.
func portPolicy(port uint16, mode ir.Mode, protocol ir.Protocol, policies []relevantPolicy) ir.PortPolicy {
	out := ir.PortPolicy{Port: port, Mode: mode, Protocol: protocol}
	bytesOnly := carriesBytes(protocol)
	for _, c := range policies {
		if !c.all && !slices.Contains(c.ports, port) {
			continue
		}
		source := "AccessPolicy " + c.key.String()
		if c.closed {
			out.Closed = true
			out.Sources = append(out.Sources, source)
			continue
		}
		used := len(c.rules) == 0 && !c.deny // an Allow without rules allows nothing
		for _, rule := range c.rules {
			compiled, applies := rule.on(port, bytesOnly, c.deny)
			used = used || applies
			if compiled == nil {
				continue
			}
			out.HTTP = out.HTTP || len(compiled.Requests) > 0
			out.Identity = out.Identity || len(compiled.Peers) > 0
			if c.deny {
				out.Deny = append(out.Deny, *compiled)
			} else {
				out.Allow = append(out.Allow, *compiled)
			}
		}
		if used {
			out.Restricted = out.Restricted || !c.deny
			out.Sources = append(out.Sources, source)
		}
	}
	if out.HTTP && out.Protocol == 0 {
		out.Protocol = ir.HTTP1
	}
	return out
}

// on compiles a rule for a port. applies: the rule is about the port. nil: it can never match there. On a port that carries
// bytes a request cannot be seen: an Allow with one never matches, a Deny with one denies its peers altogether.
func (rule compiledRule) on(port uint16, bytesOnly, deny bool) (compiled *ir.Rule, applies bool) {
	compiled = &ir.Rule{Name: rule.name, Peers: rule.peers}
	anyRequest := false
	for _, o := range rule.operations {
		if len(o.ports) > 0 && !slices.Contains(o.ports, port) {
			continue
		}
		applies = true
		switch {
		case o.request == nil || bytesOnly && deny:
			anyRequest = true
		case !bytesOnly:
			compiled.Requests = append(compiled.Requests, *o.request)
		}
	}
	switch {
	case anyRequest:
		compiled.Requests = nil
	case len(compiled.Requests) == 0:
		return nil, applies
	}
	return compiled, applies
}
