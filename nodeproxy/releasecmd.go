package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/weftmesh/weft/redirect"
)

func newReleaseCommand() *cobra.Command {
	var pins string
	command := &cobra.Command{
		Use: "release", Short: "Take weft out of this node's kernel, without an agent", Args: cobra.NoArgs,
		Long: "release removes every hook and map of weft from the node, from the pins alone. Every pod is outside the mesh then.\n" +
			"Connections that Envoy holds go on in it until one end closes them or Envoy ends. A pod that made one keeps the\n" +
			"local routes to Envoy (127.64.0.0/10 and fd77:5eed::/64) as long as it lives; they lead nowhere else.",
		RunE: func(command *cobra.Command, _ []string) error {
			if err := redirect.Release(pins, true); err != nil {
				return fmt.Errorf("release %s: %w", pins, err)
			}
			fmt.Fprintln(command.OutOrStdout(), "no hook or map of weft is left in the kernel under", pins)
			return nil
		},
	}
	command.Flags().StringVar(&pins, "pin-dir", "/sys/fs/bpf/weft", "folder of the pins")
	return command
}
