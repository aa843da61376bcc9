// Package machine says what a benchmark ran on.
package machine

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/weftmesh/weft/test/bench/report"
	"github.com/weftmesh/weft/test/contract/proxy"
)

// Here is this machine, before anything runs on it, and the revision of the checkout at root.
func Here(ctx context.Context, root string) (report.Machine, error) {
	m := report.Machine{Started: time.Now(), Processors: runtime.NumCPU(), Arch: runtime.GOARCH, Envoy: proxy.Version, Model: "unknown model", Revision: "unknown"}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return m, err
	}
	version, _, _ := strings.Cut(strings.TrimSpace(string(kernel)), "-") // what follows is the machine's, not the kernel's
	m.Kernel = "Linux " + version
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return m, err
	}
	if _, err := fmt.Sscan(string(load), &m.Load[0], &m.Load[1], &m.Load[2]); err != nil {
		return m, fmt.Errorf("read load average: %w", err)
	}
	if processors, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if model := Field(string(processors), "model name"); model != "" {
			m.Model = model
		}
	}
	if memory, err := os.ReadFile("/proc/meminfo"); err == nil {
		kib, _ := strconv.ParseUint(strings.TrimSuffix(Field(string(memory), "MemTotal"), " kB"), 10, 64)
		m.MemoryMiB = kib >> 10
	}
	git := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty", "--abbrev=12")
	git.Dir = root
	if out, err := git.Output(); err == nil {
		m.Revision = strings.TrimSpace(string(out))
	}
	return m, nil
}

// Field is the value of the first line "name: value" of a text.
func Field(text, name string) string {
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(line, ":")
		if ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
