package agent

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"sync"

	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/redirect"
)

// apply puts a change of the index into force; the controller's answer waits for it.
func (a *agent) apply(ctx context.Context, typeURL string) error {
	if slices.Contains(ofNode, typeURL) {
		a.save(ownFile)
	}
	switch typeURL {
	case relay.TypeMesh:
		if m := a.upstream.Mesh(); m != nil {
			return errors.Join(a.kernel.SetConnectionsPerPod(m.ConnectionsPerPod), a.kernel.SetClientAddress(m.OwnClientAddress))
		}
	case relay.TypeService:
		return a.applyServices(ctx)
	case relay.TypeWorkload:
		return a.applyWorkloads()
	case relay.TypeLocalPod:
		hashes, now := map[string]bool{}, map[string]any{}
		for _, p := range a.upstream.LocalPods() {
			if p.InboundPolicy != "" {
				hashes[p.InboundPolicy] = true
			}
			now[p.Uid] = p
		}
		a.upstream.WantPolicies(hashes)
		a.wished.take(now, a.enroller.Changed)
	case relay.TypeInboundPolicy:
		now := map[string]any{}
		for _, p := range a.upstream.LocalPods() {
			now[p.Uid] = a.upstream.Policy(p.InboundPolicy)
		}
		a.policies.take(now, a.enroller.Changed)
	}
	return nil
}

// seen is what was looked at last, by a pod's uid: an object that has come since is another one, whatever is in it.
type seen struct {
	mu   sync.Mutex
	last map[string]any
}

// take calls changed for every pod about which something has come, changed or gone.
func (s *seen) take(now map[string]any, changed func(uid string)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for uid, object := range now {
		if s.last[uid] != object {
			changed(uid)
		}
	}
	for uid := range s.last {
		if _, still := now[uid]; !still {
			changed(uid)
		}
	}
	s.last = now
}

// applyRestored puts the last known index into force while no controller answers.
func (a *agent) applyRestored(ctx context.Context) {
	select {
	case <-a.upstream.Synced():
		return
	default:
	}
	for _, typeURL := range []string{relay.TypeWorkload, relay.TypeService} {
		if err := a.apply(ctx, typeURL); err != nil && ctx.Err() == nil {
			a.config.Log.Warn("last known state is not in force", "type", typeURL, "error", err)
		}
	}
}

// look lets every pod be compared with what is wanted.
func (a *agent) look() {
	for _, p := range a.table.All() {
		a.enroller.Changed(p.UID)
	}
}

// applyServices keeps the order: a service is captured only after Envoy has its scope, and its scope goes after that.
func (a *agent) applyServices(ctx context.Context) error {
	a.applied.Lock()
	defer a.applied.Unlock()
	services := a.upstream.Services()
	versions, err := a.giveScopes(services)
	if err != nil {
		return err
	}
	scopes, err := a.refusedScopes(ctx, versions)
	if err != nil {
		return err
	}
	now := captured(services, func(at netip.AddrPort) bool {
		_, without := scopes[names.Scope(at)]
		return !without || a.captures[at] // one that had its scope before has it still
	})
	refused, err := a.kernel.SetServices(now)
	if err != nil {
		return fmt.Errorf("capture services: %w", err)
	}
	a.captures = map[netip.AddrPort]bool{}
	for _, s := range now {
		a.captures[s.Addr] = true
	}
	for _, r := range refused {
		a.config.Log.Error("service is not captured", "address", r.Addr, "reason", r.Reason)
	}
	// A port that is no HTTP port any more may still have connections whose requests look for its routes.
	held := map[string]bool{}
	for at := range ports(services) {
		held[names.Scope(at)] = true
	}
	for _, name := range a.cache.Names(relay.TypeScope, "") {
		k := relay.Key{TypeURL: relay.TypeScope, Name: name}
		if _, current := versions[k]; !current && !held[name] {
			a.cache.Delete(k)
		}
	}
	return refusals(services, scopes)
}

// refusedScopes waits for Envoy's answer to scopes, and returns what it said against any, by name.
func (a *agent) refusedScopes(ctx context.Context, versions map[relay.Key]string) (map[string]string, error) {
	scopes := map[string]string{}
	// Envoy asks for scopes when it has its first outbound listener: before that there is nobody to capture.
	if !a.cache.Subscribed(relay.TypeScope) {
		return scopes, nil
	}
	for k, version := range versions {
		var refused *relay.Refused
		if err := a.cache.Wait(ctx, k, version); errors.As(err, &refused) {
			scopes[k.Name] = refused.Text
		} else if err != nil {
			return nil, err
		}
	}
	return scopes, nil
}

