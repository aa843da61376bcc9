// Command weft looks at the mesh from outside, with the rights of whoever runs it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"
)

func main() {
	command := &cobra.Command{Use: "weft", Short: "Look at the mesh", SilenceUsage: true}
	command.AddCommand(newStatusCommand())
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command.ExecuteContext(ctx); err != nil {
		os.Exit(1)
	}
}

func newStatusCommand() *cobra.Command {
	var kubeconfig, namespace, system string
	command := &cobra.Command{
		Use: "status", Short: "Show pods in the mesh, policies, routes and the MeshConfig, with what keeps them from being in force, Services that stay out, and which controller leads", Args: cobra.NoArgs,
		Long: "status reads the conditions that the controller writes. It exits non-zero if anything is not as it was asked for.",
		RunE: func(command *cobra.Command, _ []string) error {
			rules := clientcmd.NewDefaultClientConfigLoadingRules()
			rules.ExplicitPath = kubeconfig
			config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
			if err != nil {
				return fmt.Errorf("find the API server: %w; set --kubeconfig or KUBECONFIG", err)
			}
			client, err := dynamic.NewForConfig(config)
			if err != nil {
				return fmt.Errorf("make Kubernetes client: %w", err)
			}
			s, err := read(command.Context(), client, namespace)
			if err != nil {
				return err
			}
			s.leader = leads(command.Context(), client, system, time.Now())
			s.print(command.OutOrStdout())
			if s.wrong > 0 {
				return errors.New(plural(s.wrong, "object is", "objects are") + " not in force")
			}
			return nil
		},
	}
	command.Flags().StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig file")
	command.Flags().StringVarP(&namespace, "namespace", "n", "", "one namespace; empty: all")
	command.Flags().StringVar(&system, "system", "weft-system", "weft's own namespace")
	return command
}
