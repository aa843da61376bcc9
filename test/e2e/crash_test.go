//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/cluster/cgroups"
	"github.com/weftmesh/weft/test/kube"
)

// fate is what becomes of a connection.
type fate string

const (
	served  fate = "served"  // by the app, through its Envoy
	plain   fate = "plain"   // by the app, past its Envoy
	queued  fate = "queued"  // without an answer until an Envoy is back, then served
	nothing fate = "nothing" // ended at once, without a byte
)

// column is what is away from the callees' node, or the callers' where the row is about what they dial.
type column string

const (
	agentAway      column = "agent away"
	envoyAway      column = "Envoy away, supervisor there"
	supervisorAway column = "Envoy and supervisor away, agent there"
	allAway        column = "nobody left"
	weftGone       column = "weft gone for 30 s" // from both nodes; TestNamespaceDeleted
)

// row is who calls whom.
type row struct {
	name string
	from caller
	// to is a pod's app on n1, whose address is called from both nodes. Empty: Services of both nodes' pods are called from n1.
	to    string
	fates map[column]fate
}

var (
	strictCallee = caller{"mesh", "closed"}
	openCallee   = caller{"mesh", "open"}
)

// crashTable is the table of docs/LIFECYCLE.md, but for first uses and probes.
var crashTable = []row{
	{"inbound, Strict", client, "closed", map[column]fate{agentAway: served, envoyAway: queued, supervisorAway: queued, allAway: nothing, weftGone: nothing}},
	{"inbound, Strict, from elsewhere", stranger, "closed", map[column]fate{agentAway: nothing, envoyAway: nothing, supervisorAway: nothing, allAway: nothing, weftGone: nothing}},
	{"inbound, Permissive, from an enrolled peer", client, "open", map[column]fate{agentAway: served, envoyAway: queued, supervisorAway: queued, allAway: nothing, weftGone: plain}},
	{"inbound, Permissive, from elsewhere", stranger, "open", map[column]fate{agentAway: served, envoyAway: queued, supervisorAway: queued, allAway: plain, weftGone: plain}},
	{"outbound, captured service, from a Permissive pod", client, "", map[column]fate{agentAway: served, envoyAway: queued, supervisorAway: queued, allAway: nothing, weftGone: plain}},
	{"outbound, captured service, from a Strict pod", strictCallee, "", map[column]fate{agentAway: served, envoyAway: queued, supervisorAway: queued, allAway: nothing, weftGone: nothing}},
}

// crashing are the callees, one of them Strict, and two Services of each node that are used, and first used while the agent is away.
var crashing = podOn("closed", "n1", "mesh", "", `args: [serve], readinessProbe: {grpc: {port: 9002}, periodSeconds: 1, timeoutSeconds: 10}, livenessProbe: {httpGet: {path: /hit/http, port: 8080}, periodSeconds: 1, timeoutSeconds: 10}`) +
	podOn("open", "n1", "mesh", "", `args: [serve], readinessProbe: {httpGet: {path: /hit/http, port: 8080}, periodSeconds: 1, timeoutSeconds: 10}, livenessProbe: {tcpSocket: {port: 9000}, periodSeconds: 1, timeoutSeconds: 10}`) +
	podOn("far", "n2", "mesh", "", `args: [serve]`) +
	crashService("near", "open") + crashService("unused-near", "open") + crashService("far", "far") + crashService("unused-far", "far") + `---
apiVersion: weft.dev/v1alpha1
kind: AuthenticationPolicy
metadata: {name: closed, namespace: mesh}
spec: {selector: {matchLabels: {app: closed}}, mtls: {mode: Strict}}
`

func crashService(name, app string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: mesh}\nspec: {selector: {app: %s}, ports: [{name: http, port: 80, targetPort: 8080, appProtocol: http}, {name: tcp-echo, port: 9000}]}\n", name, app)
}

// resident is a pod, its app's process and the control group of that. What runs beside it needs no kubelet and no runtime.
type resident struct {
	kube.Pod
	pid   int
	group *os.File
}

func residentOf(t *testing.T, of caller, node string) resident {
	t.Helper()
	p := pod(t, of.namespace, of.app, node)
	r := resident{Pod: p, pid: processOf(t, p.UID, "toolbox", "serve")}
	layout, err := cgroups.Read()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", r.pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if path, found := strings.CutPrefix(strings.TrimSpace(line), "0::"); found {
			if r.group, err = os.Open(filepath.Join(layout.V2.MountPoint, path)); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = r.group.Close() })
			return r
		}
	}
	t.Fatalf("%s has no control group: %s", p.Name, text)
	return r
}