// refusals names the services whose scopes Envoy refused; nil: there are none.
func refusals(services []*meshv1.Service, scopes map[string]string) error {
	out := relay.Refusals{}
	for _, s := range services {
		for at := range ports([]*meshv1.Service{s}) {
			if text, refused := scopes[names.Scope(at)]; refused {
				out[s.Namespace+"/"+s.Name] = "Envoy refused the scope of " + at.String() + ": " + text
			}
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

// giveScopes gives Envoy the scopes of services and returns their versions.
func (a *agent) giveScopes(services []*meshv1.Service) (map[relay.Key]string, error) {
	versions := map[relay.Key]string{}
	for _, s := range lds.Scopes(services) {
		version, err := a.cache.Set(s.Name, s)
		if err != nil {
			return nil, err
		}
		versions[relay.Key{TypeURL: relay.TypeScope, Name: s.Name}] = version
	}
	return versions, nil
}

var classes = map[meshv1.Class]redirect.Class{
	meshv1.Class_CLASS_HTTP: redirect.ClassHTTP, meshv1.Class_CLASS_TCP: redirect.ClassTCP, meshv1.Class_CLASS_AUTO: redirect.ClassAuto,
}

// captured are the service ports that the kernel is to capture, as far as they may be.
func captured(services []*meshv1.Service, may func(netip.AddrPort) bool) []redirect.Service {
	var out []redirect.Service
	seen := map[netip.AddrPort]bool{}
	for at, p := range ports(services) {
		if class, ok := classes[p.Class]; ok && !p.Pass && !seen[at] && may(at) {
			seen[at] = true
			out = append(out, redirect.Service{Addr: at, Class: class})
		}
	}
	return out
}

// ports are all service ports at all their addresses, in order.
func ports(services []*meshv1.Service) iter.Seq2[netip.AddrPort, *meshv1.ServicePort] {
	return func(yield func(netip.AddrPort, *meshv1.ServicePort) bool) {
		for _, s := range services {
			for _, raw := range s.Addresses {
				address, ok := netip.AddrFromSlice(raw)
				if !ok {
					continue
				}
				for _, p := range s.Ports {
					if !yield(netip.AddrPortFrom(address.Unmap(), uint16(p.Port)), p) {
						return
					}
				}
			}
		}
	}
}

func (a *agent) applyWorkloads() error {
	a.applied.Lock()
	defer a.applied.Unlock()
	left, err := a.kernel.SetAddresses(a.upstream.Captured())
	if err != nil {
		return fmt.Errorf("capture pod addresses: %w", err)
	}
	if len(left) > 0 {
		a.config.Log.Error("pod addresses are not captured: the map is full", "count", len(left))
	}
	return nil
}

// instead is what Envoy gets where the controller is away. A cluster that does not come is refused by Envoy itself, in time.
func (a *agent) instead(k relay.Key) *anypb.Any {
	if k.TypeURL != relay.TypeRoute {
		return nil
	}
	body, _, err := relay.Pack(lds.Away(k.Name))
	if err != nil {
		a.config.Log.Error("answer for the controller", "name", k.Name, "error", err)
		return nil
	}
	return body
}

// overlay is the node's view of endpoints: under internalTrafficPolicy Local only its own.
func overlay(node string) func(relay.Key, *anypb.Any) *anypb.Any {
	return func(k relay.Key, body *anypb.Any) *anypb.Any {
		if k.TypeURL != relay.TypeEndpoints {
			return body
		}
		var load endpoint.ClusterLoadAssignment
		if err := proto.Unmarshal(body.Value, &load); err != nil {
			return body
		}
		if !lds.LocalOnly(&load, node) {
			return body
		}
		packed, _, err := relay.Pack(&load)
		if err != nil {
			return body
		}
		return packed
	}
}

// collector gives the kernel's counters as metrics.
type collector struct{ agent *agent }

var (
	hookEvents  = prometheus.NewDesc("weft_redirect_events_total", "What the hooks did, by kind.", []string{"kind"}, nil)
	proxyUp     = prometheus.NewDesc("weft_proxy_up", "1 while Envoy serves.", nil, nil)
	proxyDied   = prometheus.NewDesc("weft_proxy_restarts_total", "Restarts of Envoy since its supervisor started.", nil, nil)
	noProbes    = prometheus.NewDesc("weft_probes_refused", "1 while kubelet's probes do not pass Strict pods, for its cgroup is not its own or not there.", nil, nil)
	preexisting = prometheus.NewDesc("weft_preexisting_connections", "Connections that the node's pods had when they were captured first: these stay outside the mesh until they end.", nil, nil)
	unheld      = prometheus.NewDesc("weft_started_unheld_pods", "Pods in the mesh that ran before they were in it, for nothing held them.", nil, nil)
)

func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{hookEvents, proxyUp, proxyDied, noProbes, preexisting, unheld} {
		out <- d
	}
}

func (c *collector) Collect(out chan<- prometheus.Metric) {
	counters, err := c.agent.kernel.Counters()
	if err == nil {
		for kind, n := range counters {
			out <- prometheus.MustNewConstMetric(hookEvents, prometheus.CounterValue, float64(n), kind)
		}
	}
	up := 0.0
	if _, live := c.agent.generation(); live {
		up = 1
	}
	out <- prometheus.MustNewConstMetric(proxyUp, prometheus.GaugeValue, up)
	refused := 0.0
	if c.agent.kernel.ProbesRefused() != nil {
		refused = 1
	}
	out <- prometheus.MustNewConstMetric(noProbes, prometheus.GaugeValue, refused)
	out <- prometheus.MustNewConstMetric(preexisting, prometheus.GaugeValue, float64(c.agent.reporter.Preexisting()))
	out <- prometheus.MustNewConstMetric(unheld, prometheus.GaugeValue, float64(c.agent.reporter.Unheld()))
	_, s := c.agent.proxies.serving()
	out <- prometheus.MustNewConstMetric(proxyDied, prometheus.CounterValue, float64(s.Restarts))
}
