package main

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weftmesh/weft/test/kube"
	"github.com/weftmesh/weft/test/load"
)

// parsed lets everybody in, and lets the callees' Envoys log each request with the certificate that came with it.
const parsed = `
apiVersion: weft.dev/v1alpha1
kind: AccessPolicy
metadata: {name: parsed, namespace: shop}
spec:
  selector: {matchLabels: {app: catalogue}}
  rules: [{to: [{methods: [GET]}]}]
`

// client is a way of using connections. Its requests carry its path, so that the callee's log tells them apart.
type client struct {
	title, target, path string
	persistent          bool
}

var clients = []client{
	{"persistent connections, older than the mesh", "catalogue-kept", "/kept", true},
	{"100 requests per connection", "catalogue-100", "/100", false},
	{"20 requests per connection", "catalogue-20", "/20", false},
	{"one request per connection", "catalogue-one", "/one", false},
}

// unharmed checks that the pods and their connections are those of before, and counts by client what is encrypted now.
func (d *demo) unharmed(ctx context.Context) error {
	if err := d.samePods(ctx); err != nil {
		return err
	}
	if err := d.cluster.Apply(ctx, parsed); err != nil {
		return err
	}
	if _, err := d.cluster.Kubectl(ctx, "wait", "-n", "shop", "accesspolicy/parsed", "--for=condition=Programmed", "--timeout=60s"); err != nil {
		return err
	}
	if _, err := d.load.Fresh(ctx); err != nil {
		return err
	}
	from := d.load.ByPod()
	if err := d.moreRequests(ctx, 3000); err != nil {
		return err
	}
	all, err := d.load.Fresh(ctx)
	if err != nil {
		return err
	}
	if err := d.noLoss(all); err != nil {
		return err
	}
	d.say("requests since then, and what the callees' Envoys and apps saw of them:")
	to := d.load.ByPod()
	for _, c := range clients {
		if err := d.classify(ctx, c, from, to); err != nil {
			return err
		}
	}
	return d.streams(from, to)
}

// encrypted is how many requests came with a certificate, without one, and past the callee's Envoy.
type encrypted struct{ secure, plain, past uint64 }

func (e encrypted) share() float64 {
	return 100 * float64(e.secure) / float64(max(1, e.secure+e.plain+e.past))
}

func (d *demo) classify(ctx context.Context, c client, from, to map[string]map[string]load.Stats) error {
	var requests, anew, proxied uint64
	var e encrypted
	for pod, targets := range to {
		s := kube.Between(from[pod][c.target], targets[c.target])
		requests, anew, proxied, e.past = requests+s.Requests, anew+s.Connections, proxied+s.Proxied, e.past+s.Direct
	}
	// Envoy writes its log once a second. What began just before the first counters or ended after the last is not in both.
	err := kube.Until(ctx, 30*time.Second, "the access log", d.progress("log"), func(context.Context) (bool, string) {
		e.secure, e.plain = d.logged(c.path, from, to, c.target)
		return (e.secure+e.plain)*100 >= proxied*95, fmt.Sprintf("%d of %d requests to %s", e.secure+e.plain, proxied, c.path)
	})
	if err != nil {
		return err
	}
	d.say("  %-45s %6d requests, %5.1f %% under mTLS, %d new connections", c.title, requests, e.share(), anew)
	if c.persistent {
		return expect(anew == 0 && e.secure == 0 && e.past > 0, "%s: %d connections were made anew, the old ones should have lived on", c.title, anew)
	}
	return expect(e.share() > 99, "%s: only %.1f %% of the requests were under mTLS", c.title, e.share())
}

// logged counts the load pods' requests of a path that began between two readings of their counters.
func (d *demo) logged(path string, from, to map[string]map[string]load.Stats, target string) (secure, plain uint64) {
	pods := map[netip.Addr]string{}
	for name := range to {
		for _, a := range d.before[name].IPs {
			pods[netip.MustParseAddr(a)] = name
		}
	}
	for _, m := range d.log.Heard() {
		pod, ok := pods[m.Caller]
		if !ok || m.Path != path || m.At.Before(from[pod][target].At) || m.At.After(to[pod][target].At) {
			continue
		}
		if m.Secure() {
			secure++
		} else {
			plain++
		}
	}
	return secure, plain
}

// streams checks the streams and pipelines that were open before the mesh came.
func (d *demo) streams(from, to map[string]map[string]load.Stats) error {
	for _, target := range []string{"stream-kept", "unary-kept", "redis-kept"} {
		var requests, anew uint64
		for pod, targets := range to {
			s := kube.Between(from[pod][target], targets[target])
			requests, anew = requests+s.Requests, anew+s.Connections
		}
		d.say("  %-45s %6d requests, %d new connections", "persistent: "+target, requests, anew)
		if err := expect(anew == 0 && requests > 0, "%s: %d connections were made anew, the old ones should have lived on", target, anew); err != nil {
			return err
		}
	}
	return nil
}

// identities lists who met whom, by the certificates that the callees' Envoys saw.
func (d *demo) identities(context.Context) error {
	pairs := map[string]int{}
	for _, m := range d.log.Heard() {
		if m.Secure() {
			pairs[m.Peer+" → "+m.Local]++
		}
	}
	names := slices.Sorted(maps.Keys(pairs))
	for _, p := range names {
		d.say("%6d  %s", pairs[p], p)
	}
	for _, want := range []string{"/sa/load → ", "/sa/front → "} {
		if err := expect(strings.Contains(strings.Join(names, "\n"), want), "no connection of %q was seen under mTLS", want); err != nil {
			return err
		}
	}
	return nil
}

// probePeriods is beyond kubelet's failure threshold of 3: a pod whose probes failed would not be ready any more.
const probePeriods = 5

var probeCount = regexp.MustCompile(`(?m)^weft_redirect_events_total\{kind="probe"\} (\S+)$`)

// probed waits until each node's kernel has let enough of kubelet's probes through for a failure to show.
func (d *demo) probed(ctx context.Context) error {
	pods, err := d.cluster.Pods(ctx, system, "app=weft-nodeproxy")
	if err != nil {
		return err
	}
	here := map[string]int{}
	for _, p := range d.before {
		if p.Labels["app"] != "load" {
			here[p.Node]++
		}
	}
	for _, p := range pods {
		first := -1.0
		err := kube.Until(ctx, 2*time.Minute, "kubelet's probes on "+p.Node, d.progress("probes"), func(ctx context.Context) (bool, string) {
			raw, err := d.cluster.Kubectl(ctx, "get", "--raw", "/api/v1/namespaces/"+system+"/pods/"+p.Name+":15021/proxy/metrics")
			if err != nil {
				return false, err.Error()
			}
			found := probeCount.FindStringSubmatch(raw)
			if found == nil {
				return false, "no counter of probes"
			}
			now, err := strconv.ParseFloat(found[1], 64)
			if err != nil {
				return false, err.Error()
			}
			if first < 0 {
				first = now
			}
			want := float64(probePeriods * here[p.Node])
			return now-first >= want, fmt.Sprintf("%.0f of %.0f passed", now-first, want)
		})
		if err != nil {
			return err
		}
		d.say("%s: %d more of kubelet's probes of %d pods passed", p.Node, probePeriods*here[p.Node], here[p.Node])
	}
	return nil
}