// command runs the toolbox in the pod. The hooks see it as the app's own process: they go by its control group, too.
func (r resident) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", strconv.Itoa(r.pid), "-m", "-n", "-u", "--", "/bin/toolbox"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(r.group.Fd())}
	return cmd
}

func (r resident) batch(ctx context.Context, calls []call) ([]outcome, error) {
	return outcomes(r.Pod, calls, func(in string) (string, error) {
		c := r.command(ctx, "batch")
		c.Stdin = strings.NewReader(in)
		out, err := c.Output()
		return string(out), err
	})
}

// hits asks the app what reached it.
func (r resident) hits(t *testing.T) (hits map[string]int) {
	t.Helper()
	out, err := r.command(t.Context(), "get", "http://127.0.0.1:8080/hits").Output()
	if err == nil {
		err = json.Unmarshal([]byte(strings.TrimPrefix(string(out), "200 ")), &hits)
	}
	if err != nil {
		t.Fatalf("read hits of %s: %v: %s", r.Name, err, out)
	}
	return hits
}

// waiting is how many connections nobody has accepted yet, of those to Envoy's ports in the pod.
func (r resident) waiting(t *testing.T) (n int) {
	t.Helper()
	for _, family := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", r.pid, family))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line) // of a listening socket the second queue is what is not accepted
			if len(f) < 5 || f[3] != "0A" {
				continue
			}
			_, text, _ := strings.Cut(f[1], ":")
			port, err := strconv.ParseUint(text, 16, 16)
			_, text, _ = strings.Cut(f[4], ":")
			queue, err2 := strconv.ParseUint(text, 16, 32)
			if err := errors.Join(err, err2); err != nil {
				t.Fatalf("read %q: %v", line, err)
			}
			if port >= 15000 && port < 15020 {
				n += int(queue)
			}
		}
	}
	return n
}

// fate of a call to an app, which sees its own pod's address where Envoy brought the connection.
func (o outcome) fate(app kube.Pod) fate {
	from := ""
	switch {
	case o.closed(), o.Status == 503 && !strings.Contains(o.Body, app.Name):
		return nothing
	case o.Status == 200:
		var a struct{ Pod, Remote string }
		if err := json.Unmarshal([]byte(o.Body), &a); err == nil && a.Pod == app.Name {
			from = a.Remote
		}
	case o.allowed():
		if f := strings.Fields(o.Body); len(f) == 3 && f[0] == app.Name {
			from = f[1]
		}
	}
	host, _, err := net.SplitHostPort(from)
	switch {
	case err != nil:
		return fate(fmt.Sprintf("neither an answer of %s nor none: %+v", app.Name, o))
	case slices.Contains(app.IPs, host):
		return served
	}
	return plain
}

// cell is a row at one placement.
type cell struct {
	row
	at    placement
	from  resident // instead of the row's
	to    kube.Pod
	calls []call
}

// crashWorld are the pods of the table.
type crashWorld struct {
	cells                []cell
	closed, open, client resident
	// n1 are those whose Envoy goes away.
	n1 []resident
}

func newCrashWorld(t *testing.T) crashWorld {
	t.Helper()
	apply(t, crashing)
	ready(t, "app in (closed,open,far)")
	inMesh(t, "app in (closed,open,far)", "Captured")
	programmed(t, "authenticationpolicy", "closed")
	near, far := placements[0], placements[1]
	w := crashWorld{closed: residentOf(t, strictCallee, near.node), open: residentOf(t, openCallee, near.node), client: residentOf(t, client, near.node)}
	w.n1 = []resident{w.closed, w.open, w.client}
	for _, r := range crashTable {
		for _, at := range placements {
			c := cell{row: r, at: at}
			if r.to != "" {
				c.from, c.to = residentOf(t, r.from, at.node), pod(t, "mesh", r.to, near.node)
				c.calls = []call{{URL: "http://" + c.to.IPs[0] + ":8080/"}, {Address: c.to.IPs[0] + ":9000", Line: "x"}}
			} else {
				service := map[string]string{near.name: "near", far.name: "far"}[at.name]
				c.from, c.to = residentOf(t, r.from, near.node), pod(t, "mesh", map[string]string{"near": "open", "far": "far"}[service], at.node)
				c.calls = []call{{URL: "http://" + service + ".mesh/"}, {Address: service + ".mesh:9000", Line: "x"}}
			}
			w.cells = append(w.cells, c)
		}
	}
	return w
}

