package resolve

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// Conditions and reasons of Gateway API.
const (
	accepted     = "Accepted"
	resolvedRefs = "ResolvedRefs"
)

// candidate is one match of one rule, with what decides its precedence.
type candidate struct {
	route    *ir.Route
	consumer bool
	created  metav1.Time
	key      ir.Key
	order    int
}

// compiledRoute is a route with what became of its rules. Problems that are no parent's stand with Parent -1.
type compiledRoute struct {
	ref      Ref
	created  metav1.Time
	parents  []gwv1.ParentReference
	rules    []*ir.Route
	problems []Problem
}

func (r *resolver) resolveRoutes() {
	var routes []compiledRoute
	// GRPCRoutes first: where nothing is declared, they say that a port speaks HTTP/2, over which HTTPRoutes go as well.
	for _, route := range r.in.GRPCRoutes {
		c := compiledRoute{ref: Ref{"GRPCRoute", route.Namespace, route.Name, route.Generation}, created: route.CreationTimestamp, parents: route.Spec.ParentRefs}
		c.rules, c.problems = r.grpcRules(route, c.ref)
		routes = append(routes, c.sized(route.Spec))
	}
	for _, route := range r.in.HTTPRoutes {
		c := compiledRoute{ref: Ref{"HTTPRoute", route.Namespace, route.Name, route.Generation}, created: route.CreationTimestamp, parents: route.Spec.ParentRefs}
		c.rules, c.problems = r.httpRules(route, c.ref)
		routes = append(routes, c.sized(route.Spec))
	}
	found := map[ir.PortKey][]candidate{}
	for _, consumers := range []bool{false, true} { // producers say what a port speaks
		for _, c := range routes {
			r.attach(found, c, consumers)
		}
	}
	for key, candidates := range found {
		slices.SortStableFunc(candidates, precedence)
		port := r.portOf(key)
		for _, c := range candidates {
			port.Routes = append(port.Routes, c.route)
		}
	}
}

// sized adds the problem of a spec that is too large.
func (c compiledRoute) sized(spec any) compiledRoute {
	if err := checkSize(spec); err != nil {
		c.problems = append(c.problems, Problem{c.ref, -1, accepted, "False", "UnsupportedValue", err.Error()})
	}
	return c
}

func (r *resolver) portOf(key ir.PortKey) *ir.ServicePort {
	s := r.snap.Services[key.Service]
	if s == nil {
		return nil
	}
	for _, p := range s.Ports {
		if p.Key == key {
			return p
		}
	}
	return nil
}

// attach binds a route's rules to the Services that it names as parents: to those of its own namespace, or, as a consumer,
// to those of others.
func (r *resolver) attach(found map[ir.PortKey][]candidate, c compiledRoute, consumers bool) {
	for i, parent := range c.parents {
		key := ir.Key{Namespace: cmp.Or(text(parent.Namespace), c.ref.Namespace), Name: string(parent.Name)}
		consumer := key.Namespace != c.ref.Namespace
		if text(parent.Group) != "" && text(parent.Group) != "core" || text(parent.Kind) != "Service" || consumer != consumers {
			continue // a Gateway's business, or another turn's
		}
		reject := func(message string) { r.problem(Problem{c.ref, i, accepted, "False", "NoMatchingParent", message}) }
		service := r.snap.Services[key]
		if service == nil {
			reject(fmt.Sprintf("Service %s does not exist or is an ExternalName: create it, or name another parent", key))
			continue
		}
		bad := false
		for _, p := range c.problems {
			p.Parent = i
			r.problem(p)
			bad = bad || p.Type == accepted && p.Status == "False"
		}
		matched := false
		for _, port := range service.Ports {
			if !takes(port, parent, c.ref.Kind, consumer) {
				continue
			}
			matched = true
			if bad {
				continue
			}
			if !consumer && port.Class == ir.ClassAuto { // a route says what the port speaks
				port.Class = ir.ClassHTTP
				if c.ref.Kind == "GRPCRoute" {
					port.Protocol = ir.HTTP2
				}
			}
			found[port.Key] = append(found[port.Key], c.candidates(port, consumer)...)
		}
		if !matched {
			reject(fmt.Sprintf("Service %s has no port that the parentRef names and that speaks what a %s routes: name one of its ports, with an appProtocol that says so%s",
				key, c.ref.Kind, map[bool]string{false: " or none", true: ""}[consumer && c.ref.Kind == "GRPCRoute"]))
		}
	}
}

