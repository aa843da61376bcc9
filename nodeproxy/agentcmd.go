package main

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/nodeproxy/internal/agent"
)

// collectAt is the growth of the heap, in percent, at which the agent collects garbage: it is idle but for bursts, and its memory
// counts on every node. GOGC says otherwise.
const collectAt = 50

func newAgentCommand() *cobra.Command {
	c := agent.Config{EnvoyUID: envoyID, EnvoyGID: envoyID, Settle: 500 * time.Millisecond}
	var level string
	command := &cobra.Command{
		Use: "agent", Short: "Enrol this node's pods", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			log, err := newLog(level)
			if err != nil {
				return err
			}
			if c.Node == "" {
				return fmt.Errorf("set --node-name, or NODE_NAME")
			}
			if os.Getenv("GOGC") == "" {
				debug.SetGCPercent(collectAt)
			}
			c.Log, c.AgentSocket, c.Version = log, agentSocket(c.RunDir), command.Root().Version
			if err := agent.Run(command.Context(), c); !errors.Is(err, agent.ErrSucceeded) {
				return err
			}
			return standBy()
		},
	}
	f := command.Flags()
	f.StringVar(&c.Node, "node-name", os.Getenv("NODE_NAME"), "name of the node")
	f.StringVar(&c.PodUID, "pod-uid", os.Getenv("POD_UID"), "uid of the pod that this runs in")
	f.StringVar(&c.Controller, "controller", "weft-controlplane.weft-system.svc:15020", "host:port of the controller")
	f.StringVar(&c.Namespace, "namespace", "weft-system", "weft's own namespace")
	f.StringVar(&c.TokenFile, "token-file", "/etc/weft/token/token", "projected token of the agent's service account, audience weft-ca")
	f.StringVar(&c.BundleFile, "bundle-file", "/etc/weft/bundle/ca.crt", "trust bundle")
	f.StringVar(&c.RunDir, "run-dir", "/run/weft", "private folder of the sockets, shared with Envoy's supervisor")
	f.StringVar(&c.BPFFS, "bpffs", "/sys/fs/bpf", "the node's bpffs")
	f.StringVar(&c.CgroupRoot, "cgroup-root", "/sys/fs/cgroup", "where the node's cgroup v2 is mounted")
	f.StringVar(&c.KubeletCgroup, "kubelet-cgroup", "", "kubelet's cgroup below --cgroup-root; empty: no probe passes a Strict pod")
	f.StringVar(&c.NRISocket, "nri-socket", "/var/run/nri/nri.sock", "NRI socket of the container runtime")
	f.StringVar(&c.NetnsDir, "netns-dir", "/run/netns", "the runtime's network namespaces")
	f.StringVar(&c.BootIDFile, "boot-id-file", "/proc/sys/kernel/random/boot_id", "file that names the node's boot")
	f.StringVar(&c.Metrics, "metrics", ":15021", "address of /metrics, /healthz and /readyz")
	f.DurationVar(&c.Settle, "settle", c.Settle, "time after which Envoys' workers have what Envoys acknowledged: a pod enforces, or loses its listeners, no sooner")
	f.DurationVar(&c.Linger, "linger", 10*time.Minute, "time that they stay at most while connections use them")
	f.DurationVar(&c.DrainTimeout, "drain-timeout", 30*time.Second, "time that a stopping Envoy waits for its connections: the agent that leaves for good waits with it")
	f.BoolVar(&c.AccessLog, "access-log", false, "one JSON line for each inbound connection or request")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	return command
}

// standBy begins the agent anew, in its process: nothing that it had open or under way is left, and it waits for the node.
func standBy() error {
	program, err := os.Executable()
	if err == nil {
		err = unix.Exec(program, os.Args, os.Environ())
	}
	return fmt.Errorf("stand by for the agent that took the node: %w", err)
}