// settle waits until all is as it is when nobody is away.
func (w crashWorld) settle(t *testing.T) {
	t.Helper()
	for _, c := range w.cells {
		until(t, time.Minute, c.name+", "+c.at.name+", with weft at work", func() (bool, string) {
			out, err := c.from.batch(t.Context(), c.calls)
			if err != nil {
				return false, err.Error()
			}
			want := served
			if c.row.from == stranger && c.row.to == "closed" {
				want = nothing
			}
			return out[0].fate(c.to) == want && out[1].fate(c.to) == want, fmt.Sprintf("%+v", out)
		})
	}
}

// run makes the calls of every cell while something is away, in a subtest of each, and looks at probes.
func (w crashWorld) run(t *testing.T, away column) {
	t.Helper()
	for _, c := range w.cells {
		t.Run(c.name+"/"+c.at.name, func(t *testing.T) {
			out, err := c.from.batch(t.Context(), c.calls)
			if err != nil {
				t.Fatal(err)
			}
			c.compare(t, out, away)
		})
	}
	t.Run("probes", func(t *testing.T) { w.probes(t) })
}

func (c cell) compare(t *testing.T, out []outcome, away column) {
	t.Helper()
	want := c.fates[away]
	if want == queued {
		want = served
	}
	for i, o := range out {
		switch got := o.fate(c.to); {
		case got == want:
		case got == nothing && away == supervisorAway && c.from.Node != "n1" && c.from.Namespace == "mesh":
			t.Logf("%+v: its own Envoy, on %s, waits for no longer than 5 s", c.calls[i], c.from.Node)
		default:
			t.Errorf("%+v: %s, want %s: %+v", c.calls[i], got, want, o)
		}
	}
}

// probes waits until kubelet's of every kind have reached both apps.
func (w crashWorld) probes(t *testing.T) {
	t.Helper()
	for _, p := range []struct {
		resident
		kinds []string
	}{{w.closed, []string{"http", "grpc"}}, {w.open, []string{"http", "tcp"}}} {
		before := p.hits(t)
		until(t, 30*time.Second, "probes of "+p.Name, func() (bool, string) {
			now := p.hits(t)
			for _, kind := range p.kinds {
				if now[kind] < before[kind]+2 {
					return false, fmt.Sprintf("the app saw %v, before %v", now, before)
				}
			}
			return true, ""
		})
	}
}

// queue makes the calls of every cell while nobody accepts: each waits until back has been called, and has its fate then.
func (w crashWorld) queue(t *testing.T, away column, back func()) {
	t.Helper()
	type end struct {
		out []outcome
		err error
	}
	ends := make([]chan end, len(w.cells))
	all := 0
	for i, c := range w.cells {
		calls := slices.Clone(c.calls)
		for k := range calls {
			calls[k].Timeout = 60_000
			all++
		}
		ends[i] = make(chan end, 1)
		go func() { out, err := c.from.batch(t.Context(), calls); ends[i] <- end{out, err} }()
	}
	until(t, time.Minute, "every connection to wait", func() (bool, string) {
		n := 0
		for _, r := range w.n1 {
			n += r.waiting(t)
		}
		return n >= all, fmt.Sprintf("%d of %d", n, all)
	})
	for i, c := range w.cells {
		select {
		case e := <-ends[i]:
			t.Errorf("%s, %s: it did not wait: %+v, %v", c.name, c.at.name, e.out, e.err)
			ends[i] <- e
		default:
		}
	}
	back()
	for i, c := range w.cells {
		t.Run(c.name+"/"+c.at.name, func(t *testing.T) {
			e := <-ends[i]
			if e.err != nil {
				t.Fatal(e.err)
			}
			c.compare(t, e.out, away)
		})
	}
}

// stopRuntime holds what dies on a node away: without its runtime kubelet makes no container. Its probes go on, but for those that run
// a program.
func stopRuntime(t *testing.T, node string) (start func()) {
	t.Helper()
	list, err := os.ReadFile(filepath.Join(machine(t, node).CgroupV2, "containerd", "cgroup.procs"))
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range strings.Fields(string(list)) {
		name, err := os.ReadFile("/proc/" + word + "/comm")
		if err != nil || strings.TrimSpace(string(name)) != "containerd" {
			continue // a container's shim
		}
		pid, err := strconv.Atoi(word)
		if err == nil {
			err = syscall.Kill(pid, syscall.SIGSTOP)
		}
		if err != nil {
			t.Fatal(err)
		}
		start = func() { _ = syscall.Kill(pid, syscall.SIGCONT) }
		t.Cleanup(start)
		return start
	}
	t.Fatalf("no containerd on %s", node)
	return nil
}

