package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/weftmesh/weft/test/kube"
	"github.com/weftmesh/weft/test/load"
)

const (
	enrolled = "weft.dev/Enrolled"
	enforced = "weft.dev/Enforced"
	system   = "weft-system"
)

func (d *demo) deploy(ctx context.Context) error {
	// What an earlier run left would hide what this one shows.
	d.progress("shop")("removing what an earlier run left")
	if _, err := d.cluster.Kubectl(ctx, "delete", "namespace", "shop", "outside", "--ignore-not-found"); err != nil {
		return err
	}
	if _, err := d.cluster.Helm(ctx, "uninstall", "weft", "-n", system, "--ignore-not-found", "--wait"); err != nil {
		return err
	}
	for _, f := range []string{"shop.yaml", "load.yaml"} {
		if f == "load.yaml" {
			if err := d.cluster.UntilReady(ctx, 2*time.Minute, "shop", "", d.progress("shop")); err != nil {
				return err
			}
		}
		if err := d.cluster.ApplyFile(ctx, filepath.Join(d.root, "examples/shop", f)); err != nil {
			return err
		}
	}
	if err := d.cluster.UntilReady(ctx, 2*time.Minute, "shop", "", d.progress("load")); err != nil {
		return err
	}
	var err error
	if d.load, err = d.cluster.Follow(ctx, "shop", "app=load"); err != nil {
		return err
	}
	err = kube.Until(ctx, time.Minute, "steady load", d.progress("load"), func(context.Context) (bool, string) {
		s := load.Sum(d.load.ByTarget())
		return s.Requests > 1000, fmt.Sprintf("%d requests", s.Requests)
	})
	if err != nil {
		return err
	}
	pods, err := d.cluster.Pods(ctx, "shop", "")
	if err != nil {
		return err
	}
	d.before = map[string]kube.Pod{}
	nodes := map[string]int{}
	for _, p := range pods {
		d.before[p.Name] = p
		nodes[p.Node]++
	}
	s := load.Sum(d.load.ByTarget())
	d.say("%d pods on %d nodes; %d requests so far, %d failed", len(pods), len(nodes), s.Requests, s.Failed)
	return expect(s.Failed == 0 && s.Broken == 0, "%d requests failed before weft was there: %v", s.Failed, s.Errors)
}

func (d *demo) install(ctx context.Context) error {
	values := filepath.Join(d.root, "test/cluster/values.yaml")
	if _, err := d.cluster.Helm(ctx, "upgrade", "--install", "weft-crds", filepath.Join(d.root, "charts/weft-crds")); err != nil {
		return err
	}
	if _, err := d.cluster.Helm(ctx, "upgrade", "--install", "weft", filepath.Join(d.root, "charts/weft"), "-n", system, "--create-namespace",
		"-f", values, "--set", "host.cgroup="+d.cluster.HostCgroup, "--set", "nodeproxy.accessLog=true"); err != nil {
		return err
	}
	if err := d.cluster.UntilReady(ctx, 3*time.Minute, system, "", d.progress("weft")); err != nil {
		return err
	}
	if err := d.cluster.Apply(ctx, kube.OwnClientAddress); err != nil {
		return err
	}
	d.say("weft-controlplane and one weft-nodeproxy on each node are ready")
	var err error
	d.log, err = d.cluster.FollowAccessLogs(ctx, system)
	return err
}

func (d *demo) enrol(ctx context.Context) error {
	started := time.Now()
	if _, err := d.cluster.Kubectl(ctx, "label", "namespace", "shop", "weft.dev/mesh=enabled", "--overwrite"); err != nil {
		return err
	}
	for _, condition := range []string{enrolled, enforced} {
		if err := d.cluster.UntilCondition(ctx, time.Minute, "shop", "", condition, "True", d.progress(condition)); err != nil {
			return err
		}
	}
	d.say("all pods of the namespace are in the mesh after %.1f s", time.Since(started).Seconds())
	return nil
}

// samePods checks that every pod of the shop is the one it was, never restarted.
func (d *demo) samePods(ctx context.Context) error {
	pods, err := d.cluster.Pods(ctx, "shop", "")
	if err != nil {
		return err
	}
	same := 0
	for _, p := range pods {
		was, ok := d.before[p.Name]
		if !ok || was.UID != p.UID || was.Restarts != p.Restarts || !p.Ready {
			return fmt.Errorf("pod %s is not as it was: uid %s → %s, restarts %d → %d, ready %v", p.Name, was.UID, p.UID, was.Restarts, p.Restarts, p.Ready)
		}
		same++
	}
	d.say("%d pods: same uids, same restart counts, all ready", same)
	return expect(same == len(d.before), "%d pods are gone", len(d.before)-same)
}

