package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/weftmesh/weft/test/cluster/cgroups"
	"golang.org/x/sys/unix"
)

// takeMounts records the caller's mounts, by place and kind; a place may be mounted over several times.
func takeMounts(_ context.Context, s Snapshot) error {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	eachMount(string(raw), func(place, what string) { s.add(Mount, place, what) })
	return nil
}

// eachMount calls add with each mount of a mountinfo file: its place and what is mounted there.
func eachMount(mountinfo string, add func(place, what string)) {
	for _, line := range strings.Split(strings.TrimSpace(mountinfo), "\n") {
		fields := strings.Fields(line)
		_, after, found := strings.Cut(line, " - ")
		if found && len(fields) > 4 {
			add(fields[4]+" (mount "+fields[0]+")", after)
		}
	}
}

// takeInnerMounts records the mounts that a process sees in another mount namespace. It may end meanwhile.
func takeInnerMounts(s Snapshot, ns, pid, group string) {
	raw, err := os.ReadFile(filepath.Join("/proc", pid, "mountinfo"))
	if err != nil {
		return
	}
	eachMount(string(raw), func(place, what string) { s.add(InnerMount, ns+" "+place, what+" of "+top(group)) })
}

// takeInnerTables records the tables of another network namespace, by way of a process in it, which may end meanwhile.
func takeInnerTables(ctx context.Context, s Snapshot, ns, pid, group string) {
	out, err := exec.CommandContext(ctx, "nsenter", "--net=/proc/"+pid+"/ns/net", "nft", "list", "tables").Output()
	if err != nil {
		return
	}
	for _, table := range strings.Fields(strings.ReplaceAll(strings.TrimSpace(string(out)), " ", "_")) {
		s.add(InnerNFTables, ns+" "+table, "of "+top(group))
	}
}

// top is the first part of a control group's path: whose namespace it is, whichever of the processes in it is asked.
func top(group string) string {
	first, _, _ := strings.Cut(strings.TrimPrefix(group, "/"), "/")
	return "/" + first
}

// takeGroups records every control group of every hierarchy.
func takeGroups(_ context.Context, s Snapshot) error {
	layout, err := cgroups.Read()
	if err != nil {
		return err
	}
	for _, hierarchy := range append([]cgroups.Hierarchy{layout.V2}, layout.V1...) {
		err := filepath.WalkDir(hierarchy.MountPoint, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				s.add(ControlGroup, path, "")
			}
			return nil // a group may go while it is being listed
		})
		if err != nil {
			return err
		}
	}
	control, err := os.ReadFile(filepath.Join(layout.V2.MountPoint, "cgroup.subtree_control"))
	if err != nil {
		return err
	}
	s.add(ControlGroup, "controllers below "+layout.V2.MountPoint, strings.TrimSpace(string(control)))
	return nil
}

func takeNetwork(_ context.Context, s Snapshot) error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		s.add(Link, fmt.Sprintf("%s (%d)", l.Attrs().Name, l.Attrs().Index), l.Type())
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, netlink.RT_FILTER_TABLE)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return err
	}
	for _, route := range routes {
		s.add(Route, route.String(), "")
	}
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, rule := range rules {
		s.add(Rule, rule.String(), "")
	}
	return nil
}

// takeNFTables records the rules without their counters.
func takeNFTables(ctx context.Context, s Snapshot) error {
	out, err := exec.CommandContext(ctx, "nft", "--stateless", "list", "ruleset").CombinedOutput()
	if err != nil {
		return fmt.Errorf("nft list ruleset: %w: %s", err, out)
	}
	table := ""
	for _, line := range strings.Split(string(out), "\n") {
		if strings.HasPrefix(line, "table ") {
			table = strings.TrimSuffix(line, " {")
			s.add(NFTables, table, "")
			continue
		}
		if line = strings.TrimSpace(line); line != "" && line != "}" {
			s.add(NFTables, table+": "+line, "")
		}
	}
	return nil
}

func takeBPF(_ context.Context, s Snapshot) error {
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			return fmt.Errorf("list programs: %w", err)
		}
		id = next
		if program, err := ebpf.NewProgramFromID(id); err == nil {
			name := ""
			if info, err := program.Info(); err == nil {
				name = info.Name
			}
			s.add(BPFProgram, fmt.Sprint(uint32(id)), fmt.Sprintf("%s %s", program.Type(), name))
			program.Close()
		}
	}
	for id := ebpf.MapID(0); ; {
		next, err := ebpf.MapGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			return fmt.Errorf("list maps: %w", err)
		}
		id = next
		if m, err := ebpf.NewMapFromID(id); err == nil {
			name := ""
			if info, err := m.Info(); err == nil {
				name = info.Name
			}
			s.add(BPFMap, fmt.Sprint(uint32(id)), fmt.Sprintf("%s %s", m.Type(), name))
			m.Close()
		}
	}
	links := new(link.Iterator)
	defer links.Close()
	for links.Next() {
		what := ""
		if info, err := links.Link.Info(); err == nil {
			what = fmt.Sprintf("%v of %s", info.Type, s[BPFProgram][fmt.Sprint(uint32(info.Program))])
		}
		s.add(BPFLink, fmt.Sprint(uint32(links.ID)), what)
	}
	if err := links.Err(); err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	return nil
}

// volatile sysctls change by themselves.
var volatile = []string{
	"/proc/sys/fs/aio-nr", "/proc/sys/fs/dentry-state", "/proc/sys/fs/file-nr", "/proc/sys/fs/inode-", "/proc/sys/fs/quota/",
	"/proc/sys/kernel/ns_last_pid", "/proc/sys/kernel/pty/nr", "/proc/sys/kernel/random/", "/proc/sys/net/netfilter/nf_conntrack_count",
	"/proc/sys/kernel/cap_last_cap", "/proc/sys/fs/binfmt_misc/",
}

// takeSysctls records every readable sysctl of the kernel and of the caller's network namespace.
func takeSysctls(_ context.Context, s Snapshot) error {
	return filepath.WalkDir("/proc/sys", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return nil // the folder of a link may go while it is being listed
		}
		for _, prefix := range volatile {
			if strings.HasPrefix(path, prefix) {
				return nil
			}
		}
		if unix.Access(path, unix.R_OK) != nil {
			return nil
		}
		info, err := entry.Info()
		if err != nil || info.Mode()&0o444 == 0 {
			return nil
		}
		if content, err := os.ReadFile(path); err == nil {
			s.add(Sysctl, path, strings.Join(strings.Fields(string(content)), " "))
		}
		return nil
	})
}
