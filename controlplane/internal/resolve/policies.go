package resolve

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// compiledPolicy is one policy object in a form that can be enforced.
type compiledPolicy struct {
	ref     Ref
	key     ir.Key
	created metav1.Time
	// One of services, selector; neither: the whole namespace.
	services []string
	selector labels.Selector

	// Of an AuthenticationPolicy.
	mode  ir.Mode
	ports map[uint16]ir.Mode

	// Of an AccessPolicy.
	deny   bool
	rules  []compiledRule
	closed bool
}

type compiledRule struct {
	name  string
	peers []ir.Peer
	// operations the rule is about; one at least.
	operations []compiledOperation
}

type compiledOperation struct {
	ports   []uint16
	request *ir.Request // nil: any request
}

func (r *resolver) resolvePolicies() {
	authentication, access := map[string][]*compiledPolicy{}, map[string][]*compiledPolicy{}
	for _, p := range r.in.AuthenticationPolicies {
		c := r.inForce(Ref{"AuthenticationPolicy", p.Namespace, p.Name, p.Generation}, GoodAuthentication(p), Good{Authentication: p})
		authentication[p.Namespace] = append(authentication[p.Namespace], c)
	}
	for _, p := range r.in.AccessPolicies {
		c := r.inForce(Ref{"AccessPolicy", p.Namespace, p.Name, p.Generation}, GoodAccess(p), Good{Access: p})
		access[p.Namespace] = append(access[p.Namespace], c)
	}
	for _, l := range []map[string][]*compiledPolicy{authentication, access} {
		for _, policies := range l {
			slices.SortFunc(policies, func(a, b *compiledPolicy) int {
				return cmp.Or(a.created.Compare(b.created.Time), cmp.Compare(a.key.Name, b.key.Name))
			})
		}
	}
	for namespace, pods := range r.byNamespace {
		for _, p := range pods {
			r.inbound(p, authentication[namespace], access[namespace])
		}
		r.warnBlind(access[namespace])
	}
}

// sizeLimit bounds a spec, in bytes of JSON: what an object costs on every node follows it.
const sizeLimit = 64 << 10

func checkSize(spec any) error {
	content, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("spec cannot be read: %w", err)
	}
	if len(content) > sizeLimit {
		return fmt.Errorf("spec of %d bytes: at most %d, split it", len(content), sizeLimit)
	}
	return nil
}

// closed is what a policy without a good form means.
var closed = map[string]string{"AuthenticationPolicy": "are Strict", "AccessPolicy": "refuse everything"}

// inForce compiles a policy as it is, else in its last good form, else as closed. id names it in Result.Good.
func (r *resolver) inForce(ref Ref, id string, now Good) *compiledPolicy {
	now.Lost = r.in.Lost[id]
	c, err := r.compile(now)
	if err == nil {
		r.out.Good[id] = now
	} else if good, last := r.lastGood(id); last != nil {
		c = last
		good.Lost = now.Lost
		r.out.Good[id] = good
		r.problem(Problem{ref, -1, accepted, "False", "Invalid", err.Error() + "; the last good form stays in force"})
	} else {
		c.closed = true
		r.problem(Problem{ref, -1, accepted, "False", "Invalid", err.Error() + "; there is no good form yet, so its targets " + closed[ref.Kind]})
	}
	c.ref = ref
	for _, name := range c.services {
		switch s := r.services[ir.Key{Namespace: ref.Namespace, Name: name}]; {
		case s != nil && len(s.Spec.Selector) == 0:
			r.problem(Problem{ref, -1, accepted, "False", "TargetNotFound", fmt.Sprintf("Service %s/%s has no selector, so it names no pods: the policy has no effect there; target the pods by a selector", ref.Namespace, name)})
		case s == nil:
			r.problem(Problem{ref, -1, accepted, "False", "TargetNotFound", fmt.Sprintf("Service %s/%s does not exist: the policy has no effect there until it does", ref.Namespace, name)})
		}
	}
	return c
}

// lastGood is a policy's last good form: this leader's, else the one before's.
func (r *resolver) lastGood(id string) (Good, *compiledPolicy) {
	for _, known := range []map[string]Good{r.prev.Good, r.in.Good} {
		if good, ok := known[id]; ok {
			if c, err := r.compile(good); err == nil {
				good.InForce = true
				return good, c
			}
		}
	}
	return Good{}, nil
}

func (r *resolver) compile(p Good) (c *compiledPolicy, err error) {
	if p.Authentication != nil {
		c, err = compileAuthentication(p.Authentication)
		return c, cmp.Or(checkSize(p.Authentication.Spec), err)
	}
	c, err = r.compileAccess(p.Access)
	return c, cmp.Or(checkSize(p.Access.Spec), err)
}

func compileTarget(t v1alpha1.Target, c *compiledPolicy) error {
	for _, ref := range t.TargetRefs {
		c.services = append(c.services, ref.Name)
	}
	if t.Selector != nil {
		selector, err := compileSelector(t.Selector)
		if err != nil {
			return fmt.Errorf("selector: %w", err)
		}
		c.selector = selector
	}
	return nil
}