func (d *demo) noLoss(stats map[string]load.Stats) error {
	s := load.Sum(stats)
	d.say("%d requests, %d failed; %d connections, %d broken", s.Requests, s.Failed, s.Connections, s.Broken)
	return expect(s.Failed == 0 && s.Broken == 0, "%d requests failed and %d connections broke: %s", s.Failed, s.Broken, strings.Join(s.Errors, "\n"))
}

func (d *demo) moreRequests(ctx context.Context, n uint64) error {
	from := load.Sum(d.load.ByTarget()).Requests
	return kube.Until(ctx, 2*time.Minute, "traffic", d.progress("traffic"), func(context.Context) (bool, string) {
		s := load.Sum(d.load.ByTarget())
		return s.Requests-from >= n, fmt.Sprintf("%d of %d requests, %d failed", s.Requests-from, n, s.Failed)
	})
}

const route = `
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: catalogue, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: catalogue, port: 80}]
  rules:
    - backendRefs:
        - {name: catalogue-v1, port: 80, weight: 90}
        - {name: catalogue-v2, port: 80, weight: 10}
`

func (d *demo) split(ctx context.Context) error {
	if err := d.cluster.Apply(ctx, route); err != nil {
		return err
	}
	err := kube.Until(ctx, 30*time.Second, "version 2 to answer", d.progress("route"), func(context.Context) (bool, string) {
		v := load.Sum(d.load.ByTarget()).Versions
		return v["v2"] > 0, fmt.Sprint(v)
	})
	if err != nil {
		return err
	}
	from, err := d.load.Fresh(ctx)
	if err != nil {
		return err
	}
	if err := d.moreRequests(ctx, 10000); err != nil {
		return err
	}
	to, err := d.load.Fresh(ctx)
	if err != nil {
		return err
	}
	v1, v2 := uint64(0), uint64(0)
	for _, target := range []string{"catalogue-100", "catalogue-one"} {
		s := kube.Between(from[target], to[target])
		v1, v2 = v1+s.Versions["v1"], v2+s.Versions["v2"]
	}
	part := 100 * float64(v2) / float64(max(1, v1+v2))
	d.say("of %d requests %.1f %% were answered by version 2", v1+v2, part)
	if err := expect(part > 6 && part < 14, "version 2 answered %.1f %%, want about 10 %%", part); err != nil {
		return err
	}
	return d.noLoss(to)
}

const denyLoad = `
apiVersion: weft.dev/v1alpha1
kind: AccessPolicy
metadata: {name: no-strangers, namespace: shop}
spec:
  action: Deny
  targetRefs: [{group: "", kind: Service, name: front}]
  rules:
    - from: [{serviceAccounts: [{name: visitor}]}]
      to: [{paths: [{type: Prefix, value: /}]}]
`

const visitor = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: visitor, namespace: shop}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: visitor, namespace: shop}
spec:
  selector: {matchLabels: {app: visitor}}
  template:
    metadata: {labels: {app: visitor}}
    spec:
      serviceAccountName: visitor
      terminationGracePeriodSeconds: 2
      containers:
        - name: visitor
          image: weft.dev/test-load:dev
          env:
            - name: LOAD_TARGETS
              value: '[{"name": "front", "kind": "http-100", "address": "front:80", "count": 1, "pause": "50ms"}]'
`

func (d *demo) deny(ctx context.Context) error {
	if err := d.cluster.Apply(ctx, visitor); err != nil {
		return err
	}
	if err := d.cluster.UntilCondition(ctx, time.Minute, "shop", "app=visitor", enforced, "True", d.progress("visitor")); err != nil {
		return err
	}
	w, err := d.cluster.Follow(ctx, "shop", "app=visitor")
	if err != nil {
		return err
	}
	defer w.Stop()
	if err := d.cluster.Apply(ctx, denyLoad); err != nil {
		return err
	}
	if _, err := d.cluster.Kubectl(ctx, "wait", "-n", "shop", "accesspolicy/no-strangers", "--for=condition=Programmed", "--timeout=60s"); err != nil {
		return err
	}
	err = kube.Until(ctx, 30*time.Second, "403 on every node", d.progress("visitor"), func(context.Context) (bool, string) {
		refused, pods := 0, w.ByPod()
		for _, s := range pods {
			if s["front"].Statuses["403"] > 20 {
				refused++
			}
		}
		return refused == len(pods), fmt.Sprintf("%d of %d visitors are refused", refused, len(pods))
	})
	if err != nil {
		return err
	}
	from, err := w.Fresh(ctx)
	if err != nil {
		return err
	}
	if err := d.moreRequests(ctx, 1000); err != nil {
		return err
	}
	to, err := w.Fresh(ctx)
	if err != nil {
		return err
	}
	s := kube.Between(from["front"], to["front"])
	d.say("the visitor's last %d requests: %d answered 200, %d answered 403", s.Requests+s.Failed, s.Statuses["200"], s.Statuses["403"])
	if err := expect(s.Statuses["200"] == 0 && s.Statuses["403"] > 0, "the visitor still got through: %v", s.Statuses); err != nil {
		return err
	}
	// A port with an identity rule takes no caller without one; the next step needs a port that still does.
	for _, m := range []string{visitor, denyLoad} {
		if err := d.cluster.Delete(ctx, m); err != nil {
			return err
		}
	}
	all, err := d.load.Fresh(ctx)
	if err != nil {
		return err
	}
	return d.noLoss(all)
}

const strictShop = `
apiVersion: weft.dev/v1alpha1
kind: AuthenticationPolicy
metadata: {name: strict, namespace: shop}
spec:
  mtls: {mode: Strict}
