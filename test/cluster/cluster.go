// Package cluster is the embedded Kubernetes: a real cluster of one to four nodes on one Linux machine, for the demo,
// the tests and the benchmarks. It needs no Docker: every node is a set of namespaces (net, mount, pid, uts, ipc,
// cgroup) with a small pid 1 that keeps containerd, kubelet and kube-proxy running; the control plane is one more.
//
// All names on the machine derive from the clone's path (Config.Prefix), all addresses from Config.Slot, and all state
// lies under .cluster/ in the clone. Nodes see their own /run, bpffs, control groups and state folders at the
// places where any Kubernetes node has them.
package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weftmesh/weft/test/cluster/cgroups"
	"golang.org/x/sys/unix"
)

// MaxNodes is the largest number of nodes; MaxSlot the highest Slot.
const (
	MaxNodes = 4
	MaxSlot  = 7
)

// Config is what a cluster is made from.
type Config struct {
	// Dir is the clone's root; state lies in its folder .cluster.
	Dir string
	// Nodes is the number of nodes, 1 to MaxNodes.
	Nodes int
	// Slot chooses the address ranges, 0 to MaxSlot: two clusters on one machine need two slots.
	Slot int
}

// state is what .cluster/cluster.json records, for down to restore and for Open to read.
type state struct {
	Config
	// Layout is the machine's control groups.
	Layout cgroups.Layout
	// Cache is the folder of the programs that the cluster runs.
	Cache string
	// Stopped are the nodes that were stopped and not started again.
	Stopped []int `json:",omitempty"`
	former
}

// former is what the cluster changed of the machine itself, for the last cluster's down to restore.
type former struct {
	// InotifyInstances is fs.inotify.max_user_instances before it was raised; 0 if it was not.
	InotifyInstances int `json:",omitempty"`
	// Controllers were enabled at the cgroup2 root.
	Controllers []string `json:",omitempty"`
	// Modules of the kernel were loaded.
	Modules []string `json:",omitempty"`
}

// inherit takes over what a cluster that runs already has changed: it may end first, and leaves it to the last one.
func (f *former) inherit(other former) {
	if f.InotifyInstances == 0 {
		f.InotifyInstances = other.InotifyInstances
	}
	f.Controllers = union(f.Controllers, other.Controllers)
	f.Modules = union(other.Modules, f.Modules)
}

// union keeps the order: what b has and a has not comes after a.
func union(a, b []string) []string {
	out := slices.Clone(a)
	for _, word := range b {
		if !slices.Contains(out, word) {
			out = append(out, word)
		}
	}
	return out
}

func (c Config) validate() error {
	if c.Nodes < 1 || c.Nodes > MaxNodes {
		return fmt.Errorf("read the number of nodes: %d is not in 1 to %d: set NODES", c.Nodes, MaxNodes)
	}
	if c.Slot < 0 || c.Slot > MaxSlot {
		return fmt.Errorf("read the slot: %d is not in 0 to %d: set SLOT", c.Slot, MaxSlot)
	}
	return nil
}

// Prefix begins the name of everything the cluster puts on the machine: its network link and its control groups.
func (c Config) Prefix() string {
	sum := sha256.Sum256([]byte(c.Dir))
	return "weft" + hex.EncodeToString(sum[:3])
}

// linkName is the machine's end of the veth pair into the cluster.
func (c Config) linkName() string { return c.Prefix() + "h" }

// path is a path in the state folder.
func (c Config) path(parts ...string) string {
	return filepath.Join(append([]string{c.Dir, ".cluster"}, parts...)...)
}

// group is the control group of a machine of the cluster: a node's name, "cp", or "" for the whole cluster.
func (c Config) group(machine string) string { return filepath.Join(c.Prefix(), machine) }

// Address ranges. Everything is dual-stack; slot s has its own.
func (c Config) nodeNet() (v4, v6 netip.Prefix) {
	return prefix("10.%d.0.0/24", 88+c.Slot), prefix("fd00:%d::/64", 88+c.Slot)
}

func (c Config) podNet() (v4, v6 netip.Prefix) {
	return prefix("10.%d.0.0/16", 244-c.Slot), prefix("fd00:%d::/48", 244-c.Slot)
}

func (c Config) serviceNet() (v4, v6 netip.Prefix) {
	return prefix("10.%d.0.0/16", 96+10*c.Slot), prefix("fd00:%d::/112", 96+10*c.Slot)
}

