package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
)

// Cluster is a running cluster, as tests see it.
type Cluster struct {
	// Dir is the clone it was started from.
	Dir string
	// Kubeconfig is the administrator's client configuration.
	Kubeconfig string
	// Kubectl and Helm are commands that use it.
	Kubectl, Helm string
	// Logs is the folder with the components' logs: n1-kubelet.log, cp-kube-apiserver.log and so on.
	Logs string
	// HostCgroup is where every node sees its cgroup v2 mount: the chart's value host.cgroup.
	HostCgroup string
	// ControlPlane is where the API server runs.
	ControlPlane Machine
	Nodes        []Node
}

// Machine is one set of namespaces.
type Machine struct {
	// Name is also the host name.
	Name string
	// PID is the machine's pid 1 as the caller sees it; 0 while the machine is stopped. It changes with each start.
	PID int
	// NetnsPath names its network namespace; empty while it is stopped.
	NetnsPath string
	// CgroupV2 is the folder of its control group; its units have groups of their own there: "kubelet", "containerd".
	CgroupV2 string
	// IPv4 and IPv6 are its addresses in the node network, the same before and after a reboot.
	IPv4, IPv6 netip.Addr
}

// Node is a machine that runs pods.
type Node struct {
	Machine
	// Number counts from 1.
	Number int
	// Folder holds its state folders; "etc-containerd/conf.d" there is /etc/containerd/conf.d on the node.
	Folder string
	// Pods4 and Pods6 are its pods' address ranges.
	Pods4, Pods6 netip.Prefix
}

// Root is the clone's root: the nearest parent of the working folder that holds the folder test/cluster.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find the clone: %w", err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "test", "cluster", "k8s", "go.mod")); err == nil {
			return dir, nil
		}
		if dir == "/" {
			return "", errors.New("find the clone: run this inside it")
		}
		dir = filepath.Dir(dir)
	}
}

// Open describes the cluster that runs from a clone. Open it again after a node was stopped or started.
func Open(dir string) (*Cluster, error) {
	s, err := loadState(dir)
	if err != nil {
		return nil, errDown(err)
	}
	out := s.cluster()
	if out.ControlPlane.PID == 0 {
		return nil, errors.New("open the cluster: its control plane does not run: run make cluster-up, which cleans up first")
	}
	return out, nil
}

// cluster describes what the state says and what runs of it.
func (s *state) cluster() *Cluster {
	out := &Cluster{Dir: s.Dir, Kubeconfig: s.path("kubeconfig"), Kubectl: s.path("kubectl"), Helm: s.path("helm"), Logs: s.path("logs"), HostCgroup: s.Layout.InsideV2()}
	plane4, plane6 := s.controlPlane()
	out.ControlPlane = s.describe(controlPlaneName, plane4, plane6)
	for n := 1; n <= s.Nodes; n++ {
		v4, v6 := s.node(n)
		node := Node{Machine: s.describe(nodeName(n), v4, v6), Number: n, Folder: s.path(nodeName(n))}
		node.Pods4, node.Pods6 = s.podRange(n)
		out.Nodes = append(out.Nodes, node)
	}
	return out
}

func (s *state) describe(name string, v4, v6 netip.Addr) Machine {
	m := Machine{Name: name, CgroupV2: s.Layout.V2Path(s.group(name)), IPv4: v4, IPv6: v6}
	if pid, err := s.initPID(name); err == nil {
		m.PID, m.NetnsPath = pid, fmt.Sprintf("/proc/%d/ns/net", pid)
	}
	return m
}

// Command runs a program inside the machine, in all of its namespaces, as root. It stays in the caller's own control
// groups. The programs of the cluster (ctr, k8s) are in its PATH.
func (m Machine) Command(ctx context.Context, argv ...string) *exec.Cmd {
	all := append(enter(m.PID), argv...)
	command := exec.CommandContext(ctx, all[0], all[1:]...)
	command.Env = []string{"PATH=" + nodePath, "HOME=/root"}
	return command
}

// NetCommand runs a program of the caller's own file system in the machine's network namespace: tcpdump, nft.
func (m Machine) NetCommand(ctx context.Context, argv ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + m.NetnsPath, "--"}, argv...)...)
}

// KubectlCommand runs kubectl as the administrator.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, c.Kubectl, args...)
}

// HelmCommand runs helm as the administrator.
func (c *Cluster) HelmCommand(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, c.Helm, args...)
}
