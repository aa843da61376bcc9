//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"

	"github.com/weftmesh/weft/test/kube"
)

const strictMesh = `
apiVersion: weft.dev/v1alpha1
kind: AuthenticationPolicy
metadata: {name: strict, namespace: mesh}
spec: {mtls: {mode: Strict}}
`

// enterStrict puts the namespace under Strict for one test.
func enterStrict(t *testing.T) {
	t.Helper()
	apply(t, strictMesh)
	programmed(t, "authenticationpolicy", "strict")
}

// tap listens on every interface of a node for a text.
type tap struct {
	cmd  *exec.Cmd
	done sync.WaitGroup

	mu      sync.Mutex
	on      map[string]int // interfaces on which the text was seen
	last    map[string]bool
	packets int
}

var packetLine = regexp.MustCompile(`^\d\d:\d\d:\d\d\.\d+ (\S+) +(In|Out|P|M|B) `)

func listenFor(t *testing.T, node, text, end string) *tap {
	t.Helper()
	w := &tap{on: map[string]int{}, last: map[string]bool{}}
	// In immediate mode the buffer has a place of the snapshot's length for each packet: whole ones would leave it 32 places.
	w.cmd = machine(t, node).NetCommand(context.Background(), "tcpdump", "-i", "any", "--immediate-mode", "-n", "-l", "-A", "-s", "4096", "-B", "8192",
		"tcp and not host 127.0.0.1") // kubelet speaks plain HTTP to the runtime over the node's loopback
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	notes, err := w.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{})
	w.done.Go(func() {
		announced := false
		for lines := bufio.NewScanner(notes); lines.Scan(); {
			if !announced && strings.Contains(lines.Text(), "listening on") {
				announced = true
				close(ready)
			}
		}
	})
	w.done.Go(func() {
		lines := bufio.NewReader(out)
		at := ""
		for {
			l, err := lines.ReadString('\n')
			w.mu.Lock()
			if m := packetLine.FindStringSubmatch(l); m != nil {
				at = m[1]
				w.packets++
			} else if strings.Contains(l, text) {
				w.on[at]++
			} else if strings.Contains(l, end) {
				w.last[at] = true
			}
			w.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	select {
	case <-ready:
	case <-time.After(time.Minute):
		t.Fatal("tcpdump does not listen")
	}
	return w
}

// seen tells on how many interfaces the tap has seen its second text, which comes after everything else.
func (w *tap) seen() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.last)
}

func (w *tap) stop() (on map[string]int, packets int) {
	_ = w.cmd.Process.Signal(os.Interrupt)
	w.done.Wait()
	_ = w.cmd.Wait()
	return w.on, w.packets
}

// TestNoPlaintext: §5.2. The control run shows that the taps would see the marker on the nodes' link and on both pods'
// links.
func TestNoPlaintext(t *testing.T) {
	enterStrict(t)
	server := pod(t, "mesh", "server", "n1")
	for _, run := range []struct {
		name     string
		from, to kube.Pod
		visible  bool
	}{
		{"control, outside the mesh", pod(t, "outside", "stranger", "n2"), pod(t, "outside", "stranger", "n1"), true},
		{"in the mesh, across nodes", pod(t, "mesh", "client", "n2"), server, false},
		{"in the mesh, on one node", pod(t, "mesh", "client", "n1"), server, false},
	} {
		t.Run(run.name, func(t *testing.T) {
			marker := "marker-" + strconv.FormatInt(time.Now().UnixNano(), 36)
			end := "end-of-" + strconv.FormatInt(time.Now().UnixNano(), 36)
			taps := map[string]*tap{"n1": listenFor(t, "n1", marker, end), "n2": listenFor(t, "n2", marker, end)}
			var calls []call
			for _, ip := range run.to.IPs {
				host := net.JoinHostPort(ip, "8080")
				calls = append(calls, call{URL: "http://" + host + "/echo", Method: "POST", Headers: map[string]string{"X-Marker": marker}},
					call{URL: "http://" + host + "/?" + marker}, call{Address: net.JoinHostPort(ip, "9000"), Line: marker})
			}
			if len(run.to.IPs) < 2 {
				t.Errorf("%s has the addresses %v, want one of each family", run.to.Name, run.to.IPs)
			}
			if !run.visible {
				for _, ip := range clusterIPs(t, "mesh", "server") {
					calls = append(calls, call{URL: "http://" + net.JoinHostPort(ip, "80") + "/?" + marker}, call{Address: net.JoinHostPort(ip, "9000"), Line: marker})
				}
			}
			outcomes, err := batch(t.Context(), run.from, calls)
			if err != nil {
				t.Fatal(err)
			}
			for i, o := range outcomes {
				if !o.allowed() && !(calls[i].Method == "POST" && o.Status == 200) {
					t.Errorf("call %d failed: %+v", i, o)
				}
			}
			// What the taps hear last, outside the mesh: then they have heard all that came before.
			outside := pod(t, "outside", "stranger", "n1").IPs[0]
			if _, err := batch(t.Context(), pod(t, "outside", "stranger", "n2"), []call{{URL: "http://" + outside + ":8080/?" + end}}); err != nil {
				t.Fatal(err)
			}
			until(t, 30*time.Second, "the taps", func() (bool, string) {
				return taps["n1"].seen() >= 2 && taps["n2"].seen() >= 2, fmt.Sprintf("the last call was seen on %d and %d interfaces", taps["n1"].seen(), taps["n2"].seen())
			})
			for node, w := range taps {
				on, packets := w.stop()
				t.Logf("%s: %d packets, marker on %v", node, packets, on)
				if packets == 0 && (node == run.from.Node || node == run.to.Node) {
					t.Errorf("the tap on %s saw no packet", node)
				}
				if run.visible && len(on) < 2 {
					t.Errorf("the tap on %s saw the marker on %v, want the pod's link and the node's", node, on)
				}
				if !run.visible && len(on) > 0 {
					t.Errorf("the marker is readable on %s: %v", node, on)
				}
			}
		})
	}
}