// compileSelector takes a selector as strictly as Kubernetes does.
func compileSelector(s *v1alpha1.LabelSelector) (labels.Selector, error) {
	all := &metav1.LabelSelector{MatchLabels: map[string]string{}}
	for name, value := range s.MatchLabels {
		all.MatchLabels[name] = string(value)
	}
	for _, r := range s.MatchExpressions {
		one := metav1.LabelSelectorRequirement{Key: r.Key, Operator: metav1.LabelSelectorOperator(r.Operator)}
		for _, value := range r.Values {
			one.Values = append(one.Values, string(value))
		}
		all.MatchExpressions = append(all.MatchExpressions, one)
	}
	return metav1.LabelSelectorAsSelector(all)
}

func compileAuthentication(p *v1alpha1.AuthenticationPolicy) (*compiledPolicy, error) {
	c := &compiledPolicy{key: ir.Key{Namespace: p.Namespace, Name: p.Name}, created: p.CreationTimestamp, ports: map[uint16]ir.Mode{}}
	if p.Spec.MTLS != nil {
		c.mode = modeOf(p.Spec.MTLS.Mode)
	}
	for _, port := range p.Spec.Ports {
		c.ports[uint16(port.Port)] = modeOf(port.Mode)
	}
	return c, compileTarget(p.Spec.Target, c)
}

func (r *resolver) compileAccess(p *v1alpha1.AccessPolicy) (*compiledPolicy, error) {
	c := &compiledPolicy{key: ir.Key{Namespace: p.Namespace, Name: p.Name}, created: p.CreationTimestamp, deny: p.Spec.Action == v1alpha1.Deny}
	if err := compileTarget(p.Spec.Target, c); err != nil {
		return c, err
	}
	for i, rule := range p.Spec.Rules {
		one := compiledRule{name: fmt.Sprintf("%s/%s[%d]", p.Namespace, p.Name, i)}
		for _, from := range rule.From {
			one.peers = append(one.peers, r.peers(p.Namespace, from)...)
		}
		slices.SortFunc(one.peers, func(a, b ir.Peer) int { return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.Prefix, b.Prefix)) })
		one.peers = slices.Compact(one.peers)
		for j, to := range rule.To {
			operation, err := compileOperation(to)
			if err != nil {
				return c, fmt.Errorf("rules[%d].to[%d]: %w", i, j, err)
			}
			one.operations = append(one.operations, operation)
		}
		if len(rule.To) == 0 {
			one.operations = []compiledOperation{{}}
		}
		c.rules = append(c.rules, one)
	}
	return c, nil
}

func (r *resolver) peers(namespace string, s v1alpha1.Source) []ir.Peer {
	var l []ir.Peer
	for _, a := range s.ServiceAccounts {
		l = append(l, ir.Peer{ID: names.SPIFFEID(r.snap.Mesh.TrustDomain, cmp.Or(a.Namespace, namespace), a.Name)})
	}
	for _, n := range s.Namespaces {
		l = append(l, ir.Peer{Prefix: "spiffe://" + r.snap.Mesh.TrustDomain + "/ns/" + n + "/"})
	}
	for _, id := range s.SPIFFEIDs {
		l = append(l, ir.Peer{ID: id})
	}
	return l
}

func compileOperation(o v1alpha1.Operation) (compiledOperation, error) {
	var c compiledOperation
	for _, p := range o.Ports {
		c.ports = append(c.ports, uint16(p))
	}
	if len(o.Methods)+len(o.Paths)+len(o.Headers) == 0 {
		return c, nil
	}
	request := &ir.Request{Methods: slices.Sorted(slices.Values(o.Methods))}
	for i, p := range o.Paths {
		m, err := valueMatch(p)
		if err != nil {
			return c, fmt.Errorf("paths[%d]: %w", i, err)
		}
		request.Paths = append(request.Paths, m)
	}
	for i, h := range o.Headers {
		m := ir.StringMatch{Kind: ir.Present}
		if h.Value != nil {
			var err error
			if m, err = valueMatch(*h.Value); err != nil {
				return c, fmt.Errorf("headers[%d]: %w", i, err)
			}
		}
		request.Headers = append(request.Headers, ir.NamedMatch{Name: h.Name, StringMatch: m})
	}
	c.request = request
	return c, nil
}

func valueMatch(v v1alpha1.ValueMatch) (ir.StringMatch, error) {
	kind := map[v1alpha1.MatchType]ir.MatchKind{"": ir.Exact, v1alpha1.MatchExact: ir.Exact, v1alpha1.MatchPrefix: ir.Prefix, v1alpha1.MatchRegex: ir.Regex}[v.Type]
	if kind == 0 {
		return ir.StringMatch{}, fmt.Errorf("match type %q is none of Exact, Prefix, RegularExpression", v.Type)
	}
	return ir.StringMatch{Kind: kind, Value: v.Value}, checkRegex(kind, v.Value)
}
