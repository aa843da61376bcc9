//go:build e2e

package cluster_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/weftmesh/weft/test/cluster"
	"github.com/weftmesh/weft/test/cluster/snapshot"
)

// deadline bounds each wait: ten times and more what it takes on two busy cores.
const deadline = 2 * time.Minute

// harness is the cluster under test: its own, started and ended by the test.
type harness struct {
	*testing.T
	ctx context.Context
	dir string
}

// config takes NODES and SLOT from the environment, as the make targets do.
func config(t *testing.T) cluster.Config {
	t.Helper()
	dir, err := cluster.Root()
	if err != nil {
		t.Fatal(err)
	}
	c := cluster.Config{Dir: dir, Nodes: 2}
	if text := os.Getenv("SLOT"); text != "" {
		if c.Slot, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// parts are what Kubernetes, and a mesh on it, need of the cluster.
var parts = []struct {
	name string
	run  func(harness)
}{
	{"pods start", harness.podsStart},
	{"pods reach each other", harness.podsReachEachOther},
	{"services", harness.services},
	{"names", harness.names},
	{"exec logs port-forward", harness.commands},
	{"helm", harness.helm},
	{"kubelet refuses strangers", harness.kubeletRefuses},
	{"units have groups of their own", harness.unitGroups},
	{"a node's folders", harness.nodeFolders},
	{"a node's bpffs", harness.bpffs},
	{"load", harness.load},
	{"reboot", func(h harness) { h.reboot(1, false) }},
	{"power cut", func(h harness) { h.reboot(2, true) }},
	{"second clone refused", harness.secondClone},
}

// TestCluster starts a cluster, looks at all that Kubernetes needs of it, and ends it; then it interrupts starts. The
// machine must hold the same before and after.
func TestCluster(t *testing.T) {
	c := config(t)
	h := harness{T: t, ctx: t.Context(), dir: c.Dir}
	if _, err := cluster.Open(c.Dir); err == nil {
		t.Fatal("a cluster of this clone runs; this test starts its own: run make cluster-down first")
	}
	if _, err := cluster.Build(h.ctx, c); err != nil {
		t.Fatal(err)
	}
	before, err := snapshot.Take(h.ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cluster.Down(context.Background(), c); err != nil {
			t.Error(err)
		}
	})
	ok := t.Run("up", func(t *testing.T) {
		started := time.Now()
		if err := cluster.Up(h.ctx, c); err != nil {
			t.Fatal(err)
		}
		t.Logf("up in %s", time.Since(started).Round(100*time.Millisecond))
		if err := cluster.Up(h.ctx, c); err != nil {
			t.Errorf("start a cluster that runs: %v", err)
		}
	})
	if !ok {
		return
	}
	for _, part := range parts {
		t.Run(part.name, func(t *testing.T) { part.run(harness{T: t, ctx: t.Context(), dir: c.Dir}) })
	}
	t.Run("the snapshot sees a cluster", func(t *testing.T) {
		pinObjects(t, harness{T: t, ctx: t.Context(), dir: c.Dir}.open().Nodes[0], c.Prefix())
		seesCluster(t, before, c)
	})
	down := func(t *testing.T) {
		if err := cluster.Down(h.ctx, c); err != nil {
			t.Fatal(err)
		}
		nothingLeft(t, before, c)
	}
	t.Run("down", down)
	t.Run("down again", down)
	interruptions(t, c, down)
	for _, nodes := range []int{1, cluster.MaxNodes} {
		t.Run(fmt.Sprintf("%d nodes", nodes), func(t *testing.T) {
			c := c
			c.Nodes = nodes
			h := up(t, c)
			if got := len(strings.Fields(h.kubectl("get", "nodes", "-o", "name"))); got != nodes {
				t.Errorf("the API has %d nodes", got)
			}
			h.runsOn(nodes)
			down(t)
		})
	}
}

// interruptions kills up and down on their way: a later down leaves nothing, a later up starts a whole cluster.
func interruptions(t *testing.T, c cluster.Config, down func(*testing.T)) {
	for _, stage := range []string{"make certificates", "start the control plane", "start 2 nodes", "wait for the nodes", "start CoreDNS"} {
		t.Run("up killed at "+stage, func(t *testing.T) {
			killUp(t, c, stage)
			down(t)
			down(t)
		})
	}
	t.Run("up after a killed up", func(t *testing.T) {
		killUp(t, c, "wait for the nodes")
		up(t, c)
	})
	t.Run("down killed as the control plane ends", func(t *testing.T) {
		group := filepath.Join(harness{T: t, ctx: t.Context(), dir: c.Dir}.open().ControlPlane.CgroupV2, "init/cgroup.procs")
		killDown(t, c, func() bool { processes, _ := os.ReadFile(group); return len(processes) == 0 })
		down(t)
	})
	t.Run("down killed as its link goes", func(t *testing.T) {
		killUp(t, c, "wait for the nodes")
		killDown(t, c, func() bool { _, err := net.InterfaceByName(c.Prefix() + "h"); return err != nil })
		down(t)
	})
}

// up starts the cluster and looks that all its nodes are Ready.
func up(t *testing.T, c cluster.Config) harness {
	t.Helper()
	if err := cluster.Up(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	h := harness{T: t, ctx: t.Context(), dir: c.Dir}
	h.kubectl("wait", "--for=condition=Ready", "--timeout=120s", "node", "--all")
	return h
}

// killDown ends the cluster by the command and kills it without warning as soon as reached says so.
func killDown(t *testing.T, c cluster.Config, reached func() bool) {
	t.Helper()
	down := exec.Command(filepath.Join(c.Dir, ".cluster/bin/cluster"), "down")
	down.Dir = c.Dir
	if err := down.Start(); err != nil {
		t.Fatal(err)
	}
	limit := time.Now().Add(deadline)
	for !reached() {
		if time.Now().After(limit) {
			t.Fatal("down does not get as far as to be killed")
		}
		time.Sleep(time.Millisecond)
	}
	_ = down.Process.Kill()
	if err := down.Wait(); err == nil {
		t.Log("down had ended before it could be killed")
	}
}

// pinObjects pins a map, a program and a link of it to the node's control group in the node's bpffs: what a mesh on the
// node leaves there. Nothing but the pins holds them.
func pinObjects(t *testing.T, node cluster.Node, name string) {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: name, Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}, License: "GPL"})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	hook, err := link.AttachCgroup(link.CgroupOptions{Path: node.CgroupV2, Attach: ebpf.AttachCGroupInet4Connect, Program: program})
	if err != nil {
		t.Fatal(err)
	}
	defer hook.Close()
	folder := fmt.Sprintf("/proc/%d/root/sys/fs/bpf", node.PID)
	for name, object := range map[string]interface{ Pin(string) error }{"map": m, "program": program, "link": hook} {
		if err := object.Pin(filepath.Join(folder, name)); err != nil {
			t.Fatal(err)
		}
	}
}

