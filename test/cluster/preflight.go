package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/weftmesh/weft/test/cluster/cgroups"
	"golang.org/x/sys/unix"
)

// What a cluster needs of the machine. hack/make/cluster.mk gives the same figures to hack/preflight.sh.
const (
	minimumMemory    = 2 << 30 // bytes free to start a cluster of two nodes, which takes 1 GB
	minimumToBuild   = 3 << 30 // bytes free to link Kubernetes
	minimumDisk      = 3 << 30 // bytes free for the state of a running cluster
	minimumBuildDisk = 9 << 30 // bytes free for sources, Go's build cache and programs of a first build
)

// problem is something missing, and what to do about it.
type problem struct{ What, Remedy string }

// programs are the commands the cluster runs, and the Debian packages that hold them. hack/packages/cluster.txt has
// the same packages, as a test makes sure.
var programs = []struct{ Name, Package string }{
	{"runc", "runc"}, {"nft", "nftables"}, {"mount", "mount"}, {"nsenter", "util-linux"}, {"/bin/busybox", "busybox-static"},
}

// Preflight looks for everything a cluster needs and reports all that is missing at once. It changes nothing and
// takes well under five seconds.
func Preflight(ctx context.Context, c Config) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var found []problem
	if os.Geteuid() != 0 {
		found = append(found, problem{"root: namespaces, mounts and control groups are made by root alone", "run it as root (sudo -E make ...)"})
	}
	found = append(found, checkPrograms()...)
	found = append(found, checkGo(ctx)...)
	found = append(found, thisKernel().check(ctx)...)
	found = append(found, checkGroups()...)
	found = append(found, c.checkSpace()...)
	found = append(found, c.checkNetwork()...)
	return list(found)
}

// list is the error that names all problems, each with its remedy.
func list(found []problem) error {
	if len(found) == 0 {
		return nil
	}
	var text strings.Builder
	for _, p := range found {
		fmt.Fprintf(&text, "\n  - %s\n    remedy: %s", p.What, p.Remedy)
	}
	return fmt.Errorf("check the machine: %d problems:%s", len(found), text.String())
}

