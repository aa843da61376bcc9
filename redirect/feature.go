package redirect

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// MinimumKernel is the oldest Linux that the hooks are tested on.
const MinimumKernel = "6.1"

type feature struct {
	name, since string
	probe       func() error
}

// kernelFeatures are what the hooks stand on, oldest first, each with the Linux that brought it.
var kernelFeatures = []feature{
	{"sockops programs", "4.13", func() error { return features.HaveProgramType(ebpf.SockOps) }},
	{"socket maps (sockhash)", "4.18", func() error { return features.HaveMapType(ebpf.SockHash) }},
	{"socket storage (sk_storage)", "5.2", func() error { return features.HaveMapType(ebpf.SkStorage) }},
	{"cgroup socket option programs", "5.3", func() error { return features.HaveProgramType(ebpf.CGroupSockopt) }},
	{"sk_lookup programs", "5.9", func() error { return features.HaveProgramType(ebpf.SkLookup) }},
	{"the netns cookie in sockops", "5.15", func() error { return features.HaveProgramHelper(ebpf.SockOps, asm.FnGetNetnsCookie) }},
	{"bpf_set_retval in cgroup connect programs", "5.18", func() error {
		return features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval)
	}},
}

// explain turns the failure to load into what is missing, so that the operator knows what to change.
func explain(cause error) error {
	return explainFor(kernelRelease(), kernelFeatures, lackingRights(), cause)
}

func explainFor(release string, features []feature, lacking []string, cause error) error {
	if len(lacking) > 0 { // first: without them the probes below tell nothing
		return fmt.Errorf("load hooks: the agent lacks %s; grant them in its security context: %w", strings.Join(lacking, ", "), cause)
	}
	for _, f := range features {
		if err := f.probe(); errors.Is(err, ebpf.ErrNotSupported) {
			return fmt.Errorf("load hooks: kernel %s lacks %s (Linux %s has it; weft needs %s or later): %w: %w",
				release, f.name, f.since, MinimumKernel, ErrUnsupported, cause)
		}
	}
	return fmt.Errorf("load hooks on kernel %s (weft needs Linux %s or later): %w", release, MinimumKernel, cause)
}

// lackingRights names the capabilities that this process needs and has not.
func lackingRights() []string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return nil
	}
	var lacking []string
	for _, c := range []struct {
		name string
		bit  int
	}{{"CAP_BPF", unix.CAP_BPF}, {"CAP_NET_ADMIN", unix.CAP_NET_ADMIN}, {"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN}} {
		if sets[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			lacking = append(lacking, c.name)
		}
	}
	return lacking
}

// checkFilesystem tells a path that lies on the wrong filesystem from one that does not exist.
func checkFilesystem(path string, magic int64, what, remedy string) error {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return fmt.Errorf("load hooks: look at %s: %w", path, err)
	}
	if int64(stat.Type) != magic {
		return fmt.Errorf("load hooks: %s is not on a %s: %s", path, what, remedy)
	}
	return nil
}

// existing returns path, or the nearest directory above it that exists.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); err == nil || path == filepath.Dir(path) {
			return path
		}
		path = filepath.Dir(path)
	}
}
