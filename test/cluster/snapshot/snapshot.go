// Package snapshot records what a machine holds (processes, namespaces, mounts, control groups, links, routes, nftables
// rules, BPF objects, sysctls, folders), so that a test can show that something it started and removed left nothing.
package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"time"
)

// Kinds of entries.
const (
	Process        = "process"
	NetNamespace   = "network namespace"
	MountNamespace = "mount namespace"
	Mount          = "mount"
	InnerMount     = "mount in another namespace"
	ControlGroup   = "control group"
	Link           = "link"
	Route          = "route"
	Rule           = "routing rule"
	NFTables       = "nftables"
	InnerNFTables  = "nftables in another namespace"
	BPFLink        = "bpf link"
	BPFProgram     = "bpf program"
	BPFMap         = "bpf map"
	Sysctl         = "sysctl"
	Folder         = "folder entry"
)

// Snapshot maps kinds to entries, an entry's key to what it is or holds.
type Snapshot map[string]map[string]string

// Change is one difference.
type Change struct {
	Kind, Key string
	// Before and After are what the entry held; empty where it did not exist.
	Before, After string
}

func (c Change) String() string {
	switch {
	case c.Before == "":
		return fmt.Sprintf("new %s %s (%s)", c.Kind, c.Key, c.After)
	case c.After == "":
		return fmt.Sprintf("lost %s %s (%s)", c.Kind, c.Key, c.Before)
	}
	return fmt.Sprintf("changed %s %s: %s, was %s", c.Kind, c.Key, c.After, c.Before)
}

// Take records the machine as the calling process sees it. It needs root.
func Take(ctx context.Context) (Snapshot, error) {
	s := Snapshot{}
	for _, part := range []struct {
		what string
		take func(context.Context, Snapshot) error
	}{
		{"processes", takeProcesses}, {"mounts", takeMounts}, {"control groups", takeGroups}, {"links and routes", takeNetwork},
		{"nftables", takeNFTables}, {"BPF objects", takeBPF}, {"sysctls", takeSysctls}, {"folders", takeFolders},
	} {
		if err := part.take(ctx, s); err != nil {
			return nil, fmt.Errorf("record %s: %w", part.what, err)
		}
	}
	return s, nil
}

func (s Snapshot) add(kind, key, value string) {
	if s[kind] == nil {
		s[kind] = map[string]string{}
	}
	if value == "" {
		value = "present"
	}
	s[kind][key] = value
}

func (s Snapshot) has(kind, key string) bool {
	_, ok := s[kind][key]
	return ok
}

// Diff lists what changed, sorted by kind and key.
func Diff(before, after Snapshot) []Change {
	var out []Change
	kinds := map[string]bool{}
	for _, s := range []Snapshot{before, after} {
		for kind := range s {
			kinds[kind] = true
		}
	}
	for kind := range kinds {
		for key, old := range before[kind] {
			if current := after[kind][key]; current != old {
				out = append(out, Change{Kind: kind, Key: key, Before: old, After: current})
			}
		}
		for key, current := range after[kind] {
			if _, known := before[kind][key]; !known {
				out = append(out, Change{Kind: kind, Key: key, After: current})
			}
		}
	}
	sort.Slice(out, func(i, j int) bool {
		return out[i].Kind < out[j].Kind || out[i].Kind == out[j].Kind && out[i].Key < out[j].Key
	})
	return out
}

// Settle takes snapshots until none of the changes since before counts, or ctx ends; then it returns those that are
// left. The kernel removes namespaces, mounts and BPF objects some time after their last user. ours says whether a
// change can be the test's own: nil counts all, which suits a machine on which nothing else happens.
func Settle(ctx context.Context, before Snapshot, ours func(Change) bool) ([]Change, error) {
	return settle(ctx, Take, before, ours)
}

func settle(ctx context.Context, take func(context.Context) (Snapshot, error), before Snapshot, ours func(Change) bool) ([]Change, error) {
	var left []Change
	for {
		after, err := take(ctx)
		if err != nil && ctx.Err() != nil && len(left) > 0 {
			return left, nil // time ran out in the midst of a snapshot: the one before counts
		}
		if err != nil {
			return nil, err
		}
		left = nil
		for _, change := range Diff(before, after) {
			if ours == nil || ours(change) {
				left = append(left, change)
			}
		}
		if len(left) == 0 {
			return nil, nil
		}
		select {
		case <-ctx.Done():
			return left, nil
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// clusters matches the control groups of embedded clusters (cluster.Config.Prefix). What is in other namespaces is
// recorded for their processes alone: other programs mount and unmount in theirs all the time.
var clusters = regexp.MustCompile(`^/weft[0-9a-f]{6}/`)

// takeProcesses records user processes, the network and mount namespaces that any process is in, and what these hold.
func takeProcesses(ctx context.Context, s Snapshot) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	self := fmt.Sprint(os.Getpid())
	own := map[string]bool{namespace("self", "mnt"): true, namespace("self", "net"): true}
	for _, entry := range entries {
		pid := entry.Name()
		if pid[0] < '0' || pid[0] > '9' || pid == self {
			continue
		}
		exe, err := os.Readlink(filepath.Join("/proc", pid, "exe"))
		if err != nil {
			continue // a kernel thread, or gone
		}
		stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
		if err != nil {
			continue
		}
		// The name, in parentheses, may hold blanks; the start time is the 20th field after it.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) < 20 || fields[0] == "Z" {
			continue
		}
		group, _ := os.ReadFile(filepath.Join("/proc", pid, "cgroup"))
		v2 := ""
		for _, line := range strings.Split(string(group), "\n") {
			if path, ok := strings.CutPrefix(line, "0::"); ok {
				v2 = path
			}
		}
		s.add(Process, pid+" started at "+fields[19], exe+" in control group "+v2)
		if ns := namespace(pid, "mnt"); ns != "" && !s.has(MountNamespace, ns) {
			s.add(MountNamespace, ns, "in use")
			if !own[ns] && clusters.MatchString(v2) {
				takeInnerMounts(s, ns, pid, v2)
			}
		}
		if ns := namespace(pid, "net"); ns != "" && !s.has(NetNamespace, ns) {
			s.add(NetNamespace, ns, "in use")
			if !own[ns] && clusters.MatchString(v2) {
				takeInnerTables(ctx, s, ns, pid, v2)
			}
		}
	}
	return nil
}

// namespace names the namespace that a process is in; empty if it is gone.
func namespace(pid, kind string) string {
	name, _ := os.Readlink(filepath.Join("/proc", pid, "ns", kind))
	return name
}

// takeFolders records the entries of folders in which software of a node makes folders of its own.
func takeFolders(_ context.Context, s Snapshot) error {
	for _, folder := range []string{"/etc", "/opt", "/run", "/run/netns", "/var/lib", "/var/log", "/usr/libexec", "/sys/fs/bpf"} {
		entries, err := os.ReadDir(folder)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		for _, entry := range entries {
			s.add(Folder, filepath.Join(folder, entry.Name()), entry.Type().String())
		}
	}
	return nil
}
