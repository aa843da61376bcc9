package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/weftmesh/weft/test/bench/machine"
	"github.com/weftmesh/weft/test/bench/report"
)

// describe says what machine this is, before anything runs on it.
func describe(ctx context.Context, o options) (report.Machine, error) {
	m, err := machine.Here(ctx, o.root)
	if err != nil {
		return m, err
	}
	if out, err := exec.CommandContext(ctx, o.fortio, "version").Output(); err == nil {
		m.Fortio, _, _ = strings.Cut(strings.TrimSpace(string(out)), " ")
	} else if o.wants("traffic") {
		return m, fmt.Errorf("run fortio: %w: make fortio fetches it", err)
	}
	return m, nil
}

// used is the processor time of a cgroup's processes, those that have ended too, in µs.
func used(cgroup string) (float64, error) {
	raw, err := os.ReadFile(filepath.Join(cgroup, "cpu.stat"))
	if err != nil {
		return 0, fmt.Errorf("read processor time: %w", err)
	}
	usec, err := strconv.ParseFloat(machine.Field(strings.ReplaceAll(string(raw), " ", ":"), "usage_usec"), 64)
	if err != nil {
		return 0, fmt.Errorf("read processor time of %s: %w", cgroup, err)
	}
	return usec, nil
}

// busy is what all processors have done since the start, in µs: all but idle time and waiting.
func busy() (float64, error) {
	raw, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	return busyOf(string(raw))
}

// tick is the kernel's unit in /proc/stat (USER_HZ) in µs.
const tick = 10000

func busyOf(stat string) (float64, error) {
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	if len(fields) < 8 || fields[0] != "cpu" {
		return 0, errors.New("read /proc/stat: no line for all processors")
	}
	sum := 0.0
	for _, i := range []int{1, 2, 3, 6, 7} { // user, nice, system, irq, softirq
		v, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return 0, fmt.Errorf("read /proc/stat: %w", err)
		}
		sum += v
	}
	return sum * tick, nil
}

// pids of a cgroup, without those below it.
func pids(cgroup string) ([]int, error) {
	raw, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var out []int
	for _, text := range strings.Fields(string(raw)) {
		pid, err := strconv.Atoi(text)
		if err != nil {
			return nil, err
		}
		out = append(out, pid)
	}
	return out, nil
}

// memory of a process in KiB.
func memory(pid int) (rss, pss uint64, err error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, 0, err
	}
	for name, value := range map[string]*uint64{"Rss": &rss, "Pss": &pss} {
		if *value, err = strconv.ParseUint(strings.TrimSuffix(machine.Field(string(raw), name), " kB"), 10, 64); err != nil {
			return 0, 0, fmt.Errorf("read memory of process %d: %w", pid, err)
		}
	}
	return rss, pss, nil
}

// program is what a process runs and with which word first: "envoy", "nodeproxy envoy-broker".
func program(pid int) string {
	raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	arguments := strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00")
	name := filepath.Base(arguments[0])
	if len(arguments) > 1 && !strings.HasPrefix(arguments[1], "-") {
		name += " " + arguments[1]
	}
	return name
}