// program is one of weft's on a node: a process's name and first argument.
type program struct{ name, argument string }

var (
	agentProgram      = program{"nodeproxy", "agent"}
	supervisorProgram = program{"nodeproxy", "envoy"}
	envoyProgram      = program{"envoy", ""}
)

// end kills programs of weft's pod and waits until they are gone, and Envoy with its supervisor.
func end(t *testing.T, uid string, programs ...program) {
	t.Helper()
	for _, p := range programs {
		if err := syscall.Kill(processOf(t, uid, p.name, p.argument), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	if slices.Contains(programs, supervisorProgram) {
		programs = append(programs, envoyProgram)
	}
	until(t, 10*time.Second, "their end", func() (bool, string) {
		for _, p := range programs {
			if _, found := findProcess(uid, p.name, p.argument); found {
				return false, fmt.Sprint(p)
			}
		}
		return true, ""
	})
}

// TestCrashTable: docs/LIFECYCLE.md, "What a crash does". Something of weft is away from n1, and every cell is what the table says.
func TestCrashTable(t *testing.T) {
	w := newCrashWorld(t)
	name, uid := proxy(t, "n1"), nodeproxyOn(t, "n1").Metadata.UID
	t.Cleanup(func() { // new containers: kubelet would take its time with those that died before
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		if _, err := k8s.Kubectl(ctx, "delete", "pod", "-n", system, name, "--grace-period=1", "--ignore-not-found"); err != nil {
			t.Error(err)
		}
		if err := errors.Join(k8s.UntilReady(ctx, 2*time.Minute, system, "", nil), k8s.UntilCondition(ctx, time.Minute, "mesh", "", enforced, "True", nil)); err != nil {
			t.Error(err)
		}
	})
	t.Run(string(envoyAway), func(t *testing.T) {
		w.settle(t)
		pid := processOf(t, uid, supervisorProgram.name, supervisorProgram.argument)
		back := func() { _ = syscall.Kill(pid, syscall.SIGCONT) }
		t.Cleanup(back)
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		end(t, uid, envoyProgram)
		t.Run("probes", func(t *testing.T) { w.probes(t) })
		w.queue(t, envoyAway, back)
	})
	t.Run(string(supervisorAway), func(t *testing.T) {
		w.settle(t)
		start := stopRuntime(t, "n1")
		end(t, uid, supervisorProgram)
		t.Run("probes", func(t *testing.T) { w.probes(t) })
		w.queue(t, supervisorAway, start)
	})
	t.Run(string(agentAway), func(t *testing.T) {
		w.settle(t)
		for _, service := range []string{"unused-near", "unused-far"} {
			until(t, 30*time.Second, "the Service in the index of n1", func() (bool, string) {
				return strings.Contains(admin(t, "n1", "/config_dump?include_eds"), clusterIPs(t, "mesh", service)[0]), "no scope of its address"
			})
		}
		start := stopRuntime(t, "n1")
		end(t, uid, agentProgram)
		near, far := w.firstUse(t, "unused-near"), w.firstUse(t, "unused-far")
		w.run(t, agentAway)
		t.Run("outbound, first use of a service", func(t *testing.T) {
			t.Run(placements[0].name, near)
			t.Run(placements[1].name, far)
		})
		start()
	})
	t.Run(string(allAway), func(t *testing.T) {
		until(t, time.Minute, "the agent to be back", func() (bool, string) {
			_, found := findProcess(uid, agentProgram.name, agentProgram.argument)
			return found, "it is not"
		})
		w.settle(t)
		start := stopRuntime(t, "n1")
		end(t, uid, agentProgram, supervisorProgram)
		w.run(t, allAway)
		start()
	})
}

// firstUse of a Service while nobody answers Envoy takes a while: it is refused, and the caller is told why.
func (w crashWorld) firstUse(t *testing.T, service string) (look func(*testing.T)) {
	t.Helper()
	var out []outcome
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		out, err = w.client.batch(t.Context(), []call{{URL: "http://" + service + ".mesh/", Timeout: 60_000}, {Address: service + ".mesh:9000", Line: "x", Timeout: 60_000}})
	}()
	return func(t *testing.T) {
		if <-done; err != nil {
			t.Fatal(err)
		}
		if out[0].Status != 503 || !strings.HasPrefix(out[0].Body, "weft: this Service was not used") {
			t.Errorf("HTTP: %+v, want 503 and why", out[0])
		}
		if !out[1].closed() {
			t.Errorf("bytes: %+v, want the end without a byte", out[1])
		}
	}
}
