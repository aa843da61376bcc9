package cluster

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weftmesh/weft/redirect"
	"golang.org/x/sys/unix"
)

// kernelFeature is something that the cluster needs of the kernel.
type kernelFeature struct {
	What string
	// File shows by its presence, or by Word among its words, that the feature is there.
	File, Word string
	// Module holds the feature where it is not built in; up loads it and down unloads it.
	Module string
	// Option is what the kernel's configuration calls it.
	Option string
}

// kernelFeatures: a module comes after those that it needs.
var kernelFeatures = []kernelFeature{
	{"the overlay file system", "/proc/filesystems", "overlay", "overlay", "CONFIG_OVERLAY_FS"},
	{"the bpf file system", "/proc/filesystems", "bpf", "", "CONFIG_BPF_SYSCALL"},
	{"cgroup2", "/proc/filesystems", "cgroup2", "", "CONFIG_CGROUPS"},
	{"pairs of links", "/sys/module/veth", "", "veth", "CONFIG_VETH"},
	{"bridges", "/sys/module/bridge", "", "bridge", "CONFIG_BRIDGE"},
	{"filtering on bridges", "/proc/sys/net/bridge/bridge-nf-call-iptables", "", "br_netfilter", "CONFIG_BRIDGE_NETFILTER"},
	{"connection tracking", "/proc/sys/net/netfilter/nf_conntrack_max", "", "nf_conntrack", "CONFIG_NF_CONNTRACK"},
	{"nftables", "/sys/module/nf_tables", "", "nf_tables", "CONFIG_NF_TABLES"},
	{"IPv6", "/proc/sys/net/ipv6/conf/all/forwarding", "", "ipv6", "CONFIG_IPV6"},
	{"cgroup namespaces", "/proc/self/ns/cgroup", "", "", "CONFIG_CGROUPS"},
	{"pid namespaces", "/proc/self/ns/pid", "", "", "CONFIG_PID_NS"},
	{"network namespaces", "/proc/self/ns/net", "", "", "CONFIG_NET_NS"},
}

// kernel is what a machine's kernel tells of itself.
type kernel struct {
	// root is put before every path; empty on a real machine.
	root, release string
}

func thisKernel() kernel {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return kernel{}
	}
	return kernel{release: unix.ByteSliceToString(name.Release[:])}
}

// shows says whether the feature is there, as far as its file tells.
func (k kernel) shows(f kernelFeature) bool { return hasWord(k.root+f.File, f.Word) }

// has says whether the feature is there or up can load its module. It loads nothing. What is built in need not show
// under /sys/module: there the configuration is asked, and a kernel that hides it is trusted.
func (k kernel) has(ctx context.Context, f kernelFeature) bool {
	if k.shows(f) || f.Module != "" && loadable(ctx, f.Module) {
		return true
	}
	config, known := k.config()
	if !known {
		return strings.HasPrefix(f.File, "/sys/module/")
	}
	return bytes.Contains(config, []byte("\n"+f.Option+"=y\n"))
}

// config is the configuration that the kernel was built with, where it can be read.
func (k kernel) config() (content []byte, known bool) {
	if packed, err := os.Open(k.root + "/proc/config.gz"); err == nil {
		defer packed.Close()
		if unpacked, err := gzip.NewReader(packed); err == nil {
			if content, err = io.ReadAll(unpacked); err == nil {
				return append([]byte("\n"), content...), true
			}
		}
	}
	content, err := os.ReadFile(filepath.Join(k.root, "/boot/config-"+k.release))
	return append([]byte("\n"), content...), err == nil
}

// loadable says whether modprobe would load the module, or knows that it is built in.
func loadable(ctx context.Context, module string) bool {
	return exec.CommandContext(ctx, "modprobe", "--dry-run", "--quiet", module).Run() == nil
}

// absentModules are those that the cluster needs and that do not show yet.
func (k kernel) absentModules(ctx context.Context) []string {
	var out []string
	for _, f := range kernelFeatures {
		if f.Module != "" && !k.shows(f) && loadable(ctx, f.Module) {
			out = append(out, f.Module)
		}
	}
	return out
}

func loadModules(ctx context.Context, modules []string) error {
	for _, module := range modules {
		if out, err := outside(ctx, "modprobe", module).CombinedOutput(); err != nil {
			return fmt.Errorf("load kernel module %s: modprobe: %w: %s", module, err, bytes.TrimSpace(out))
		}
	}
	return nil
}

// unloadModules removes what loadModules loaded and what was loaded on top of it since. A module that something else
// uses by now stays.
func unloadModules(ctx context.Context, modules []string) {
	for _, module := range slices.Backward(modules) {
		_ = exec.CommandContext(ctx, "modprobe", "--remove", "--remove-holders", "--quiet", module).Run()
	}
}

func (k kernel) check(ctx context.Context) []problem {
	var found []problem
	if k.release != "" && olderThan(k.release, redirect.MinimumKernel) {
		found = append(found, problem{"Linux " + redirect.MinimumKernel + ": this is " + k.release, "boot a newer kernel; Debian 12 has 6.1"})
	}
	for _, f := range kernelFeatures {
		if k.has(ctx, f) {
			continue
		}
		remedy := "boot a kernel that has it; Debian's has"
		if f.Module != "" {
			remedy = "run modprobe " + f.Module + " (Debian package kmod), or " + remedy
		}
		found = append(found, problem{"kernel: " + f.What + " (" + f.Option + ")", remedy})
	}
	if content, err := os.ReadFile(k.root + "/proc/sys/net/ipv6/conf/all/disable_ipv6"); err == nil && strings.TrimSpace(string(content)) == "1" {
		found = append(found, problem{"IPv6: it is switched off", "run sysctl -w net.ipv6.conf.all.disable_ipv6=0"})
	}
	return found
}