// podRange is the part of podNet that node n's pods have.
func (c Config) podRange(n int) (v4, v6 netip.Prefix) {
	return prefix("10.%d.%d.0/24", 244-c.Slot, n), prefix("fd00:%d:0:%d::/64", 244-c.Slot, n)
}

// controlPlane is the API server's address, bridge is the machine's own in the node network.
func (c Config) controlPlane() (v4, v6 netip.Addr) { return c.hosts(0x01, 0x01) }
func (c Config) machine() (v4, v6 netip.Addr)      { return c.hosts(254, 0xfe) }
func (c Config) node(n int) (v4, v6 netip.Addr)    { return c.hosts(byte(10+n), byte(0x10+n)) }

func (c Config) hosts(last4, last6 byte) (v4, v6 netip.Addr) {
	net4, net6 := c.nodeNet()
	return host(net4, last4), host(net6, last6)
}

// dnsService and apiService are addresses in the service ranges.
func (c Config) dnsService() (v4, v6 netip.Addr) {
	net4, net6 := c.serviceNet()
	return host(net4, 10), host(net6, 10)
}

func (c Config) apiService() (v4, v6 netip.Addr) {
	net4, net6 := c.serviceNet()
	return host(net4, 1), host(net6, 1)
}

// apiURL is where the API server is reached from the machine and from the nodes.
func (c Config) apiURL() string {
	v4, _ := c.controlPlane()
	return fmt.Sprintf("https://%s:6443", v4)
}

func prefix(format string, numbers ...any) netip.Prefix {
	return netip.MustParsePrefix(fmt.Sprintf(format, numbers...))
}

// host is the address in the range whose last byte is last.
func host(in netip.Prefix, last byte) netip.Addr {
	raw := in.Addr().AsSlice()
	raw[len(raw)-1] = last
	addr, _ := netip.AddrFromSlice(raw)
	return addr
}

func nodeName(n int) string { return fmt.Sprintf("n%d", n) }

// lock serialises the commands that change one cluster. The returned function gives it back; the kernel does so too
// when the process dies.
func (c Config) lock(ctx context.Context) (func(), error) {
	if err := os.MkdirAll(c.path(), 0o755); err != nil {
		return nil, fmt.Errorf("make the state folder: %w", err)
	}
	return lockFile(ctx, c.path("lock"), func(holder string) {
		fmt.Fprintf(os.Stderr, "another command works on this cluster, %s; waiting for it\n", holder)
	})
}

// lockFile takes an exclusive lock on the file and writes into it who has it. waiting is called once, with what the
// holder wrote, if somebody else has it.
func lockFile(ctx context.Context, name string, waiting func(holder string)) (func(), error) {
	file, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w", err)
	}
	waited := false
	err = poll(ctx, func() (bool, error) {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			if !waited {
				waited = true
				waiting(holder(name))
			}
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("lock %s, which %s has: %w", name, holder(name), err)
	}
	if err := file.Truncate(0); err == nil {
		_, _ = fmt.Fprintf(file, "process %d (%s)\n", os.Getpid(), strings.Join(os.Args, " "))
	}
	return func() { file.Close() }, nil
}

// holder reads who has a lock, for messages alone.
func holder(name string) string {
	content, _ := os.ReadFile(name)
	if text := strings.TrimSpace(string(content)); text != "" {
		return text
	}
	return "an unnamed process"
}

func (s *state) save() error { return writeJSON(s.path("cluster.json"), s) }

// loadState reads .cluster/cluster.json; fs.ErrNotExist means that no cluster was started from this clone.
func loadState(dir string) (*state, error) {
	raw, err := os.ReadFile(Config{Dir: dir}.path("cluster.json"))
	if err != nil {
		return nil, fmt.Errorf("read the cluster's state: %w", err)
	}
	s := &state{}
	if err := json.Unmarshal(raw, s); err != nil {
		return nil, fmt.Errorf("read the cluster's state: %w", err)
	}
	s.Dir = dir
	return s, nil
}

// errDown says that no cluster runs, in the words for a user.
func errDown(cause error) error {
	if errors.Is(cause, fs.ErrNotExist) {
		return fmt.Errorf("open the cluster: none runs from this clone: start it with make cluster-up: %w", cause)
	}
	return cause
}

// writeJSON replaces a file in one step.
func writeJSON(name string, value any) error {
	raw, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", filepath.Base(name), err)
	}
	return writeFile(name, append(raw, '\n'), 0o600)
}

// writeFile replaces a file in one step and makes its folder.
func writeFile(name string, content []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	temporary := name + ".new"
	if err := os.WriteFile(temporary, content, mode); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	if err := os.Rename(temporary, name); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	return nil
}
