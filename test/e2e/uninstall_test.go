//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/cluster/snapshot"
	"github.com/weftmesh/weft/test/kube"
)

// before is the machine as it was with the cluster up and weft not installed; untouched, the nodes and the fixtures.
var (
	before    snapshot.Snapshot
	untouched inside
)

// kubepods are the control groups of all pods of a class, which the first of them brings.
var kubepods = regexp.MustCompile(`/kubepods(/besteffort|/burstable)? \(`)

// keptByKubelet is the folder that it makes for weft's pods to mount, and never removes.
var keptByKubelet = regexp.MustCompile(`^n\d: files: \+ /run/weft$`)

// TestUninstall: helm uninstall takes running pods out, unharmed, and leaves nothing. It installs weft again, so that it
// may run before other tests.
func TestUninstall(t *testing.T) {
	var left []string
	t.Cleanup(func() {
		if t.Failed() { // last, where it is not lost among the agents' words
			defer t.Logf("left behind: %q", left)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if err := start(ctx); err != nil {
			t.Errorf("install weft again: %v", err)
		}
	})
	server := pod(t, "mesh", "server", "n1")
	was := restarts(t)
	during, err := snapshot.Take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, change := range snapshot.Diff(before, during) {
		seen[change.Kind]++
	}
	for _, kind := range []string{snapshot.BPFLink, snapshot.BPFProgram, snapshot.BPFMap, snapshot.Process, snapshot.ControlGroup} {
		if seen[kind] == 0 {
			t.Errorf("the comparison is blind: no change of kind %q while weft runs", kind)
		}
	}
	seesWeft(t)

	followAgents(t)
	// A connection that is open when the agents go ends while they leave.
	open := hold(t, client, placements[1], "server.mesh:9000")
	until(t, time.Minute, "a connection in use", func() (bool, string) { lines, _, how := open.state(); return lines > 3, fmt.Sprint(lines, how) })
	go func() {
		_ = kube.Until(t.Context(), 5*time.Minute, "the agents to go", nil, func(ctx context.Context) (bool, string) {
			all, err := k8s.Pods(ctx, system, "app=weft-nodeproxy")
			return err == nil && len(all) > 0 && !slices.ContainsFunc(all, func(p kube.Pod) bool { return !p.Deleting }), fmt.Sprint(all, err)
		})
		time.Sleep(2 * time.Second)
		open.letGo()
	}()
	out, err := k8s.Helm(t.Context(), "uninstall", "weft", "-n", system, "--wait", "--timeout", "5m")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	until(t, 2*time.Minute, "weft's pods to go", func() (bool, string) {
		pods, err := k8s.Pods(t.Context(), system, "")
		return err == nil && len(pods) == 0, fmt.Sprintf("%d pods, %v", len(pods), err)
	})
	if now := restarts(t); fmt.Sprint(now) != fmt.Sprint(was) {
		t.Errorf("pods restarted: %v, before %v", now, was)
	}
	for _, from := range []caller{client, stranger} {
		for _, at := range placements {
			outcomes, err := batch(t.Context(), pod(t, from.namespace, from.app, at.node), []call{{URL: "http://server.mesh/pod"}, {Address: server.IPs[0] + ":9000", Line: "x"}, {Address: server.IPs[0] + ":9001"}})
			if err != nil {
				t.Fatal(err)
			}
			for i, o := range outcomes {
				if !o.allowed() {
					t.Errorf("without weft, %s, %s, call %d: %+v", from.app, at.name, i, o)
				}
			}
		}
	}
	until(t, time.Minute, "nodes and pods to be as they were", func() (bool, string) {
		now, err := lookInside(t.Context())
		if err != nil {
			return false, err.Error()
		}
		// Five kinds in at least ten pods of the fixtures.
		if n := untouched.common(now); n < 50 {
			return false, fmt.Sprintf("only %d places are left to compare", n)
		}
		left = slices.DeleteFunc(untouched.changes(now), func(c string) bool { return keptByKubelet.MatchString(c) })
		return len(left) == 0, fmt.Sprintf("%d changes:\n%s", len(left), strings.Join(left[:min(40, len(left))], "\n"))
	})

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if _, err := k8s.Kubectl(ctx, "delete", "namespace", "mesh", "outside", system, "--ignore-not-found"); err != nil {
		t.Fatal(err)
	}
	machine, err := snapshot.Settle(ctx, before, weftsOwn)
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range machine {
		t.Error(change)
	}
}

// seesWeft shows that the comparison of nodes and pods would see what weft does there.
func seesWeft(t *testing.T) {
	t.Helper()
	// What weft itself does not do is done for it.
	inServer(t, "nft add table inet blind && ip rule add pref 4242 lookup main && ip address add 192.0.2.77/32 dev lo")
	defer inServer(t, "nft delete table inet blind; ip rule delete pref 4242; ip address delete 192.0.2.77/32 dev lo")
	now, err := lookInside(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Join(untouched.changes(now), "\n")
	for what, pattern := range map[string]string{
		"a table of nftables":          `(?m)^mesh/server \S+: nftables: \+ table inet blind`,
		"a routing rule":               `(?m)^mesh/server \S+: rules: \+ 4242:`,
		"an address":                   `(?m)^mesh/server \S+: addresses: \+ .*192\.0\.2\.77`,
		"a steering route of a pod":    `(?m)^mesh/server \S+: routes: \+ local 127\.64\.0\.0/10 `,
		"a steering route, IPv6":       `(?m)^mesh/server \S+: routes: \+ local fd77:5eed::/64 `,
		"the reserved ports of a pod":  `(?m)^mesh/server \S+: sysctls: \+ \S+ip_local_reserved_ports:15000`,
		"pins on a node":               `(?m)^n1: files: \+ /sys/fs/bpf/weft/pods/`,
		"weft's folder on a node":      `(?m)^n1: files: \+ /run/weft/`,
		"mounts of weft's pods":        `(?m)^n1: mounts: \+ /var/lib/kubelet/pods/`,
		"addresses of weft's own pods": `(?m)^n1: (addresses|routes): \+ `,
	} {
		if !regexp.MustCompile(pattern).MatchString(all) {
			t.Errorf("the comparison is blind: it does not see %s", what)
		}
	}
	if t.Failed() {
		t.Logf("what it sees:\n%s", all)
	}
}

// inServer runs a script in the network namespace of the server's pod.
func inServer(t *testing.T, script string) {
	t.Helper()
	pods, err := podNetworks(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		if strings.HasPrefix(p.name, "mesh/server ") {
			if out, err := p.node.Command(t.Context(), "nsenter", "--net="+p.netns, "sh", "-c", script).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", script, err, out)
			}
			return
		}
	}
	t.Fatal("the server has no network namespace")
}

// followAgents shows what the agents wrote to their end, if the test fails.
func followAgents(t *testing.T) {
	t.Helper()
	agents, err := k8s.Pods(t.Context(), system, "app=weft-nodeproxy")
	if err != nil {
		t.Fatal(err)
	}
	for _, agent := range agents {
		var log bytes.Buffer
		cmd := k8s.Command(t.Context(), "logs", "-n", system, "-c", "agent", "-f", "--since=1s", agent.Name)
		cmd.Stdout = &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Wait() // t.Context has ended
			if t.Failed() {
				t.Logf("agent on %s:\n%s", agent.Node, log.String())
			}
		})
	}
}

