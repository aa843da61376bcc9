package attack

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Nested is the argument by which the program knows that it runs in namespaces of its own.
const Nested = "nested"

// nest makes the inner attempts in a user and network namespace of the attacker's own, where it may do everything.
func nest(a Attempt, o *Outcome) error {
	in, err := json.Marshal(a.Inner)
	if err != nil {
		return err
	}
	var out, complaint bytes.Buffer
	cmd := exec.Command("/proc/self/exe", "attack", Nested)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &complaint
	root := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP,
		UidMappings: root, GidMappings: root, Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Run(); err != nil {
		return at("clone", fmt.Errorf("%w: %s", err, strings.TrimSpace(complaint.String())))
	}
	return json.Unmarshal(out.Bytes(), &o.Inner)
}

// Settle makes the namespaces' loopback usable.
func Settle() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set the loopback up: %w", err)
	}
	return nil
}

// joinCgroups tries to move the attacker into every control group that a mount of its own shows below its own: Envoy's
// sockets are known by their group. A group that it makes itself is counted apart, to show that the mount is real.
func joinCgroups(a Attempt, o *Outcome) error {
	place := a.To
	if err := os.MkdirAll(place, 0o700); err != nil {
		return at("start", err)
	}
	if err := unix.Mount("cgroup2", place, "cgroup2", 0, ""); err != nil {
		return at("mount", err)
	}
	defer unix.Unmount(place, unix.MNT_DETACH)
	o.Counts = map[string]int{}
	own := filepath.Join(place, "attacker")
	if err := os.Mkdir(own, 0o700); err == nil {
		o.Counts["made"]++
	}
	err := filepath.WalkDir(place, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Name() != "cgroup.procs" || filepath.Dir(path) == place || filepath.Dir(path) == own {
			return nil // what goes meanwhile is not there to be joined
		}
		o.Counts["seen"]++
		if err := os.WriteFile(path, []byte("0"), 0); err != nil {
			o.Counts[errno(err)]++
		} else {
			o.Counts["joined"]++
			o.Heard = append(o.Heard, []byte(path))
		}
		return nil
	})
	return errors.Join(err, os.WriteFile(filepath.Join(place, "cgroup.procs"), []byte("0"), 0), os.Remove(own))
}

// unixSockets connects to every Unix socket that the pod sees, by name, and to those at the paths of weft's own, in every
// root folder that it may enter. Its own and the container's are not counted.
func unixSockets(a Attempt, o *Outcome) error {
	o.Counts = map[string]int{}
	raw, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return at("read", err)
	}
	var names []string
	for l := range strings.Lines(string(raw)) {
		if f := strings.Fields(l); len(f) == 8 && f[7] != Seen {
			names = append(names, f[7])
		}
	}
	for _, root := range []string{"", "/proc/1/root", "/host", "/proc/1/cwd"} {
		for _, pattern := range []string{"/run/weft/*.sock", "/run/weft/*/*.sock", "/run/weft/*/*/*.sock", "/var/run/weft/*/*", "/var/run/nri/*", "/run/containerd/*.sock"} {
			found, _ := filepath.Glob(root + pattern) // fails for a bad pattern alone
			names = append(names, found...)
		}
	}
	for _, name := range names {
		c, err := net.Dial("unix", name)
		if err == nil {
			c.Close()
			o.Counts["connected"]++
			o.Heard = append(o.Heard, []byte(name))
		} else if !errors.Is(err, os.ErrNotExist) {
			o.Counts[errno(err)]++
		}
	}
	return nil
}
