// Package cgroups tells how a machine's control groups are mounted, from /proc/self/mountinfo, and makes and removes
// groups in every hierarchy. Two layouts exist: "pure v2", one cgroup2 mount that carries all controllers (systemd's
// default today), and "hybrid", v1 hierarchies that carry the controllers beside a cgroup2 mount without them.
package cgroups

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strconv"
	"strings"
)

// Root is where a machine of the embedded cluster sees its control groups.
const Root = "/sys/fs/cgroup"

// ErrNoV2 means that no cgroup2 file system is mounted.
var ErrNoV2 = errors.New("find a cgroup2 mount in mountinfo: there is none: mount one (mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified) or boot with systemd.unified_cgroup_hierarchy=1")

// Hierarchy is one mounted tree of control groups.
type Hierarchy struct {
	// MountPoint is an absolute path.
	MountPoint string
	// Options is what mounts the same v1 hierarchy again: its controllers ("cpu,cpuacct") or "none,name=systemd".
	// Empty for v2.
	Options string `json:",omitempty"`
	// ReadOnly is set when groups cannot be made there.
	ReadOnly bool `json:",omitempty"`
}

// Layout is how a machine mounts its control groups.
type Layout struct {
	// V2 is the cgroup2 mount; BPF programs attach there.
	V2 Hierarchy
	// V1 are the v1 hierarchies sorted by mount point; empty on a pure v2 machine.
	V1 []Hierarchy `json:",omitempty"`
}

// Read parses this process's own mountinfo.
func Read() (Layout, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return Layout{}, fmt.Errorf("read the mounts: %w", err)
	}
	defer file.Close()
	return Parse(file)
}

// Parse finds the hierarchies in mountinfo (format: proc_pid_mountinfo(5)). A hierarchy that is mounted several times
// counts once: by its mount under /sys/fs/cgroup if there is one, else by the first that can be written.
func Parse(mountinfo io.Reader) (Layout, error) {
	v1 := map[string]Hierarchy{}
	var v2 *Hierarchy
	lines := bufio.NewScanner(mountinfo)
	lines.Buffer(make([]byte, 0, 64<<10), 1<<20)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		separator := -1
		for i, field := range fields {
			if field == "-" && i >= 6 {
				separator = i
				break
			}
		}
		if separator < 0 || len(fields) < separator+4 {
			continue
		}
		kind := fields[separator+1]
		if kind != "cgroup" && kind != "cgroup2" {
			continue
		}
		found := Hierarchy{MountPoint: unescape(fields[4])}
		for _, option := range strings.Split(fields[5], ",") {
			found.ReadOnly = found.ReadOnly || option == "ro"
		}
		if kind == "cgroup2" {
			if v2 == nil || better(found, *v2) {
				v2 = &found
			}
			continue
		}
		if found.Options = v1Options(fields[separator+3]); found.Options == "" {
			continue
		}
		if have, known := v1[found.Options]; !known || better(found, have) {
			v1[found.Options] = found
		}
	}
	if err := lines.Err(); err != nil {
		return Layout{}, fmt.Errorf("read mountinfo: %w", err)
	}
	if v2 == nil {
		return Layout{}, ErrNoV2
	}
	layout := Layout{V2: *v2}
	for _, hierarchy := range v1 {
		layout.V1 = append(layout.V1, hierarchy)
	}
	sort.Slice(layout.V1, func(i, j int) bool { return layout.V1[i].MountPoint < layout.V1[j].MountPoint })
	return layout, nil
}

// better prefers the standard place, then a place that can be written.
func better(a, b Hierarchy) bool {
	standard := func(h Hierarchy) bool { return h.MountPoint == Root || strings.HasPrefix(h.MountPoint, Root+"/") }
	if standard(a) != standard(b) {
		return standard(a)
	}
	return b.ReadOnly && !a.ReadOnly
}

// v1Options keeps what names a v1 hierarchy among its super block's options.
func v1Options(super string) string {
	var controllers []string
	for _, option := range strings.Split(super, ",") {
		switch {
		case strings.HasPrefix(option, "name="):
			return "none," + option
		case option == "rw", option == "ro", option == "xattr", option == "clone_children", option == "noprefix",
			option == "cpuset_v2_mode", option == "favordynmods", strings.HasPrefix(option, "release_agent="):
		default:
			controllers = append(controllers, option)
		}
	}
	return strings.Join(controllers, ",")
}

// unescape undoes mountinfo's octal escapes of blanks and backslashes.
func unescape(field string) string {
	if !strings.Contains(field, `\`) {
		return field
	}
	var out strings.Builder
	for i := 0; i < len(field); i++ {
		if field[i] == '\\' && i+3 < len(field) {
			if value, err := strconv.ParseUint(field[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(value))
				i += 3
				continue
			}
		}
		out.WriteByte(field[i])
	}
	return out.String()
}

// PureV2 says that cgroup2 carries the controllers.
func (l Layout) PureV2() bool { return len(l.V1) == 0 }

// String is "pure v2" or "hybrid".
func (l Layout) String() string {
	if l.PureV2() {
		return "pure v2"
	}
	return "hybrid"
}

// Mount is one mount below Root inside a machine's own cgroup namespace, where it shows the machine's group as "/".
type Mount struct {
	Type, Target, Options string
	// Links are further names of Target in the same folder: "cpu" and "cpuacct" for "cpu,cpuacct".
	Links []string
}

// Mounts are the mounts, in order, that show the same layout inside a cgroup namespace.
func (l Layout) Mounts() []Mount {
	if l.PureV2() {
		return []Mount{{Type: "cgroup2", Target: Root}}
	}
	mounts := []Mount{{Type: "tmpfs", Target: Root, Options: "mode=755"}}
	for _, hierarchy := range l.V1 {
		mount := Mount{Type: "cgroup", Target: path.Join(Root, path.Base(hierarchy.MountPoint)), Options: hierarchy.Options}
		if names := strings.Split(hierarchy.Options, ","); len(names) > 1 && names[0] != "none" {
			mount.Links = names
		}
		mounts = append(mounts, mount)
	}
	return append(mounts, Mount{Type: "cgroup2", Target: l.InsideV2()})
}

// InsideV2 is where a machine of the cluster sees its cgroup2 mount.
func (l Layout) InsideV2() string {
	if l.PureV2() {
		return Root
	}
	return path.Join(Root, "unified")
}

// ReadOnly lists the mount points where groups cannot be made.
func (l Layout) ReadOnly() []string {
	var out []string
	for _, hierarchy := range append([]Hierarchy{l.V2}, l.V1...) {
		if hierarchy.ReadOnly {
			out = append(out, hierarchy.MountPoint)
		}
	}
	return out
}
