package resolve

import (
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// resolver is the state of one Resolve.
type resolver struct {
	in   Input
	prev *Result
	out  *Result
	snap *ir.Snapshot

	namespaces map[string]*corev1.Namespace
	services   map[ir.Key]*corev1.Service
	// selecting holds the Services with a selector, by namespace and the label pair of it that sorts first.
	selecting map[labelPair][]selecting
	// byNamespace holds the pods that take part: not hostNetwork, not finished.
	byNamespace map[string][]*corev1.Pod
	// contested addresses belong to more than one pod, so nobody has them; the value holds the uids of those that take part.
	contested map[netip.Addr][]string
	config    config
	// blind holds, by policy, ports that carry bytes and have rules about requests.
	blind map[Ref][]uint16
}

// selecting is a Service with its selector compiled.
type selecting struct {
	*corev1.Service
	selector labels.Selector
}

type labelPair struct{ namespace, key, value string }

// servicesOf are the Services that select a pod.
func (r *resolver) servicesOf(p *corev1.Pod) []*corev1.Service {
	var l []*corev1.Service
	for key, value := range p.Labels {
		for _, s := range r.selecting[labelPair{p.Namespace, key, value}] {
			if s.selector.Matches(labels.Set(p.Labels)) {
				l = append(l, s.Service)
			}
		}
	}
	return l
}

// Resolve makes the next snapshot. prev is the result before, or nil: what did not change is taken over by pointer, and a
// policy that cannot be compiled keeps its last good form.
func Resolve(prev *Result, in Input) *Result {
	if prev == nil {
		prev = &Result{Snapshot: &ir.Snapshot{}}
	}
	r := &resolver{
		in: in, prev: prev,
		out:         &Result{Good: map[string]Good{}},
		snap:        &ir.Snapshot{Policies: map[string]*ir.InboundPolicy{}},
		namespaces:  map[string]*corev1.Namespace{},
		services:    map[ir.Key]*corev1.Service{},
		selecting:   map[labelPair][]selecting{},
		byNamespace: map[string][]*corev1.Pod{},
		contested:   map[netip.Addr][]string{},
		blind:       map[Ref][]uint16{},
	}
	r.out.Snapshot = r.snap
	for _, n := range in.Namespaces {
		r.namespaces[n.Name] = n
	}
	for _, s := range in.Services {
		r.services[ir.Key{Namespace: s.Namespace, Name: s.Name}] = s
		if len(s.Spec.Selector) > 0 {
			key := slices.Min(slices.Collect(maps.Keys(s.Spec.Selector)))
			pair := labelPair{s.Namespace, key, s.Spec.Selector[key]}
			r.selecting[pair] = append(r.selecting[pair], selecting{s, labels.SelectorFromSet(s.Spec.Selector)})
		}
	}
	r.readConfig()
	r.resolveNamespaces()
	r.resolvePods()
	r.resolveServices()
	r.resolveRoutes()
	r.resolvePolicies()
	r.resolveEndpoints()
	r.needs()
	r.reuse()
	slices.SortFunc(r.out.Problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Object.Kind, b.Object.Kind), cmp.Compare(a.Object.Namespace, b.Object.Namespace), cmp.Compare(a.Object.Name, b.Object.Name),
			cmp.Compare(a.Parent, b.Parent), cmp.Compare(a.Type, b.Type), cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.Message, b.Message))
	})
	r.out.Problems = slices.Compact(r.out.Problems)
	return r.out
}

func (r *resolver) problem(p Problem) { r.out.Problems = append(r.out.Problems, p) }

// needs lets service ports pass that no mesh feature needs: traffic to them is not captured and costs nothing.
func (r *resolver) needs() {
	for _, s := range r.snap.Services {
		for _, p := range s.Ports {
			needed := len(p.Routes) > 0
			for _, e := range p.Endpoints {
				needed = needed || e.Transport != ir.Plain
			}
			p.Pass = !needed
		}
	}
}

// reuse takes what did not change from the snapshot before, so that equal pointers mean equal content.
func (r *resolver) reuse() {
	old := r.prev.Snapshot
	reuseMap(r.snap.Namespaces, old.Namespaces)
	reuseMap(r.snap.Pods, old.Pods)
	reuseMap(r.snap.Policies, old.Policies)
	for key, s := range r.snap.Services {
		before := old.Services[key]
		if before == nil {
			continue
		}
		for i, p := range s.Ports {
			for _, q := range before.Ports {
				if p.Key == q.Key && reflect.DeepEqual(p, q) {
					s.Ports[i] = q
				}
			}
		}
		if reflect.DeepEqual(s, before) {
			r.snap.Services[key] = before
		}
	}
}

func reuseMap[K comparable, V any](now, before map[K]*V) {
	for k, v := range now {
		if old := before[k]; old != nil && reflect.DeepEqual(v, old) {
			now[k] = old
		}
	}
}
