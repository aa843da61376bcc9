package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// enter is the command line prefix that runs a command inside a machine, in all of its namespaces.
func enter(pid int) []string {
	return []string{"nsenter", "--target", strconv.Itoa(pid), "--mount", "--net", "--pid", "--uts", "--ipc", "--cgroup", "--"}
}

// outside is a command that works for the cluster in the machine's own control groups: where cluster-down does not
// find it. It ends with the process that starts it.
func outside(ctx context.Context, name string, args ...string) *exec.Cmd {
	command := exec.CommandContext(ctx, name, args...)
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return command
}

// loadImages imports image tarballs into node n's containerd.
func (s *state) loadImages(ctx context.Context, n int, files ...string) error {
	pid, err := s.initPID(nodeName(n))
	if err != nil {
		return err
	}
	socket := fmt.Sprintf("/proc/%d/root/run/containerd/containerd.sock", pid)
	if err := waitFor(ctx, "containerd of "+nodeName(n), apiTimeout, func(context.Context) error { _, err := os.Stat(socket); return err }); err != nil {
		return err
	}
	for _, name := range files {
		if err := importImage(ctx, pid, name); err != nil {
			return fmt.Errorf("load %s into %s: %w", name, nodeName(n), err)
		}
	}
	return nil
}

func importImage(ctx context.Context, pid int, name string) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	argv := append(enter(pid), binFolder+"/ctr", "--namespace", "k8s.io", "images", "import", "--local", "-")
	command := outside(ctx, argv[0], argv[1:]...)
	var out bytes.Buffer
	command.Stdin, command.Stdout, command.Stderr = file, &out, &out
	if err := command.Run(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out.Bytes()))
	}
	if len(bytes.TrimSpace(out.Bytes())) == 0 {
		return errors.New("the file holds no named image: give it a name (RepoTags of a docker tarball, the annotation org.opencontainers.image.ref.name of an OCI one)")
	}
	return nil
}

// Load puts image tarballs (OCI or docker) on every node that runs.
func Load(ctx context.Context, dir string, files ...string) error {
	s, unlock, err := openLocked(ctx, dir)
	if err != nil {
		return err
	}
	defer unlock()
	return s.eachNode(func(n int) error {
		if _, err := s.initPID(nodeName(n)); err != nil {
			return nil // stopped: it gets them by a later Load
		}
		return s.loadImages(ctx, n, files...)
	})
}

// requiredFile is the part of containerd's configuration that Require writes.
const requiredFile = "etc-containerd/conf.d/weft.toml"

// required is the default validator of manifests/containerd.toml with plugins that have to be there: containerd replaces a
// plugin's whole configuration.
const required = `version = 3
[plugins.'io.containerd.nri.v1.nri']
  plugin_request_timeout = "10s"
  [plugins.'io.containerd.nri.v1.nri'.default_validator]
    enable = true
    required_plugins = %s
    tolerate_missing_plugins_annotation = "weft.dev/tolerate-missing"
`

// Require makes containerd of every node refuse containers while NRI plugins are not there, and restarts it; without a
// name it requires none. A node that is stopped learns it at its next start.
func Require(ctx context.Context, dir string, plugins ...string) error {
	s, unlock, err := openLocked(ctx, dir)
	if err != nil {
		return err
	}
	defer unlock()
	names, err := json.Marshal(append([]string{}, plugins...)) // TOML writes a list of strings as JSON does
	if err != nil {
		return err
	}
	return s.eachNode(func(n int) error {
		if err := writeFile(s.path(nodeName(n), requiredFile), fmt.Appendf(nil, required, names), 0o644); err != nil {
			return err
		}
		pid, err := s.initPID(nodeName(n))
		if err != nil {
			return nil
		}
		return restartContainerd(ctx, nodeName(n), pid)
	})
}

