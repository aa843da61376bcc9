package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/test/bench/report"
	"github.com/weftmesh/weft/test/bench/sidecar"
	"github.com/weftmesh/weft/test/contract/golden"
	"github.com/weftmesh/weft/test/contract/proxy"
	"github.com/weftmesh/weft/test/datapath/lab"
)

// Service ports, and what is behind them.
const (
	httpPort, httpRulePort = 80, 81
	grpcPort, grpcRulePort = 90, 91
)

// way is one variant on one placement, ready to be called.
type way struct {
	variant, placement string
	// from is the pod that calls, to the callee, load the cgroup of the generator.
	from, to *lab.Pod
	load     string
	// proxies are the cgroups of the Envoys on the way, app that of the callee's app.
	proxies []string
	app     string
	// http and grpc are addresses of services, echo and sink too.
	http, grpc, echo, sink string
}

// ways are all of them, with what they are made of.
type ways struct {
	*lab.Lab
	options options
	envoy   string
	all     []way
	running []*exec.Cmd
}

// kind is a variant: the pods that it runs between, by the beginning of their names, and whether the callee's policy judges requests.
type kind struct {
	variant, pods string
	judged        bool
}

// kinds in the order of a pair; every second pair has it the other way round. What is compared stands side by side. A new variant
// is a line here, one of report.Variants and one of report.Comparisons, and what enrol is to do for its pods.
var kinds = []kind{
	{report.None, plainPods, false}, {report.Weft, meshPods, false}, {report.Sidecars, sidecarPods, false}, {report.SidecarsL7, sidecarPods, true}, {report.WeftL7, meshPods, true},
}

// The beginnings of pods' names: in the mesh, with a sidecar, with nothing.
const meshPods, sidecarPods, plainPods = "mesh-", "sidecar-", "plain-"

// pods are three for each beginning: a caller and a callee on one node, a callee on the other.
func pods() (out []lab.PodSpec) {
	for i, names := range []string{meshPods, sidecarPods, plainPods} {
		client, server := "", ""
		if names == meshPods {
			client, server = "client", "server"
		}
		last := byte(10 * i)
		out = append(out, lab.PodSpec{Name: names + "client", Account: client, Node: 0, Last: last + 2},
			lab.PodSpec{Name: names + "near", Account: server, Node: 0, Last: last + 3}, lab.PodSpec{Name: names + "far", Account: server, Node: 1, Last: last + 4})
	}
	return out
}

var places = map[string]struct {
	pod  string
	node int
}{"same": {"near", 0}, "cross": {"far", 1}}

// start builds the lab, the sidecars and the apps.
func start(ctx context.Context, o options) (w *ways, err error) {
	w = &ways{options: o}
	ports := []lab.PortSpec{
		{Port: httpPort, Target: portHTTP, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP1},
		{Port: httpRulePort, Target: portHTTPRule, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP1},
		{Port: grpcPort, Target: portGRPC, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP2},
		{Port: grpcRulePort, Target: portGRPCRule, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP2},
		{Port: portEcho, Target: portEcho, Class: meshv1.Class_CLASS_TCP, Protocol: meshv1.Protocol_PROTOCOL_TCP},
		{Port: portSink, Target: portSink, Class: meshv1.Class_CLASS_TCP, Protocol: meshv1.Protocol_PROTOCOL_TCP},
	}
	w.Lab, err = lab.New(ctx, lab.Spec{Module: o.root, AsOnNodes: true, Concurrency: o.workers, Pods: pods(), Services: []lab.ServiceSpec{
		{Name: "near", Last: 1, Ports: ports, Pods: []string{meshPods + "near"}, IPv4: true}, {Name: "far", Last: 2, Ports: ports, Pods: []string{meshPods + "far"}, IPv4: true}}})
	if err != nil {
		return w, err
	}
	if w.envoy, err = lab.Envoy(); err != nil {
		return w, err
	}
	for _, step := range []func(context.Context) error{w.apps, w.enrol, w.sidecars, w.describe} {
		if err := step(ctx); err != nil {
			return w, err
		}
	}
	return w, nil
}

// stop ends what start started.
func (w *ways) stop() error {
	for _, cmd := range w.running {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	if w.Lab == nil {
		return nil
	}
	for node := range w.Nodes() {
		dirs, _ := filepath.Glob(filepath.Join(w.Cgroup(node), "*"))
		for _, dir := range dirs {
			if filepath.Base(dir) != "envoy" {
				_ = os.Remove(dir)
			}
		}
	}
	return w.Close()
}

// cgroup of a pod's processes: within the node's for pods of the mesh, where the hooks see them; beside it for others, for
// which there is no weft on the machine.
func (w *ways) cgroup(pod *lab.Pod, what string) (string, error) {
	path := filepath.Join(lab.Cgroup(), "plain", what+"-"+pod.Name)
	if pod.Account != "" {
		path = filepath.Join(w.Cgroup(pod.Node), what+"-"+pod.Name)
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return "", fmt.Errorf("make cgroup: %w", err)
	}
	return path, nil
}

// command runs a program in a pod and a cgroup.
func command(ctx context.Context, pod *lab.Pod, cgroup string, arguments ...string) (*exec.Cmd, func(), error) {
	dir, err := os.Open(cgroup)
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + pod.Netns()}, arguments...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	return cmd, func() { dir.Close() }, nil
}

