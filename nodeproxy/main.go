// Command nodeproxy is what runs on each node: the agent, and the supervisor of the node's Envoy.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// A thread that a goroutine has left in a pod's network namespace is thrown away, but for the main thread, which would keep
// that namespace for ever: it stays with main.
func init() { runtime.LockOSThread() }

func main() {
	root := &cobra.Command{Use: "nodeproxy", Short: "weft on a node", SilenceUsage: true, Version: version(debug.ReadBuildInfo())}
	root.AddCommand(newAgentCommand(), newEnvoyCommand(), newEnvoyExecCommand(), newEnvoyBrokerCommand(), newReleaseCommand())
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := root.ExecuteContext(ctx); err != nil {
		os.Exit(1)
	}
}

func newLog(level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("read --log-level: %w", err)
	}
	return slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: l})), nil
}

// version names the build: the module's version, or the revision that it was built from.
func version(info *debug.BuildInfo, ok bool) string {
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return "unknown"
}
