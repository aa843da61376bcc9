package cluster

import (
	"context"
	"crypto/rand"
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

//go:embed manifests
var manifests embed.FS

// sharedSysctls belong to the whole kernel, and kubelet insists on setting them: each node sees files with the values
// it wants in their place.
var sharedSysctls = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// nodeBinds show a node's folders at the places where any Kubernetes node has them.
var nodeBinds = []bind{
	{Source: "kubernetes", Target: confFolder, ReadOnly: true},
	{Source: "kubelet", Target: "/var/lib/kubelet"},
	{Source: "containerd", Target: "/var/lib/containerd"},
	{Source: "cni", Target: "/var/lib/cni"},
	{Source: "etc-cni", Target: "/etc/cni"},
	{Source: "etc-containerd", Target: "/etc/containerd"},
	{Source: "etc-nri", Target: "/etc/nri"},
	{Source: "opt-cni", Target: "/opt/cni"},
	{Source: "opt-nri", Target: "/opt/nri"},
	{Source: "log-pods", Target: "/var/log/pods"},
	{Source: "log-containers", Target: "/var/log/containers"},
}

// nodeMachine is containerd, kubelet and kube-proxy of node n.
func (s *state) nodeMachine(n int) machine {
	name := nodeName(n)
	v4, v6 := s.node(n)
	pods4, pods6 := s.podNet()
	k8s := binFolder + "/k8s"
	masks := map[string]string{"kernel/random/boot_id": newBootID()}
	for key, value := range sharedSysctls {
		masks[key] = value
	}
	return machine{
		Name:   name,
		Group:  s.group(name),
		Folder: s.path(name),
		Logs:   s.path("logs"),
		Layout: s.Layout,
		Binds:  append([]bind{{Source: s.Cache + "/bin", Target: binFolder, ReadOnly: true}}, nodeBinds...),
		Sysctls: map[string]string{
			"net/ipv4/ip_forward":          "1",
			"net/ipv6/conf/all/forwarding": "1",
			// Replies between two pods of one node pass the bridge; kube-proxy's rules must see them.
			"net/bridge/bridge-nf-call-iptables":  "1",
			"net/bridge/bridge-nf-call-ip6tables": "1",
		},
		Masks: masks,
		Files: map[string]string{
			"/etc/hosts":       fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n%s %s\n%s %s\n", v4, name, v6, name),
			"/etc/resolv.conf": "# Nothing outside the cluster is reachable from a node.\n",
		},
		Units: []unit{
			{Name: "containerd", Argv: []string{binFolder + "/containerd"}},
			{Name: "kubelet", WaitFor: "/run/containerd/containerd.sock", Argv: []string{k8s, "kubelet",
				"--config=/var/lib/kubelet/config.yaml", "--kubeconfig=" + confFolder + "/kubelet.conf",
				"--hostname-override=" + name, fmt.Sprintf("--node-ip=%s,%s", v4, v6), "--cert-dir=/var/lib/kubelet/pki"}},
			{Name: "kube-proxy", Argv: []string{k8s, "kube-proxy",
				"--kubeconfig=" + confFolder + "/proxy.conf", "--proxy-mode=nftables", "--hostname-override=" + name,
				// Traffic from these ranges is never masqueraded: pods see each other's own addresses.
				fmt.Sprintf("--cluster-cidr=%s,%s", pods4, pods6),
				// The conntrack table's size belongs to the whole kernel.
				"--conntrack-max-per-core=0", "--conntrack-min=0"}},
		},
	}
}

// prepareNode makes node n's folders and configuration files.
func (s *state) prepareNode(n int) error {
	name := nodeName(n)
	for _, b := range nodeBinds {
		if err := os.MkdirAll(s.path(name, b.Source), 0o755); err != nil {
			return fmt.Errorf("make a folder of %s: %w", name, err)
		}
	}
	pods4, pods6 := s.podRange(n)
	dns4, dns6 := s.dnsService()
	values := strings.NewReplacer(
		"@PODS4@", pods4.String(), "@PODS6@", pods6.String(),
		"@DNS4@", dns4.String(), "@DNS6@", dns6.String(),
		"@PAUSE@", PauseImage, "@CONF@", confFolder)
	for source, target := range map[string]string{
		"containerd.toml": "etc-containerd/config.toml",
		"cni.conflist":    "etc-cni/net.d/10-bridge.conflist",
		"kubelet.yaml":    "kubelet/config.yaml",
	} {
		content, err := manifests.ReadFile("manifests/" + source)
		if err != nil {
			return fmt.Errorf("read %s: %w", source, err)
		}
		if err := writeFile(s.path(name, target), []byte(values.Replace(string(content))), 0o644); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(s.path(name, "etc-containerd/conf.d"), 0o755); err != nil {
		return fmt.Errorf("make a folder of %s: %w", name, err)
	}
	for _, plugin := range []string{"bridge", "loopback", "host-local", "portmap"} {
		content, err := os.ReadFile(filepath.Join(s.Cache, "cni", plugin))
		if err != nil {
			return fmt.Errorf("read CNI plugin: %w", err)
		}
		if err := writeFile(s.path(name, "opt-cni/bin", plugin), content, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// bootNode starts node n with a new boot id and joins it to the network.
func (s *state) bootNode(ctx context.Context, n int) error {
	plane, err := s.initPID(controlPlaneName)
	if err != nil {
		return err
	}
	_, err = s.startMachine(ctx, s.nodeMachine(n), func(pid int) error { return s.connectNode(n, plane, pid) })
	return err
}

// newBootID is a random UUID, as the kernel makes one at each boot.
func newBootID() string {
	raw := make([]byte, 16)
	_, _ = rand.Read(raw) // never fails
	raw[6], raw[8] = raw[6]&0x0f|0x40, raw[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", raw[:4], raw[4:6], raw[6:8], raw[8:10], raw[10:])
}