// TestIdentities: both ends' SPIFFE IDs, by what Envoy saw in the certificates, Permissive and Strict.
func TestIdentities(t *testing.T) {
	alone(t, "mesh")
	t.Run("Permissive", identities)
	t.Run("Strict", func(t *testing.T) {
		enterStrict(t)
		identities(t)
	})
}

func identities(t *testing.T) {
	server := pod(t, "mesh", "server", "n1")
	since := time.Now()
	for _, at := range placements {
		for i, o := range client.ask(t, at.node, call{URL: "http://server.mesh/pod"}, call{Address: server.IPs[0] + ":9000", Line: "x"}) {
			if !o.allowed() {
				t.Fatalf("%s, call %d: %+v", at.name, i, o)
			}
		}
	}
	for _, end := range []struct{ node, direction, peer, local string }{
		{"n1", "in", spiffe + "client", spiffe + "server"}, {"n1", "out", spiffe + "server", spiffe + "client"}, {"n2", "out", spiffe + "server", spiffe + "client"},
	} {
		until(t, 30*time.Second, "the log of "+end.node, func() (bool, string) {
			for _, l := range accessLog(t, end.node, since) {
				if l.Direction == end.direction && l.Peer == end.peer && l.Local == end.local {
					return true, ""
				}
			}
			return false, fmt.Sprintf("no line %q of %s with %s", end.direction, end.peer, end.local)
		})
	}
}

// TestDrift: Enrolled is what the kernel holds, and what is missing there is put back.
func TestDrift(t *testing.T) {
	server := pod(t, "mesh", "server", "n1")
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/root/sys/fs/bpf/weft/pods/*", machine(t, "n1").PID))
	if err != nil || len(files) == 0 {
		t.Fatalf("no pins of pods on n1: %v", err)
	}
	events := watchCondition(t, server, "weft.dev/Enrolled")
	for _, file := range files {
		l, err := link.LoadPinnedLink(file, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Detach(); err != nil {
			t.Errorf("detach %s: %v", filepath.Base(file), err)
		}
		_ = l.Close()
	}
	saw := ""
	deadline := time.After(time.Minute)
	for !strings.Contains(saw, "False") || !strings.HasSuffix(saw, "True ") {
		select {
		case s := <-events:
			saw += s + " "
		case <-deadline:
			t.Fatalf("the condition was %q, want False and then True", saw)
		}
	}
	outcomes, err := batch(t.Context(), pod(t, "mesh", "client", "n2"), []call{{URL: "http://server.mesh/pod"}})
	if err != nil || !outcomes[0].allowed() {
		t.Errorf("after the repair: %+v, %v", outcomes, err)
	}
}

// watchCondition sends a condition's status as it changes.
func watchCondition(t *testing.T, p kube.Pod, condition string) <-chan string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cmd := k8s.Command(ctx, "get", "pod", "-n", p.Namespace, p.Name, "-w", "-o", fmt.Sprintf(`jsonpath={.status.conditions[?(@.type==%q)].status}{"\n"}`, condition))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = cmd.Wait() })
	events := make(chan string, 100)
	first := make(chan struct{})
	go func() {
		last := ""
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if last == "" {
				close(first)
			} else if lines.Text() != last {
				events <- lines.Text()
			}
			last = lines.Text()
		}
	}()
	select {
	case <-first:
	case <-time.After(30 * time.Second):
		t.Fatal("kubectl shows no pod")
	}
	return events
}