// keep starts a program that runs to the end.
func (w *ways) keep(ctx context.Context, pod *lab.Pod, cgroup string, arguments ...string) error {
	cmd, done, err := command(context.WithoutCancel(ctx), pod, cgroup, arguments...)
	if err != nil {
		return err
	}
	defer done()
	log, err := os.Create(filepath.Join(lab.Scratch(), filepath.Base(cgroup)+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %v in pod %s: %w", arguments, pod.Name, err)
	}
	w.running = append(w.running, cmd)
	return nil
}

func (w *ways) apps(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, spec := range pods() {
		if strings.HasSuffix(spec.Name, "client") {
			continue
		}
		pod := w.Pod(spec.Name)
		cgroup, err := w.cgroup(pod, "app")
		if err != nil {
			return err
		}
		if err := w.keep(ctx, pod, cgroup, self, "app"); err != nil {
			return err
		}
	}
	return nil
}

// enrol brings the pods of the mesh into it: Strict, with rules about requests on every second port.
func (w *ways) enrol(ctx context.Context) error {
	strict := &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_STRICT}
	w.Pod(meshPods + "client").Policy = &meshv1.InboundPolicy{DefaultPort: strict}
	judged := func(port uint32, protocol meshv1.Protocol) *meshv1.PortPolicy {
		return &meshv1.PortPolicy{Port: port, Mode: meshv1.Mode_MODE_STRICT, Http: true, Protocol: protocol, Identity: true, Restricted: true,
			Allow: []*meshv1.Rule{{Name: "shop/only[0]", Peers: []*meshv1.Peer{{Match: &meshv1.Peer_SpiffeId{SpiffeId: w.Pod(meshPods + "client").ID()}}}}}}
	}
	for _, name := range []string{"near", "far"} {
		w.Pod(meshPods + name).Policy = &meshv1.InboundPolicy{DefaultPort: strict, Ports: []*meshv1.PortPolicy{
			judged(portHTTPRule, meshv1.Protocol_PROTOCOL_HTTP1), judged(portGRPCRule, meshv1.Protocol_PROTOCOL_HTTP2)}}
	}
	return w.Enrol(ctx)
}

var sidecarPorts = []sidecar.Port{
	{Number: httpPort, Target: portHTTP, Protocol: sidecar.HTTP1}, {Number: httpRulePort, Target: portHTTPRule, Protocol: sidecar.HTTP1, Judged: true},
	{Number: grpcPort, Target: portGRPC, Protocol: sidecar.HTTP2}, {Number: grpcRulePort, Target: portGRPCRule, Protocol: sidecar.HTTP2, Judged: true},
	{Number: portEcho, Target: portEcho, Protocol: sidecar.TCP}, {Number: portSink, Target: portSink, Protocol: sidecar.TCP},
}

// sidecarServices have addresses that nobody else has: the rules take the caller's connections before a route is asked.
var sidecarServices = map[string]string{"near": "10.96.88.11", "far": "10.96.88.12"}

func identity(account string) string {
	return names.SPIFFEID(names.DefaultTrustDomain, lab.Namespace, account)
}

func (w *ways) sidecars(ctx context.Context) error {
	stats, err := keptStats(w.options.root)
	if err != nil {
		return err
	}
	folder := filepath.Join(lab.Scratch(), "sidecar")
	if err := os.Mkdir(folder, 0o755); err != nil {
		return err
	}
	roots := filepath.Join(folder, "roots.crt")
	if err := os.WriteFile(roots, w.Roots(), 0o644); err != nil {
		return err
	}
	for _, name := range []string{"client", "near", "far"} {
		own := filepath.Join(folder, name)
		c := sidecar.Config{Name: name, Admin: filepath.Join(own, "admin"), Chain: filepath.Join(own, "crt"), Key: filepath.Join(own, "key"), Roots: roots, Stats: stats}
		account := "server"
		if name == "client" {
			account = "client"
			for _, callee := range []string{"near", "far"} {
				c.Services = append(c.Services, sidecar.Service{Name: callee, Address: sidecarServices[callee], Ports: sidecarPorts,
					Endpoint: w.Pod(sidecarPods + callee).Addresses[0].String(), Identity: identity("server")})
			}
		} else {
			c.Ports, c.Allowed = sidecarPorts, identity("client")
		}
		if err := w.sidecar(ctx, w.Pod(sidecarPods+name), c, own, account); err != nil {
			return err
		}
	}
	return nil
}