// killUp starts a cluster and kills the command without warning soon after it reports the stage.
func killUp(t *testing.T, c cluster.Config, stage string) {
	t.Helper()
	up := exec.Command(filepath.Join(c.Dir, ".cluster/bin/cluster"), "up", "--nodes", strconv.Itoa(c.Nodes), "--slot", strconv.Itoa(c.Slot))
	up.Dir = c.Dir
	output, err := up.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := up.Start(); err != nil {
		t.Fatal(err)
	}
	var seen bytes.Buffer
	part := make([]byte, 4096)
	for !strings.Contains(seen.String(), "] "+stage) {
		n, err := output.Read(part)
		if err != nil {
			t.Fatalf("wait for %q: the command ended: %v: %s", stage, err, &seen)
		}
		seen.Write(part[:n])
	}
	if err := up.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = up.Wait()
}

// seesCluster shows that nothingLeft would see what a cluster leaves, kind by kind.
func seesCluster(t *testing.T, before snapshot.Snapshot, c cluster.Config) {
	t.Helper()
	now, err := snapshot.Take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, change := range snapshot.Diff(before, now) {
		if counts(t, c)(change) {
			seen[change.Kind]++
		}
	}
	for _, kind := range []string{snapshot.Process, snapshot.ControlGroup, snapshot.Link, snapshot.InnerMount, snapshot.InnerNFTables,
		snapshot.BPFMap, snapshot.BPFProgram, snapshot.BPFLink} {
		if seen[kind] == 0 {
			t.Errorf("no change of kind %q counts while the cluster runs", kind)
		}
	}
	if os.Getenv("WEFT_SHARED_MACHINE") != "" {
		return
	}
	for _, kind := range []string{snapshot.NetNamespace, snapshot.MountNamespace, snapshot.Route, snapshot.Sysctl} {
		if seen[kind] == 0 {
			t.Errorf("no change of kind %q counts while the cluster runs", kind)
		}
	}
}

// nothingLeft compares the machine with before.
func nothingLeft(t *testing.T, before snapshot.Snapshot, c cluster.Config) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	left, err := snapshot.Settle(ctx, before, counts(t, c))
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range left {
		t.Error(change)
	}
}

// counts tells which changes of the machine are held against the cluster. Other programs may start and end meanwhile:
// a process counts if it sits in the cluster's control groups or runs a program of the clone, of the cache or of a
// machine. Everything else counts wherever it comes from, unless WEFT_SHARED_MACHINE says that others work on the
// machine: then only what names the cluster does, and folders. A neighbour's cluster keeps a limit raised.
func counts(t *testing.T, c cluster.Config) func(snapshot.Change) bool {
	t.Helper()
	shared := os.Getenv("WEFT_SHARED_MACHINE") != ""
	cache, err := cluster.CacheRoot()
	if err != nil {
		t.Fatal(err)
	}
	return func(change snapshot.Change) bool {
		text := change.String()
		own := strings.Contains(text, c.Prefix()) || strings.Contains(text, c.Dir+"/.cluster")
		switch {
		case own:
			return true
		case !shared:
			return change.Kind != snapshot.Process || strings.HasPrefix(change.After, cache+"/") || strings.HasPrefix(change.After, "/opt/weft/bin/")
		case change.Kind == snapshot.Folder:
			return !strings.HasPrefix(change.Key, "/run")
		}
		return false
	}
}
