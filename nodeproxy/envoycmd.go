package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/weftmesh/weft/nodeproxy/internal/envoy"
)

// envoyID is the uid and gid of Envoy: its own, as other images use the usual ones.
const envoyID = 15001

func newEnvoyCommand() *cobra.Command {
	c := envoy.Config{UID: envoyID, GID: envoyID}
	var level string
	command := &cobra.Command{
		Use: "envoy", Short: "Supervise the node's Envoy", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			log, err := newLog(level)
			if err != nil {
				return err
			}
			if c.Launcher, err = os.Executable(); err != nil {
				return fmt.Errorf("find own program: %w", err)
			}
			if c.NodeID == "" {
				return fmt.Errorf("set --node-name, or NODE_NAME")
			}
			c.Log, c.LogLevel = log, "warning"
			return envoy.New(c).Run(command.Context())
		},
	}
	f := command.Flags()
	f.StringVar(&c.Binary, "envoy", "/usr/local/bin/envoy", "Envoy's program")
	f.StringVar(&c.RunDir, "run-dir", "/run/weft", "private folder of the sockets, shared with the agent")
	f.StringVar(&c.NodeID, "node-name", os.Getenv("NODE_NAME"), "name of the node")
	f.StringVar(&c.PodUID, "pod-uid", os.Getenv("POD_UID"), "uid of the pod that this runs in")
	f.StringVar(&c.CgroupRoot, "cgroup-root", "/sys/fs/cgroup", "where the node's cgroup v2 is mounted")
	f.StringVar(&c.SelfCgroup, "self-cgroup", "/sys/fs/cgroup", "this container's own cgroup file system, for its memory limit")
	f.IntVar(&c.Concurrency, "concurrency", 2, "Envoy's worker threads")
	f.DurationVar(&c.DrainTimeout, "drain-timeout", 30*time.Second, "time that a stopping Envoy waits for its connections")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	return command
}

func newEnvoyExecCommand() *cobra.Command {
	return &cobra.Command{
		Use: "envoy-exec", Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return envoy.Exec() },
	}
}

func newEnvoyBrokerCommand() *cobra.Command {
	return &cobra.Command{
		Use: "envoy-broker", Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return envoy.Broker() },
	}
}

func agentSocket(runDir string) string { return filepath.Join(runDir, envoy.AgentSocket) }