func (w *ways) sidecar(ctx context.Context, pod *lab.Pod, c sidecar.Config, own, account string) error {
	chain, key, err := w.Issue(identity(account))
	if err != nil {
		return err
	}
	bootstrap, err := sidecar.Bootstrap(c)
	if err != nil {
		return err
	}
	if err := os.Mkdir(own, 0o755); err != nil {
		return err
	}
	config := filepath.Join(own, "envoy.json")
	for path, content := range map[string][]byte{c.Chain: chain, c.Key: key, config: bootstrap} {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}
	if err := os.Chown(own, sidecar.User, sidecar.User); err != nil {
		return err
	}
	cgroup, err := w.cgroup(pod, "proxy")
	if err != nil {
		return err
	}
	user := strconv.Itoa(sidecar.User)
	if err := w.keep(ctx, pod, cgroup, "-S", user, "-G", user, w.envoy, "-c", config, "--use-dynamic-base-id", "--disable-hot-restart",
		"--concurrency", strconv.Itoa(w.options.workers), "-l", "warning"); err != nil {
		return err
	}
	rules := exec.CommandContext(ctx, "nsenter", "--net="+pod.Netns(), "nft", "-f", "-")
	rules.Stdin = strings.NewReader(sidecar.Rules())
	if out, err := rules.CombinedOutput(); err != nil {
		return fmt.Errorf("redirect pod %s: %w: %s", pod.Name, err, out)
	}
	// See renew: the translation remembers, too.
	if out, err := exec.CommandContext(ctx, "nsenter", "--net="+pod.Netns(), "sh", "-c", "echo 1 >/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait").CombinedOutput(); err != nil {
		return fmt.Errorf("shorten the translation's memory in pod %s: %w: %s", pod.Name, err, out)
	}
	return nil
}

// keptStats is the StatsConfig of weft's nodes.
func keptStats(root string) (json.RawMessage, error) {
	raw, err := os.ReadFile(filepath.Join(root, "nodeproxy/internal/envoy/testdata/bootstrap.yaml"))
	if err != nil {
		return nil, err
	}
	var file golden.File
	if err := golden.Decode(raw, &file); err != nil {
		return nil, err
	}
	notes, ok := file.Notes.(map[string]any)
	if !ok || notes["statsConfig"] == nil {
		return nil, errors.New("the nodes' bootstrap has no statsConfig")
	}
	return json.Marshal(notes["statsConfig"])
}

// describe lists the ways and waits until each answers.
func (w *ways) describe(ctx context.Context) error {
	for _, p := range report.Placements {
		place := places[p.Name]
		for _, k := range kinds {
			one, err := w.way(k, p.Name, place.pod, place.node)
			if err != nil {
				return err
			}
			w.all = append(w.all, one)
		}
	}
	wait, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for _, one := range w.all {
		if err := proxy.Until(wait, func() error { return w.answers(ctx, one) }); err != nil {
			return fmt.Errorf("wait for %s, %s: %w", one.variant, one.placement, err)
		}
	}
	return nil
}

func (w *ways) way(k kind, placement, callee string, node int) (way, error) {
	out := way{variant: k.variant, placement: placement}
	server := w.Pod(k.pods + callee)
	out.from, out.to = w.Pod(k.pods+"client"), server
	var err error
	if out.load, err = w.cgroup(out.from, "load"); err != nil {
		return out, err
	}
	if out.app, err = w.cgroup(server, "app"); err != nil {
		return out, err
	}
	host, httpAt, grpcAt := sidecarServices[callee], httpPort, grpcPort
	switch k.pods {
	case meshPods:
		host, _, _ = net.SplitHostPort(w.Address(callee, httpPort, false))
		out.proxies = []string{filepath.Join(w.Cgroup(0), "envoy")}
		if node != 0 {
			out.proxies = append(out.proxies, filepath.Join(w.Cgroup(node), "envoy"))
		}
	case sidecarPods:
		for _, pod := range []*lab.Pod{out.from, server} {
			cgroup, err := w.cgroup(pod, "proxy")
			if err != nil {
				return out, err
			}
			out.proxies = append(out.proxies, cgroup)
		}
	default:
		host, httpAt, grpcAt = server.Addresses[0].String(), portHTTP, portGRPC
	}
	if k.judged {
		httpAt, grpcAt = httpRulePort, grpcRulePort
	}
	out.http, out.grpc = fmt.Sprintf("%s:%d", host, httpAt), fmt.Sprintf("%s:%d", host, grpcAt)
	out.echo, out.sink = fmt.Sprintf("%s:%d", host, portEcho), fmt.Sprintf("%s:%d", host, portSink)
	return out, nil
}

// answers asks once over HTTP, from the pod and its cgroup, as the generator will.
func (w *ways) answers(ctx context.Context, one way) error {
	cmd, done, err := command(ctx, one.from, one.load, w.options.fortio, "curl", "-quiet", "-timeout", "2s", "http://"+one.http+"/")
	if err != nil {
		return err
	}
	defer done()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %.300s", err, out)
	}
	return nil
}