// takes tells whether a parentRef names a port, and the port can have such routes. gRPC goes over HTTP/2 alone; where nothing
// is declared, the Service's own namespace says so by a route: for everybody.
func takes(port *ir.ServicePort, parent gwv1.ParentReference, kind string, consumer bool) bool {
	switch {
	case parent.Port != nil && uint16(*parent.Port) != port.Key.Port, parent.SectionName != nil && string(*parent.SectionName) != port.Name:
		return false
	case port.Protocol == ir.HTTP2:
		return true
	}
	return port.Protocol == ir.HTTP1 && (kind != "GRPCRoute" || !consumer && port.Class == ir.ClassAuto)
}

// candidates are a route's rules for one port.
func (c compiledRoute) candidates(port *ir.ServicePort, consumer bool) (l []candidate) {
	for order, rule := range c.rules {
		own := *rule
		if consumer {
			own.Match.SourceNamespace = c.ref.Namespace
		}
		if len(own.Backends) == 0 && own.Redirect == nil {
			own.Backends = []ir.Backend{{Weight: 1, Port: port.Key}}
		}
		l = append(l, candidate{&own, consumer, c.created, ir.Key{Namespace: c.ref.Namespace, Name: c.ref.Name}, order})
	}
	return l
}

// precedence orders matches as Gateway API does. HTTPRoute: exact path, longer prefix, method, more headers, more query
// parameters; GRPCRoute: more characters of the service, then of the method, more headers; then older route, name, order in
// the route. Consumer routes stand before producer routes, and what takes gRPC alone before what takes every request.
func precedence(a, b candidate) int {
	return cmp.Or(
		boolean(b.consumer, a.consumer),
		boolean(b.route.Match.GRPC, a.route.Match.GRPC),
		cmp.Compare(b.route.Match.Service, a.route.Match.Service),
		cmp.Compare(b.route.Match.ServiceMethod, a.route.Match.ServiceMethod),
		cmp.Compare(pathRank(b.route.Match.Path), pathRank(a.route.Match.Path)),
		cmp.Compare(pathLength(b.route.Match.Path), pathLength(a.route.Match.Path)),
		boolean(b.route.Match.Method != "", a.route.Match.Method != ""),
		cmp.Compare(len(b.route.Match.Headers), len(a.route.Match.Headers)),
		cmp.Compare(len(b.route.Match.Query), len(a.route.Match.Query)),
		a.created.Compare(b.created.Time),
		cmp.Compare(a.key.Namespace, b.key.Namespace), cmp.Compare(a.key.Name, b.key.Name),
		cmp.Compare(a.order, b.order))
}