// restartContainerd ends containerd of a machine, whose pid 1 starts it again, and waits until it answers.
func restartContainerd(ctx context.Context, name string, pid int) error {
	socket := fmt.Sprintf("/proc/%d/root/run/containerd/containerd.sock", pid)
	old, err := os.Stat(socket)
	if err != nil {
		return fmt.Errorf("restart containerd of %s: %w", name, err)
	}
	const end = `for p in /proc/[0-9]*; do read -r name <$p/comm && [ "$name" = containerd ] && kill "${p#/proc/}" && ended=1; done 2>/dev/null; [ "$ended" ]`
	if out, err := outside(ctx, "nsenter", append(enter(pid)[1:], "sh", "-c", end)...).CombinedOutput(); err != nil {
		return fmt.Errorf("end containerd of %s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return waitFor(ctx, "containerd of "+name, apiTimeout, func(ctx context.Context) error {
		if now, err := os.Stat(socket); err != nil || os.SameFile(old, now) {
			return errors.New("its socket is the old one, or not there")
		}
		argv := append(enter(pid), binFolder+"/ctr", "version")
		return outside(ctx, argv[0], argv[1:]...).Run()
	})
}

// StopNode ends node n: hard as a power cut does, else as a shutdown. Its state folders stay, its memory (/run, bpffs,
// network, processes) is lost.
func StopNode(ctx context.Context, dir string, n int, hard bool) error {
	s, unlock, err := openLocked(ctx, dir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.checkNode(n); err != nil {
		return err
	}
	if !slices.Contains(s.Stopped, n) {
		s.Stopped = append(s.Stopped, n)
	}
	if err := s.save(); err != nil {
		return err
	}
	return s.stopMachine(ctx, nodeName(n), hard)
}

// StartNode starts a stopped node n, with a new boot id. It returns once its programs are started; the API shows it
// Ready some seconds later.
func StartNode(ctx context.Context, dir string, n int) error {
	s, unlock, err := openLocked(ctx, dir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.checkNode(n); err != nil {
		return err
	}
	if _, err := s.initPID(nodeName(n)); err == nil {
		return fmt.Errorf("start %s: it runs", nodeName(n))
	}
	if err := s.bootNode(ctx, n); err != nil {
		return err
	}
	s.Stopped = slices.DeleteFunc(s.Stopped, func(stopped int) bool { return stopped == n })
	return s.save()
}

func (s *state) checkNode(n int) error {
	if n < 1 || n > s.Nodes {
		return fmt.Errorf("find node %d: the cluster has nodes 1 to %d: set N", n, s.Nodes)
	}
	return nil
}

// openLocked reads the state of a running cluster and keeps other commands off it.
func openLocked(ctx context.Context, dir string) (*state, func(), error) {
	unlock, err := Config{Dir: dir}.lock(ctx)
	if err != nil {
		return nil, nil, err
	}
	s, err := loadState(dir)
	if err != nil {
		unlock()
		return nil, nil, errDown(err)
	}
	return s, unlock, nil
}

// Status describes the cluster in a few lines.
func Status(ctx context.Context, dir string) (string, error) {
	s, err := loadState(dir)
	if err != nil {
		return "", errDown(err)
	}
	var out strings.Builder
	fmt.Fprintf(&out, "cluster %s of %s: slot %d, %s control groups, kubeconfig %s\n", s.Prefix(), dir, s.Slot, s.Layout, s.path("kubeconfig"))
	client, err := s.newAPI()
	if err != nil {
		return "", err
	}
	names := []string{controlPlaneName}
	for n := 1; n <= s.Nodes; n++ {
		names = append(names, nodeName(n))
	}
	for _, name := range names {
		pid, err := s.initPID(name)
		if err != nil {
			fmt.Fprintf(&out, "%s: stopped\n", name)
			continue
		}
		detail := "API server ready"
		if name == controlPlaneName {
			if err := client.get(ctx, "/readyz", nil); err != nil {
				detail = err.Error()
			}
		} else {
			var node apiNode
			if err := client.get(ctx, "/api/v1/nodes/"+name, &node); err != nil {
				detail = err.Error()
			} else if detail = "not Ready"; node.ready() {
				detail = "Ready"
			}
		}
		fmt.Fprintf(&out, "%s: pid 1 is %d, %s; enter it with %s\n", name, pid, detail, strings.Join(enter(pid), " "))
	}
	return out.String(), nil
}
