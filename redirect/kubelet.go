package redirect

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// kubelet is what is known of the process whose probes pass Strict pods, which its cgroup tells from all others.
type kubelet struct {
	path string // Config.KubeletCgroup
	// shared counts the looks in a row that found other processes in the cgroup.
	shared int
	// refused is why the exemption is closed; nil while it is open.
	refused error
}

// errNoKubelet is why the exemption is closed while kubelet does not run, which is no fault.
var errNoKubelet = errors.New("kubelet does not run")

// ErrKubeletShared is why no probe passes a Strict pod on a node whose kubelet has no cgroup of its own.
var ErrKubeletShared = errors.New("other processes share kubelet's cgroup, and would pass as probes: give kubelet a cgroup of its own (chart value kubelet.cgroup)")

// ProbesRefused tells why kubelet's probes do not pass Strict pods, although Config.KubeletCgroup is set. Nil: they pass,
// or were not asked for.
func (r *Redirect) ProbesRefused() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.kubelet.refused
}

// lookAtKubelet opens or closes the exemption in r.instance, by what kubelet's cgroup is and holds now.
func (r *Redirect) lookAtKubelet() {
	k := &r.kubelet
	if k.path == "" {
		return
	}
	id, err := kubeletCgroup(k.path)
	if errors.Is(err, ErrKubeletShared) {
		k.shared++
		// A child that kubelet starts (mount, a credential plugin) is there for a moment. One look does not close an
		// exemption that is open; it never opens one.
		if k.shared == 1 && id != 0 && id == r.instance.KubeletCgroup {
			return
		}
	} else {
		k.shared = 0
	}
	if err != nil {
		id = 0
	}
	switch {
	case err != nil && !errors.Is(err, errNoKubelet) && (k.refused == nil || k.refused.Error() != err.Error()):
		r.log.Error("kubelet's probes are refused by Strict pods", "error", err)
	case id != r.instance.KubeletCgroup:
		r.log.Info("kubelet's cgroup changed", "found", err == nil)
	}
	k.refused, r.instance.KubeletCgroup = err, id
}

// kubeletCgroup returns the number of kubelet's cgroup. It refuses the root, which holds every host process, and one that
// holds another process besides kubelet.
func kubeletCgroup(path string) (uint64, error) {
	switch err := checkFilesystem(path, unix.CGROUP2_SUPER_MAGIC, "cgroup2", "name kubelet's own cgroup"); {
	case errors.Is(err, fs.ErrNotExist):
		return 0, fmt.Errorf("find kubelet's cgroup %s: %w", path, errNoKubelet)
	case err != nil:
		return 0, err
	}
	if _, err := os.Stat(filepath.Join(path, "cgroup.type")); errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("%s is the root cgroup: %w", path, ErrKubeletShared)
	}
	id, err := cgroupID(path)
	if err != nil {
		return 0, err
	}
	// One line for each process. Those of another PID namespace, which in the agent's container are all of the host's,
	// read 0, each on a line of its own: how many there are can be known, which they are cannot.
	procs, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
	if err != nil {
		return 0, fmt.Errorf("list processes of kubelet's cgroup: %w", err)
	}
	switch bytes.Count(procs, []byte{'\n'}) {
	case 0:
		return 0, fmt.Errorf("kubelet's cgroup %s is empty: %w", path, errNoKubelet)
	case 1:
		return id, nil
	default:
		return id, fmt.Errorf("look at kubelet's cgroup %s: %w", path, ErrKubeletShared)
	}
}
