// Command cluster starts, stops and operates the embedded Kubernetes; the make targets call it from the clone's root.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/weftmesh/weft/test/cluster"
)

func main() {
	// The same binary is pid 1 of each machine.
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case cluster.CommandStage:
			exit(cluster.Stage(os.Args[2]))
		case cluster.CommandInit:
			exit(cluster.Init(os.Args[2]))
		}
	}
	// A root shell got by su does not have the folders of nft and modprobe.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := cluster.Root()
	if err != nil {
		exit(err)
	}
	exit(commands(dir).ExecuteContext(ctx))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func commands(dir string) *cobra.Command {
	root := &cobra.Command{Use: "cluster", Short: "The embedded Kubernetes of weft's demo, tests and benchmarks", SilenceUsage: true, SilenceErrors: true}
	config := cluster.Config{Dir: dir}
	ranges := func(c *cobra.Command) *cobra.Command {
		c.Flags().IntVar(&config.Nodes, "nodes", 2, fmt.Sprintf("number of nodes, 1 to %d", cluster.MaxNodes))
		c.Flags().IntVar(&config.Slot, "slot", 0, fmt.Sprintf("address ranges to use, 0 to %d; two clusters on one machine need two slots", cluster.MaxSlot))
		return c
	}
	var n int
	var hard bool
	node := func(c *cobra.Command) *cobra.Command {
		c.Flags().IntVar(&n, "n", 0, "the node's number, from 1")
		return c
	}
	stop := node(&cobra.Command{Use: "node-stop", Short: "End a node as a shutdown does, or as a power cut with --hard", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return cluster.StopNode(c.Context(), dir, n, hard) }})
	stop.Flags().BoolVar(&hard, "hard", false, "end it like a power cut")
	root.AddCommand(
		ranges(&cobra.Command{Use: "up", Short: "Build what is missing and start the cluster", Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error { return cluster.Up(c.Context(), config) }}),
		ranges(&cobra.Command{Use: "check", Short: "List everything the machine lacks", Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error { return cluster.Preflight(c.Context(), config) }}),
		&cobra.Command{Use: "build", Short: "Build the programs and images into the cache", Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error {
				folder, err := cluster.Build(c.Context(), config)
				if err == nil {
					fmt.Println(folder)
				}
				return err
			}},
		&cobra.Command{Use: "down", Short: "End the cluster and remove everything but its logs", Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error { return cluster.Down(c.Context(), config) }},
		&cobra.Command{Use: "load FILE...", Short: "Put OCI or docker image tarballs on all nodes", Args: cobra.MinimumNArgs(1),
			RunE: func(c *cobra.Command, files []string) error { return cluster.Load(c.Context(), dir, files...) }},
		stop,
		node(&cobra.Command{Use: "node-start", Short: "Start a stopped node, with a new boot id", Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error { return cluster.StartNode(c.Context(), dir, n) }}),
		&cobra.Command{Use: "require [PLUGIN...]", Short: "Let containerd make no container while these NRI plugins are missing",
			RunE: func(c *cobra.Command, plugins []string) error { return cluster.Require(c.Context(), dir, plugins...) }},
		&cobra.Command{Use: "status", Short: "Show the machines and how to enter them", Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error {
				text, err := cluster.Status(c.Context(), dir)
				fmt.Print(text)
				return err
			}},
		&cobra.Command{Use: "cache-clean", Short: "Delete the built programs of all versions", Args: cobra.NoArgs,
			RunE: func(c *cobra.Command, _ []string) error { return cluster.CleanCache(c.Context(), config) }},
	)
	return root
}