func checkPrograms() []problem {
	var missing, packages []string
	for _, p := range programs {
		if _, err := exec.LookPath(p.Name); err != nil {
			missing = append(missing, p.Name)
			packages = append(packages, p.Package)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return []problem{{"programs: " + strings.Join(missing, ", "), "run make deps, or apt-get install " + strings.Join(packages, " ")}}
}

func checkGo(ctx context.Context) []problem {
	const remedy = "install Go 1.26 or later and put it in PATH"
	command := exec.CommandContext(ctx, "go", "env", "GOVERSION")
	command.Env = append(os.Environ(), "GOTOOLCHAIN=local")
	out, err := command.Output()
	if err != nil {
		return []problem{{fmt.Sprintf("Go: go env GOVERSION fails: %v", err), remedy}}
	}
	version := strings.TrimPrefix(strings.TrimSpace(string(out)), "go")
	if olderThan(version, "1.26") {
		return []problem{{"Go 1.26: this is " + version, remedy}}
	}
	return nil
}

// olderThan compares the first two numbers of two versions.
func olderThan(version, minimum string) bool {
	numbers := func(text string) (major, minor int) {
		parts := strings.FieldsFunc(text, func(r rune) bool { return r < '0' || r > '9' })
		if len(parts) > 0 {
			major, _ = strconv.Atoi(parts[0])
		}
		if len(parts) > 1 {
			minor, _ = strconv.Atoi(parts[1])
		}
		return major, minor
	}
	major, minor := numbers(version)
	wantMajor, wantMinor := numbers(minimum)
	return major < wantMajor || major == wantMajor && minor < wantMinor
}

// hasWord says whether the file exists and, if word is not empty, has it as one of its words.
func hasWord(file, word string) bool {
	content, err := os.ReadFile(file)
	if err != nil {
		_, err = os.Lstat(file)
		return err == nil && word == ""
	}
	if word == "" {
		return true
	}
	for _, have := range strings.Fields(string(content)) {
		if have == word {
			return true
		}
	}
	return false
}

func checkGroups() []problem {
	layout, err := cgroups.Read()
	if err != nil {
		return []problem{{"control groups: " + err.Error(), "mount cgroup2 as the message says"}}
	}
	if readOnly := layout.ReadOnly(); len(readOnly) > 0 {
		return []problem{{"control groups: read-only at " + strings.Join(readOnly, ", "), "in a container, start it privileged and with a writable /sys/fs/cgroup"}}
	}
	var found []problem
	have := map[string]bool{}
	if layout.PureV2() {
		content, _ := os.ReadFile(filepath.Join(layout.V2.MountPoint, "cgroup.controllers"))
		for _, controller := range strings.Fields(string(content)) {
			have[controller] = true
		}
	} else {
		for _, hierarchy := range layout.V1 {
			for _, controller := range strings.Split(hierarchy.Options, ",") {
				have[controller] = true
			}
		}
	}
	for _, controller := range []string{"cpu", "cpuset", "memory", "pids"} {
		if !have[controller] {
			found = append(found, problem{"control groups: controller " + controller + " (this machine is " + layout.String() + ")", "mount its hierarchy, or remove cgroup_disable=" + controller + " from the kernel's command line"})
		}
	}
	return found
}

func (c Config) checkSpace() []problem {
	var found []problem
	memory, disk, why := uint64(minimumMemory), uint64(minimumDisk), "a running cluster"
	folder, err := c.cacheFolder()
	if err != nil {
		return []problem{{"cache: " + err.Error(), "set HOME or XDG_CACHE_HOME"}}
	}
	if c.missing(folder) > 0 {
		memory, disk, why = minimumToBuild, minimumBuildDisk, "the first build"
	}
	if free, err := availableMemory(); err == nil && free < memory {
		found = append(found, problem{fmt.Sprintf("memory: %d MiB free for %s, %d MiB are needed", free>>20, why, memory>>20), "end other programs or use a larger machine"})
	}
	for _, place := range []string{folder, c.path()} {
		if free, at, err := freeDisk(place); err == nil && free < disk {
			found = append(found, problem{fmt.Sprintf("disk: %d MiB free at %s for %s, %d MiB are needed", free>>20, at, why, disk>>20), "free some (make cache-clean deletes the builds of all versions), or set XDG_CACHE_HOME"})
			break
		}
	}
	if kind, at, err := fileSystem(c.path()); err == nil && kind == unix.OVERLAYFS_SUPER_MAGIC {
		found = append(found, problem{"disk: the clone lies on an overlay file system (" + at + "), on which containers cannot have layers", "in a container, put the clone on a volume"})
	}
	return found
}

func availableMemory() (uint64, error) {
	file, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("read free memory: %w", err)
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) > 1 && fields[0] == "MemAvailable:" {
			kib, err := strconv.ParseUint(fields[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("read free memory: /proc/meminfo has no MemAvailable")
}

// existing is the nearest existing parent of a path.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) || path == "/" {
			return path
		}
		path = filepath.Dir(path)
	}
}

func freeDisk(path string) (uint64, string, error) {
	var stat unix.Statfs_t
	at := existing(path)
	if err := unix.Statfs(at, &stat); err != nil {
		return 0, at, fmt.Errorf("read free disk space: %w", err)
	}
	return stat.Bavail * uint64(stat.Bsize), at, nil
}

func fileSystem(path string) (int64, string, error) {
	var stat unix.Statfs_t
	at := existing(path)
	if err := unix.Statfs(at, &stat); err != nil {
		return 0, at, fmt.Errorf("read the kind of file system: %w", err)
	}
	return int64(stat.Type), at, nil
}

func (c Config) checkNetwork() []problem {
	if runtime.GOOS != "linux" {
		return nil
	}
	var found []problem
	others, err := c.neighbours()
	if err != nil {
		return []problem{{"network: " + err.Error(), "run it as root"}}
	}
	for _, other := range others {
		running, err := loadState(other.Dir)
		if err == nil && running.Slot != c.Slot {
			continue
		}
		found = append(found, problem{"addresses: the cluster of " + other.Dir + " uses them (link " + other.Link.Attrs().Name + ")",
			"run make cluster-down there, or choose other ranges here with SLOT=" + strconv.Itoa((c.Slot+1)%(MaxSlot+1)) +
				"; if that folder is gone, ip link del " + other.Link.Attrs().Name + " after ending its processes"})
	}
	if len(found) > 0 {
		return found
	}
	taken, err := c.occupied()
	if err != nil {
		return []problem{{"network: " + err.Error(), "run it as root"}}
	}
	for _, t := range taken {
		found = append(found, problem{"addresses: " + t + " is routed elsewhere", "choose other ranges with SLOT=1 to SLOT=" + strconv.Itoa(MaxSlot)})
	}
	return found
}