// weftsOwn tells which changes of the machine are held against weft. The programs of the cluster itself start and end
// others meanwhile; on a machine that others use too, only what names weft counts.
func weftsOwn(change snapshot.Change) bool {
	if os.Getenv("WEFT_SHARED_MACHINE") != "" {
		text := change.String()
		ours := strings.Contains(text, filepath.Base(filepath.Dir(k8s.Nodes[0].CgroupV2)))
		return ours && change.Before == "" && (strings.Contains(text, "envoy") || strings.Contains(text, "nodeproxy"))
	}
	switch change.Kind {
	case snapshot.Process:
		return change.Before == "" && (strings.Contains(change.After, "envoy") || strings.Contains(change.After, "nodeproxy") || strings.Contains(change.After, "controlplane"))
	case snapshot.BPFLink, snapshot.BPFProgram, snapshot.BPFMap, snapshot.NFTables, snapshot.Route, snapshot.Rule, snapshot.Link, snapshot.Mount:
		return true
	case snapshot.Sysctl:
		return change.Before != "" && change.After != ""
	case snapshot.NetNamespace:
		return change.Before == ""
	case snapshot.ControlGroup: // elsewhere weft makes none, and others may
		text := change.String()
		ours := strings.Contains(text, "weft") || strings.Contains(text, filepath.Base(filepath.Dir(k8s.Nodes[0].CgroupV2)))
		return ours && change.Before == "" && !kubepods.MatchString(text)
	}
	return false
}
