//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
)

var (
	upgrades   = flag.Int("upgrades", 2, "helm upgrades under load (make soak: 50)")
	otherEnvoy = flag.Bool("other", false, "begin with nodeproxy:other, an image with the version of Envoy before")
)

// endless are clients of the shop's load that never let go of a connection that nothing can tell to end: raw TCP, and streams.
var endless = regexp.MustCompile(`(?m)^.*"name": "(redis|stream)-kept".*\n`)

// newDrainedShop is the shop under load, without connections that outlive a drain.
func newDrainedShop(t *testing.T) shop {
	t.Helper()
	text := example(t, "load.yaml")
	if n := len(endless.FindAllString(text, -1)); n != 2 {
		t.Fatalf("%d endless clients in the shop's load, want 2", n)
	}
	return newShopWith(t, "shop", "load", endless.ReplaceAllString(text, ""))
}

// upgrade is helm upgrade with other values, until every node has a new pod of weft's and the old ones have ended.
func upgrade(ctx context.Context, values ...string) (took time.Duration, err error) {
	before := map[string]bool{}
	old, err := k8s.Pods(ctx, system, "app=weft-nodeproxy")
	if err != nil {
		return 0, err
	}
	for _, p := range old {
		before[p.Name] = true
	}
	began := time.Now()
	if err := install(ctx, values...); err != nil {
		return 0, err
	}
	err = kube.Until(ctx, 5*time.Minute, "every node to have a new pod, and it alone", nil, func(ctx context.Context) (bool, string) {
		now, err := k8s.Pods(ctx, system, "app=weft-nodeproxy")
		for _, p := range now {
			if before[p.Name] || !p.Ready || p.Deleting {
				return false, fmt.Sprintf("%s on %s: old %t, ready %t, deleting %t", p.Name, p.Node, before[p.Name], p.Ready, p.Deleting)
			}
		}
		return err == nil && len(now) == len(before), fmt.Sprintf("%d pods, %v", len(now), err)
	})
	return time.Since(began), err
}

// generationsOn are the folders of Envoy's generations on a node.
func generationsOn(t *testing.T, node string) string {
	t.Helper()
	found, err := filepath.Glob(fmt.Sprintf("/proc/%d/root/run/weft/generation-*", machine(t, node).PID))
	if err != nil {
		t.Fatal(err)
	}
	for i := range found {
		found[i] = filepath.Base(found[i])
	}
	return strings.Join(found, " ")
}

// envoyVersion is the version of a node's Envoy.
func envoyVersion(t *testing.T, node string) string {
	t.Helper()
	var info struct{ Version string }
	if err := json.Unmarshal([]byte(admin(t, node, "/server_info")), &info); err != nil {
		t.Fatal(err)
	}
	return info.Version
}

// unsettled leaves connections on their way no time to arrive. With linger as it is no loss was seen in 40 cycles: listeners stay for
// the connections that are counted.
var unsettled = []string{"--set", "nodeproxy.settle=0ms", "--set", "nodeproxy.linger=0ms"}

// TestUpgrade: helm upgrade replaces weft's pods on every node, agent and Envoy, under load: with -other the first time from another version of Envoy. New
// connections go to the next Envoy, the one before serves what it has to its end. Between the first two SVIDs live for a minute, and
// the root changes: TestRotations is the long form.
//
// In the end it is shown that such load sees losses: the last upgrade takes the time away in which connections on their way may arrive.
func TestUpgrade(t *testing.T) {
	if len(readAuthority(t).roots(t)) > 1 {
		beginAnew(t) // an earlier run has left a change of root under way
	}
	if *otherEnvoy {
		if _, err := upgrade(t.Context(), append([]string{"--set", "nodeproxy.image=weft.dev/nodeproxy:other"}, shortLived...)...); err != nil {
			t.Fatal(err)
		}
	} else if err := install(t.Context(), shortLived...); err != nil { // the next agents ask controllers that know
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if _, err := upgrade(ctx); err != nil {
			t.Error(err)
		}
	})
	s := newDrainedShop(t)
	if n, lost := s.hurried(2); lost.Failed+lost.Broken > 0 {
		t.Fatalf("with the default settle time: lost something in cycle %d: %v", n, lost.Errors)
	}
	enrolledShop(s)
	t.Logf("upgrades begin at %s", time.Now().UTC().Format(time.TimeOnly))
	forms := [][]string{append([]string{"--set", "nodeproxy.logLevel=debug"}, shortLived...), {"--set", "nodeproxy.logLevel=info"}}
	for i := range *upgrades {
		was, version := map[string]string{}, map[string]string{}
		for _, p := range placements {
			was[p.node], version[p.node] = generationsOn(t, p.node), envoyVersion(t, p.node)
		}
		form := forms[i%2]
		if i == *upgrades-1 {
			form = append(form, unsettled...)
		}
		took, err := upgrade(t.Context(), form...)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range placements {
			if now := envoyVersion(t, p.node); (now != version[p.node]) != (*otherEnvoy && i == 0) {
				t.Errorf("%s: Envoy's version is %s, was %s", p.node, now, version[p.node])
			}
			if now := generationsOn(t, p.node); now == was[p.node] || strings.Contains(now, " ") {
				t.Errorf("%s: Envoy's folders are %q, were %q", p.node, now, was[p.node])
			}
		}
		if err := k8s.UntilCondition(t.Context(), time.Minute, "shop", everybody, enforced, "True", nil); err != nil {
			t.Fatal(err)
		}
		sum := s.lossless()
		t.Logf("upgrade %d took %v; by now %d requests, %d connections, %d of them closed by a hint", i+1, took.Round(time.Second), sum.Requests, sum.Connections, sum.Closed)
		s.dwell(200)
		if i == 0 {
			s.changeRoot(false)
		}
	}
	s.lossless()
	if err := k8s.Delete(t.Context(), guarded); err != nil { // all leave at once
		t.Fatal(err)
	}
	n, lost := s.hurried(40)
	if lost.Failed+lost.Broken == 0 {
		t.Fatalf("the load saw no loss in %d cycles without settling: it is blind", n)
	}
	t.Logf("without settling, after %d cycles %d requests failed and %d connections broke: %v", n, lost.Failed, lost.Broken, lost.Errors)
}
