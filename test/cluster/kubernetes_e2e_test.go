//go:build e2e

package cluster_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/weftmesh/weft/test/cluster"
)

// open reads the cluster's description anew.
func (h harness) open() *cluster.Cluster {
	h.Helper()
	c, err := cluster.Open(h.dir)
	if err != nil {
		h.Fatal(err)
	}
	return c
}

// kubectl runs kubectl and returns its output; it must succeed.
func (h harness) kubectl(args ...string) string {
	h.Helper()
	out, err := h.try(args...)
	if err != nil {
		h.Fatal(err)
	}
	return out
}

func (h harness) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(h.ctx, deadline)
	defer cancel()
	var stdout, stderr bytes.Buffer
	command := exec.CommandContext(ctx, filepath.Join(h.dir, ".cluster/kubectl"), args...)
	command.Stdout, command.Stderr = &stdout, &stderr
	if err := command.Run(); err != nil {
		return "", fmt.Errorf("kubectl %s: %w: %s%s", strings.Join(args, " "), err, &stderr, &stdout)
	}
	return strings.TrimSpace(stdout.String()), nil
}

// toolbox runs the toolbox in a pod.
func (h harness) toolbox(pod string, args ...string) (string, error) {
	return h.try(append([]string{"exec", pod, "--", "toolbox"}, args...)...)
}