func boolean(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

func pathRank(m *ir.StringMatch) int {
	switch {
	case m == nil:
		return 0
	case m.Kind == ir.Exact:
		return 3
	case m.Kind == ir.Regex:
		return 2
	}
	return 1
}

func pathLength(m *ir.StringMatch) int {
	if m == nil {
		return 0
	}
	return len(m.Value)
}

func text[T ~string](s *T) string {
	if s == nil {
		return ""
	}
	return string(*s)
}

// httpRules compiles an HTTPRoute's rules; a problem that is no parent's stands with Parent -1 and is repeated for each.
func (r *resolver) httpRules(route *gwv1.HTTPRoute, ref Ref) (rules []*ir.Route, problems []Problem) {
	for i, rule := range route.Spec.Rules {
		base := &ir.Route{}
		err := httpFilters(rule.Filters, base)
		if rule.Retry != nil || rule.SessionPersistence != nil {
			err = errors.Join(err, errors.New("retry and sessionPersistence are not supported"))
		}
		if err != nil {
			problems = append(problems, Problem{ref, -1, accepted, "False", "UnsupportedValue", fmt.Sprintf("rules[%d]: %v", i, err)})
			continue
		}
		if t := rule.Timeouts; t != nil {
			base.Timeout, base.BackendTimeout = duration(t.Request), duration(t.BackendRequest)
		}
		for j, b := range rule.BackendRefs {
			backend, problem := r.backend(ref, b.BackendRef, fmt.Sprintf("rules[%d].backendRefs[%d]", i, j))
			own := &ir.Route{}
			err := httpFilters(b.Filters, own)
			if err == nil && (own.Redirect != nil || own.Rewrite != nil) {
				err = errors.New("a backend's filters can change headers only")
			}
			if err != nil {
				problems = append(problems, Problem{ref, -1, accepted, "False", "UnsupportedValue", fmt.Sprintf("rules[%d].backendRefs[%d]: %v", i, j, err)})
			}
			backend.RequestHeaders, backend.ResponseHeaders = own.RequestHeaders, own.ResponseHeaders
			base.Backends = append(base.Backends, backend)
			problems = append(problems, problem...)
		}
		matches := rule.Matches
		if len(matches) == 0 {
			matches = []gwv1.HTTPRouteMatch{{}}
		}
		for j, m := range matches {
			one := *base
			one.Source = fmt.Sprintf("HTTPRoute %s/%s rule %d match %d", ref.Namespace, ref.Name, i, j)
			if err := httpMatch(m, &one.Match); err != nil {
				problems = append(problems, Problem{ref, -1, accepted, "False", "UnsupportedValue", fmt.Sprintf("rules[%d].matches[%d]: %v", i, j, err)})
				continue
			}
			rules = append(rules, &one)
		}
	}
	return rules, problems
}

func httpMatch(m gwv1.HTTPRouteMatch, to *ir.RouteMatch) error {
	if p := m.Path; p != nil {
		kind := map[string]ir.MatchKind{"": ir.PathPrefix, "PathPrefix": ir.PathPrefix, "Exact": ir.Exact, "RegularExpression": ir.Regex}[text(p.Type)]
		value := cmp.Or(text(p.Value), "/")
		if kind == 0 {
			return fmt.Errorf("path type %s is not supported", text(p.Type))
		}
		err := checkRegex(kind, value)
		if kind != ir.Regex {
			err = checkPath(value)
		}
		if err != nil {
			return fmt.Errorf("path: %w", err)
		}
		if kind != ir.PathPrefix || value != "/" {
			to.Path = &ir.StringMatch{Kind: kind, Value: value}
		}
	}
	to.Method = text(m.Method)
	for _, h := range m.Headers {
		if err := addHeader(to, string(h.Name), text(h.Type), h.Value); err != nil {
			return err
		}
	}
	for _, q := range m.QueryParams {
		if q.Name == "" {
			return errors.New("query parameter without a name")
		}
		n, err := namedMatch(string(q.Name), text(q.Type), q.Value)
		if err != nil {
			return fmt.Errorf("query parameter %s: %w", q.Name, err)
		}
		to.Query = append(to.Query, n)
	}
	return nil
}

// addHeader adds a match on a header. Of two names that differ in case alone the first counts.
func addHeader(to *ir.RouteMatch, name, kind, value string) error {
	n, err := headerMatch(name, kind, value)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(to.Headers, func(h ir.NamedMatch) bool { return h.Name == n.Name }) {
		to.Headers = append(to.Headers, n)
	}
	return nil
}

func headerMatch(name, kind, value string) (ir.NamedMatch, error) {
	n, err := namedMatch(strings.ToLower(name), kind, value)
	if err == nil {
		err = checkToken(name)
	}
	if err != nil {
		return n, fmt.Errorf("header %q: %w", name, err)
	}
	return n, nil
}

func namedMatch(name, kind, value string) (ir.NamedMatch, error) {
	k := ir.Exact
	if kind == "RegularExpression" {
		k = ir.Regex
	}
	return ir.NamedMatch{Name: name, StringMatch: ir.StringMatch{Kind: k, Value: value}}, checkRegex(k, value)
}

func duration(d *gwv1.Duration) *time.Duration {
	if d == nil {
		return nil
	}
	v, err := time.ParseDuration(string(*d))
	if err != nil {
		return nil // the CRD's pattern admits durations only
	}
	return &v
}

// backend resolves one backendRef. What cannot be resolved answers its share of requests with 500, of gRPC with 503: clients
// take that as UNAVAILABLE.
func (r *resolver) backend(route Ref, b gwv1.BackendRef, field string) (ir.Backend, []Problem) {
	weight := uint32(1)
	if b.Weight != nil {
		weight = uint32(*b.Weight)
	}
	fail := func(reason, message string) (ir.Backend, []Problem) {
		status, answer := uint32(500), "500"
		if route.Kind == "GRPCRoute" {
			status, answer = 503, "UNAVAILABLE"
		}
		return ir.Backend{Weight: weight, Status: status}, []Problem{{route, -1, resolvedRefs, "False", reason, field + ": " + message + "; its share of requests is answered with " + answer}}
	}
	if text(b.Group) != "" && text(b.Group) != "core" || b.Kind != nil && *b.Kind != "Service" {
		return fail("InvalidKind", fmt.Sprintf("%s %s is no backend: use a Service", text(b.Group), text(b.Kind)))
	}
	key := ir.Key{Namespace: cmp.Or(text(b.Namespace), route.Namespace), Name: string(b.Name)}
	if key.Namespace != route.Namespace && !r.granted(route, key) {
		return fail("RefNotPermitted", fmt.Sprintf("Service %s is in another namespace and no ReferenceGrant there admits %ss of %s", key, route.Kind, route.Namespace))
	}
	if r.services[key] == nil {
		return fail("BackendNotFound", fmt.Sprintf("Service %s does not exist", key))
	}
	if r.snap.Services[key] == nil {
		return fail("UnsupportedValue", fmt.Sprintf("Service %s is an ExternalName: it has no endpoints to send to", key))
	}
	if b.Port == nil || *b.Port == 0 {
		return fail("BackendNotFound", fmt.Sprintf("Service %s: name one of its ports", key))
	}
	port := ir.PortKey{Service: key, Port: uint16(*b.Port)}
	if r.portOf(port) == nil {
		return fail("BackendNotFound", fmt.Sprintf("Service %s has no TCP port %d", key, port.Port))
	}
	return ir.Backend{Weight: weight, Port: port}, nil
}

func (r *resolver) granted(route Ref, to ir.Key) bool {
	for _, g := range r.in.ReferenceGrants {
		if g.Namespace != to.Namespace {
			continue
		}
		from := slices.ContainsFunc(g.Spec.From, func(f gwv1.ReferenceGrantFrom) bool {
			return string(f.Group) == gwv1.GroupName && string(f.Kind) == route.Kind && string(f.Namespace) == route.Namespace
		})
		reached := slices.ContainsFunc(g.Spec.To, func(t gwv1.ReferenceGrantTo) bool {
			return (t.Group == "" || t.Group == "core") && t.Kind == "Service" && (t.Name == nil || string(*t.Name) == to.Name)
		})
		if from && reached {
			return true
		}
	}
	return false
}

// grpcRules compiles a GRPCRoute: a method match is a path match on /service/method.
func (r *resolver) grpcRules(route *gwv1.GRPCRoute, ref Ref) (rules []*ir.Route, problems []Problem) {
	for i, rule := range route.Spec.Rules {
		base := &ir.Route{}
		err := grpcFilters(rule.Filters, base)
		if rule.SessionPersistence != nil {
			err = errors.Join(err, errors.New("sessionPersistence is not supported"))
		}
		if err != nil {
			problems = append(problems, Problem{ref, -1, accepted, "False", "UnsupportedValue", fmt.Sprintf("rules[%d]: %v", i, err)})
			continue
		}
		for j, b := range rule.BackendRefs {
			backend, problem := r.backend(ref, b.BackendRef, fmt.Sprintf("rules[%d].backendRefs[%d]", i, j))
			own := &ir.Route{}
			if err := grpcFilters(b.Filters, own); err != nil {
				problems = append(problems, Problem{ref, -1, accepted, "False", "UnsupportedValue", fmt.Sprintf("rules[%d].backendRefs[%d]: %v", i, j, err)})
			}
			backend.RequestHeaders, backend.ResponseHeaders = own.RequestHeaders, own.ResponseHeaders
			base.Backends = append(base.Backends, backend)
			problems = append(problems, problem...)
		}
		matches := rule.Matches
		if len(matches) == 0 {
			matches = []gwv1.GRPCRouteMatch{{}}
		}
		for j, m := range matches {
			one := *base
			one.Source = fmt.Sprintf("GRPCRoute %s/%s rule %d match %d", ref.Namespace, ref.Name, i, j)
			if err := grpcMatch(m, &one.Match); err != nil {
				problems = append(problems, Problem{ref, -1, accepted, "False", "UnsupportedValue", fmt.Sprintf("rules[%d].matches[%d]: %v", i, j, err)})
				continue
			}
			rules = append(rules, &one)
		}
	}
	return rules, problems
}

func grpcMatch(m gwv1.GRPCRouteMatch, to *ir.RouteMatch) error {
	to.GRPC = true
	var err error
	if to.Path, err = methodMatch(m.Method); err != nil {
		return fmt.Errorf("method: %w", err)
	}
	if m.Method != nil {
		to.Service, to.ServiceMethod = len(text(m.Method.Service)), len(text(m.Method.Method))
	}
	for _, h := range m.Headers {
		if err := addHeader(to, string(h.Name), text(h.Type), h.Value); err != nil {
			return err
		}
	}
	return nil
}

// methodMatch is the match on the path /service/method; nil: any.
func methodMatch(m *gwv1.GRPCMethodMatch) (*ir.StringMatch, error) {
	if m == nil || text(m.Service)+text(m.Method) == "" {
		return nil, nil
	}
	service, method := text(m.Service), text(m.Method)
	if text(m.Type) != "RegularExpression" {
		if err := checkPath("/" + service + "/" + method); err != nil {
			return nil, err
		}
		switch {
		case method == "":
			return &ir.StringMatch{Kind: ir.Prefix, Value: "/" + service + "/"}, nil
		case service == "":
			return &ir.StringMatch{Kind: ir.Regex, Value: "/[^/]+/" + regexp.QuoteMeta(method)}, nil
		}
		return &ir.StringMatch{Kind: ir.Exact, Value: "/" + service + "/" + method}, nil
	}
	whole := ""
	for _, part := range []string{service, method} {
		if part == "" {
			part = "[^/]+"
		}
		// Each stands for itself: neither may close the other's group, nor an alternative of one swallow the other.
		if err := checkRegex(ir.Regex, part); err != nil {
			return nil, err
		}
		whole += "/(?:" + part + ")"
	}
	if err := checkRegex(ir.Regex, whole); err != nil {
		return nil, err
	}
	return &ir.StringMatch{Kind: ir.Regex, Value: whole}, nil
}
