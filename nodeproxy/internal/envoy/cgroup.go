package envoy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// ownCgroup is where Envoy's cgroup goes, below the cgroup root: a child of the container's own, so that its limits
// still count; "/weft/<node>/<pod>" where the container sits in the v2 root, as on hybrid hosts. selfCgroup is the text of
// /proc/self/cgroup; a path there that leads out of the container's cgroup namespace is no use and counts as the root. In a
// cgroup namespace of its own the container finds itself by what it sees as the root, self: the same folder below root. Only
// there may it move Envoy (cgroup_procs_write_permission in kernel/cgroup/cgroup.c, under nsdelegate).
func ownCgroup(selfCgroup, root, self, node, podUID string) string {
	for line := range strings.Lines(selfCgroup) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok && path != "/" && !strings.HasPrefix(path, "/..") {
			return filepath.Join(path, "envoy")
		}
	}
	if path := sameFolder(root, self); path != "" {
		return filepath.Join(path, "envoy")
	}
	return filepath.Join("/weft", node, podUID)
}

// sameFolder finds the folder below root that self shows from another mount; "": there is none, or it is root itself.
func sameFolder(root, self string) string {
	want, err := os.Stat(self)
	if err != nil {
		return ""
	}
	found := ""
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // it went meanwhile
		}
		if info, err := d.Info(); err == nil && os.SameFile(info, want) {
			found = strings.TrimPrefix(path, root)
			return fs.SkipAll
		}
		return nil
	})
	return found
}

// makeCgroup makes a cgroup and ends what a supervisor before left in it.
func makeCgroup(root, path string) (string, error) {
	full := filepath.Join(root, path)
	err := os.MkdirAll(full, 0o755)
	if errors.Is(err, fs.ErrNotExist) { // another supervisor took a parent away that was empty
		err = os.MkdirAll(full, 0o755)
	}
	if err != nil {
		return "", fmt.Errorf("make Envoy's cgroup: %w; see that host.cgroup names the nodes' cgroup v2 mount", err)
	}
	if _, err := os.Stat(filepath.Join(full, "cgroup.procs")); err != nil {
		return "", fmt.Errorf("make Envoy's cgroup: %s is no cgroup v2: set host.cgroup to where cgroup v2 is mounted", root)
	}
	return full, killCgroup(full)
}

// removeCgroup removes a cgroup, and its parents below root as far as they are empty.
func removeCgroup(root, path string) {
	for ; path != "/" && path != "."; path = filepath.Dir(path) {
		if os.Remove(filepath.Join(root, path)) != nil {
			return
		}
	}
}

// joinCgroup moves the calling process into a cgroup.
func joinCgroup(full string) error {
	if err := os.WriteFile(filepath.Join(full, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
		return fmt.Errorf("join cgroup: %w", err)
	}
	return nil
}

func killCgroup(full string) error {
	procs, err := os.ReadFile(filepath.Join(full, "cgroup.procs"))
	if err != nil || len(strings.TrimSpace(string(procs))) == 0 {
		return nil
	}
	if err := os.WriteFile(filepath.Join(full, "cgroup.kill"), []byte("1"), 0); err != nil {
		return fmt.Errorf("end what is left in Envoy's cgroup: %w", err)
	}
	return nil
}

// memoryLimit reads the container's limit in bytes from its own view of the cgroup file system, v2 first; 0: none.
func memoryLimit(mount string) uint64 {
	for _, file := range []string{"memory.max", "memory/memory.limit_in_bytes"} {
		b, err := os.ReadFile(filepath.Join(mount, file))
		if err != nil {
			continue
		}
		limit, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		if err == nil && limit < 1<<50 { // v1 shows "no limit" as a huge number
			return limit
		}
	}
	return 0
}