// eventually repeats check until it succeeds.
func (h harness) eventually(what string, check func() error) {
	h.Helper()
	limit := time.Now().Add(deadline)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(limit) {
			h.Fatalf("%s: not within %s: %v", what, deadline, err)
		}
		select {
		case <-h.ctx.Done():
			h.Fatal(h.ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// addresses are a pod's or a service's, IPv4 first.
func (h harness) addresses(kind, name string) []netip.Addr {
	h.Helper()
	path := map[string]string{"pod": "{.status.podIPs[*].ip}", "service": "{.spec.clusterIPs[*]}"}[kind]
	var out []netip.Addr
	for _, text := range strings.Fields(h.kubectl("get", kind, name, "-o", "jsonpath="+path)) {
		out = append(out, netip.MustParseAddr(text))
	}
	if len(out) != 2 || !out[0].Is4() || !out[1].Is6() {
		h.Fatalf("addresses of %s %s: got %v, want one IPv4 and one IPv6", kind, name, out)
	}
	return out
}

func (h harness) podsStart() {
	h.kubectl("apply", "-f", filepath.Join(h.dir, "test/cluster/testdata/pods.yaml"))
	h.kubectl("wait", "--for=condition=Ready", "--timeout=120s", "pod", "--all")
	nodes := h.open().Nodes
	for _, n := range []int{1, 2} {
		for _, pod := range []string{"server", "client"} {
			addresses := h.addresses("pod", fmt.Sprintf("%s-n%d", pod, n))
			if node := nodes[n-1]; !node.Pods4.Contains(addresses[0]) || !node.Pods6.Contains(addresses[1]) {
				h.Errorf("addresses of %s on %s: got %v, want them in %s and %s", pod, node.Name, addresses, node.Pods4, node.Pods6)
			}
		}
	}
}

// pairs calls try for each client node, server node and address family.
func (h harness) pairs(try func(client, server string, family int)) {
	for _, client := range []string{"client-n1", "client-n2"} {
		for _, server := range []string{"server-n1", "server-n2"} {
			for family := range 2 {
				try(client, server, family)
			}
		}
	}
}

func (h harness) podsReachEachOther() {
	h.pairs(func(client, server string, family int) {
		from, to := h.addresses("pod", client)[family], h.addresses("pod", server)[family]
		h.sees(client, netip.AddrPortFrom(to, 8080), server, from)
		for _, network := range []string{"tcp", "udp"} {
			got, err := h.toolbox(client, network, netip.AddrPortFrom(to, 9000).String(), "ping")
			fields := strings.Fields(got)
			if err != nil || len(fields) != 3 || fields[0] != server || netip.MustParseAddrPort(fields[1]).Addr() != from || fields[2] != "ping" {
				h.Errorf("%s from %s to %s: got %q, %v, want %s to see %s", network, client, to, got, err, server, from)
			}
		}
	})
}

// sees asks the HTTP server at an address which client it sees: the address must be the client pod's own.
func (h harness) sees(client string, to netip.AddrPort, server string, from netip.Addr) {
	h.Helper()
	got, err := h.toolbox(client, "get", "http://"+to.String()+"/")
	if err != nil {
		h.Errorf("from %s to %s: %v", client, to, err)
		return
	}
	status, body, _ := strings.Cut(got, " ")
	var answer struct{ Pod, Remote string }
	if err := json.Unmarshal([]byte(body), &answer); err != nil || status != "200" {
		h.Errorf("from %s to %s: got %q, %v", client, to, got, err)
		return
	}
	remote, err := netip.ParseAddrPort(answer.Remote)
	if err != nil || answer.Pod != server || remote.Addr() != from {
		h.Errorf("from %s to %s: answered by %s, which sees %s; want %s to see %s", client, to, answer.Pod, answer.Remote, server, from)
	}
}

func (h harness) services() {
	h.pairs(func(client, server string, family int) {
		service := h.addresses("service", server)[family]
		h.eventually("service "+server+" from "+client, func() error {
			_, err := h.toolbox(client, "get", "http://"+netip.AddrPortFrom(service, 80).String()+"/pod")
			return err
		})
		h.sees(client, netip.AddrPortFrom(service, 80), server, h.addresses("pod", client)[family])
	})
	// A pod reaches itself by its own service.
	for family, service := range h.addresses("service", "server-n1") {
		if got, err := h.toolbox("server-n1", "get", "http://"+netip.AddrPortFrom(service, 80).String()+"/pod"); got != "200 server-n1" {
			h.Errorf("server-n1 to itself by its service, family %d: got %q, %v", family, got, err)
		}
	}
	// From the machine to any node's port.
	for _, node := range h.open().Nodes {
		response, err := http.Get("http://" + netip.AddrPortFrom(node.IPv4, 30080).String() + "/pod")
		if err != nil {
			h.Errorf("node port of %s: %v", node.Name, err)
			continue
		}
		body, _ := io.ReadAll(response.Body)
		response.Body.Close()
		if got := strings.TrimSpace(string(body)); got != "server-n2" {
			h.Errorf("node port of %s: got %q, want server-n2", node.Name, got)
		}
	}
}

func (h harness) names() {
	want := map[string]bool{}
	for _, address := range h.addresses("service", "web") {
		want[address.String()] = true
	}
	for _, client := range []string{"client-n1", "client-n2"} {
		for _, name := range []string{"web", "web.default.svc.cluster.local"} {
			got, err := h.toolbox(client, "resolve", name)
			found := strings.Fields(got)
			if err != nil || len(found) != 2 || !want[found[0]] || !want[found[1]] {
				h.Errorf("resolve %s in %s: got %v, %v, want %v", name, client, found, err, want)
			}
		}
		if got, err := h.toolbox(client, "resolve", "nobody.default.svc.cluster.local"); err == nil {
			h.Errorf("resolve a name that does not exist in %s: got %q, want an error", client, got)
		}
	}
}

func (h harness) commands() {
	if got := h.kubectl("exec", "client-n2", "--", "sh", "-c", "hostname; echo out"); got != "client-n2\nout" {
		h.Errorf("exec: got %q", got)
	}
	if got := h.kubectl("logs", "server-n1"); !strings.Contains(got, "pod=server-n1") {
		h.Errorf("logs: got %q, want the server's first line", got)
	}
	forward := exec.CommandContext(h.ctx, filepath.Join(h.dir, ".cluster/kubectl"), "port-forward", "pod/server-n2", ":8080")
	output, err := forward.StdoutPipe()
	if err != nil {
		h.Fatal(err)
	}
	if err := forward.Start(); err != nil {
		h.Fatal(err)
	}
	defer func() { _ = forward.Process.Kill(); _ = forward.Wait() }()
	// "Forwarding from 127.0.0.1:40000 -> 8080"
	line := make([]byte, 256)
	n, err := output.Read(line)
	fields := strings.Fields(string(line[:n]))
	if err != nil || len(fields) < 3 {
		h.Fatalf("port-forward: got %q, %v", line[:n], err)
	}
	response, err := http.Get("http://" + fields[2] + "/pod")
	if err != nil {
		h.Fatalf("port-forward: %v", err)
	}
	defer response.Body.Close()
	if body, _ := io.ReadAll(response.Body); strings.TrimSpace(string(body)) != "server-n2" {
		h.Errorf("port-forward: got %q, want server-n2", body)
	}
}

func (h harness) helm() {
	run := func(args ...string) {
		h.Helper()
		if out, err := h.open().HelmCommand(h.ctx, args...).CombinedOutput(); err != nil {
			h.Fatalf("helm %v: %v: %s", args, err, out)
		}
	}
	run("install", "trivial", filepath.Join(h.dir, "test/cluster/testdata/chart"), "--set", "greeting=moin", "--wait")
	if got := h.kubectl("get", "configmap", "trivial", "-o", "jsonpath={.data.greeting}"); got != "moin" {
		h.Errorf("installed ConfigMap: got %q, want moin", got)
	}
	run("uninstall", "trivial")
	if _, err := h.try("get", "configmap", "trivial"); err == nil {
		h.Error("the chart's ConfigMap is still there after helm uninstall")
	}
}

func (h harness) kubeletRefuses() {
	client := &http.Client{Timeout: deadline, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	token := h.kubectl("create", "token", "default")
	for _, node := range h.open().Nodes {
		for name, want := range map[string]int{"": http.StatusUnauthorized, "not a token": http.StatusUnauthorized, token: http.StatusForbidden} {
			request, err := http.NewRequestWithContext(h.ctx, http.MethodGet, "https://"+netip.AddrPortFrom(node.IPv4, 10250).String()+"/pods", nil)
			if err != nil {
				h.Fatal(err)
			}
			if name != "" {
				request.Header.Set("Authorization", "Bearer "+name)
			}
			response, err := client.Do(request)
			if err != nil {
				h.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode != want {
				h.Errorf("kubelet of %s with token %.11q: got status %d, want %d", node.Name, name, response.StatusCode, want)
			}
		}
	}
}

func (h harness) unitGroups() {
	for _, node := range h.open().Nodes {
		for _, unit := range []string{"kubelet", "containerd", "kube-proxy"} {
			raw, err := os.ReadFile(filepath.Join(node.CgroupV2, unit, "cgroup.procs"))
			pids := strings.Fields(string(raw))
			if err != nil || len(pids) == 0 {
				h.Errorf("group %s of %s: got %v, %v, want its process", unit, node.Name, pids, err)
				continue
			}
			command, err := os.ReadFile("/proc/" + pids[0] + "/cmdline")
			if err != nil || !bytes.Contains(command, []byte(unit)) {
				h.Errorf("group %s of %s: holds %q, %v", unit, node.Name, command, err)
			}
		}
	}
}

// nodeFolders looks at what pods with hostPaths count on.
func (h harness) nodeFolders() {
	for _, node := range h.open().Nodes {
		for _, check := range [][]string{
			{"test", "-S", "/run/containerd/containerd.sock"},
			{"test", "-S", "/var/run/nri/nri.sock"},
			{"test", "-d", "/run/netns"},
			{"sh", "-c", "stat -f -c %T /sys/fs/bpf | grep -q bpf"},
			{"sh", "-c", "grep -q ' /sys/fs/bpf rw.* shared:' /proc/self/mountinfo"},
		} {
			if out, err := node.Command(h.ctx, check...).CombinedOutput(); err != nil {
				h.Errorf("on %s: %v: %v: %s", node.Name, check, err, out)
			}
		}
		if out, err := node.Command(h.ctx, "hostname").Output(); strings.TrimSpace(string(out)) != node.Name {
			h.Errorf("host name of %s: got %q, %v", node.Name, out, err)
		}
		// What one puts into /run or a layered folder does not show on the machine.
		for _, name := range []string{"/run/weft-probe", "/opt/weft-probe"} {
			if out, err := node.Command(h.ctx, "touch", name).CombinedOutput(); err != nil {
				h.Fatalf("%v: %s", err, out)
			}
			if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
				h.Errorf("%s of %s shows on the machine: %v", name, node.Name, err)
			}
		}
	}
}