`

const stranger = `
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: stranger, namespace: outside}
spec:
  selector: {matchLabels: {app: stranger}}
  template:
    metadata: {labels: {app: stranger}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
        - name: stranger
          image: weft.dev/test-load:dev
          args: [-timeout=2s]
          env:
            - name: LOAD_TARGETS
              value: '[{"name": "front", "kind": "http-new", "address": "front.shop:80", "count": 1, "pause": "50ms"}]'
`

func (d *demo) strict(ctx context.Context) error {
	if err := d.cluster.Apply(ctx, stranger); err != nil {
		return err
	}
	if err := d.cluster.UntilReady(ctx, time.Minute, "outside", "", d.progress("stranger")); err != nil {
		return err
	}
	w, err := d.cluster.Follow(ctx, "outside", "app=stranger")
	if err != nil {
		return err
	}
	defer w.Stop()
	err = kube.Until(ctx, 30*time.Second, "the stranger's requests", d.progress("stranger"), func(context.Context) (bool, string) {
		s := w.ByTarget()["front"]
		return s.Requests > 20, fmt.Sprintf("%d answered", s.Requests)
	})
	if err != nil {
		return err
	}
	if err := d.cluster.Apply(ctx, strictShop); err != nil {
		return err
	}
	err = kube.Until(ctx, 30*time.Second, "the stranger to be refused", d.progress("stranger"), func(ctx context.Context) (bool, string) {
		from, err := w.Fresh(ctx)
		if err != nil {
			return false, err.Error()
		}
		to, err := w.Fresh(ctx)
		if err != nil {
			return false, err.Error()
		}
		s := kube.Between(from["front"], to["front"])
		return s.Requests == 0 && s.Failed > 0, fmt.Sprintf("%d answered, %d refused", s.Requests, s.Failed)
	})
	if err != nil {
		return err
	}
	d.say("the plaintext caller gets nothing any more")
	if err := d.probed(ctx); err != nil {
		return err
	}
	if err := d.samePods(ctx); err != nil {
		return err
	}
	if err := d.cluster.Delete(ctx, stranger); err != nil {
		return err
	}
	all, err := d.load.Fresh(ctx)
	if err != nil {
		return err
	}
	return d.noLoss(all)
}

func (d *demo) withdraw(ctx context.Context) error {
	for _, m := range []string{strictShop, route, parsed} {
		if err := d.cluster.Delete(ctx, m); err != nil {
			return err
		}
	}
	if _, err := d.cluster.Kubectl(ctx, "label", "namespace", "shop", "weft.dev/mesh-"); err != nil {
		return err
	}
	if err := d.cluster.UntilCondition(ctx, time.Minute, "shop", "", enrolled, "False", d.progress("withdrawal")); err != nil {
		return err
	}
	from, err := d.load.Fresh(ctx)
	if err != nil {
		return err
	}
	if err := d.moreRequests(ctx, 3000); err != nil {
		return err
	}
	to, err := d.load.Fresh(ctx)
	if err != nil {
		return err
	}
	s := kube.Between(from["catalogue-one"], to["catalogue-one"])
	d.say("new connections go straight to the apps again: %d requests, %d of them through Envoy", s.Requests, s.Proxied)
	if err := expect(s.Proxied == 0, "%d requests still went through Envoy", s.Proxied); err != nil {
		return err
	}
	if err := d.samePods(ctx); err != nil {
		return err
	}
	return d.noLoss(to)
}
