package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/cluster/cgroups"
	"golang.org/x/sys/unix"
)

// TestMain lets the test binary act as pid 1 of the machines it starts.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && (os.Args[1] == CommandStage || os.Args[1] == CommandInit) {
		run := map[string]func(string) error{CommandStage: Stage, CommandInit: Init}[os.Args[1]]
		if err := run(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// machineLayouts are this machine's own control groups and, to run the other code path in this kernel, its cgroup2
// mount alone.
func machineLayouts(t *testing.T) map[string]cgroups.Layout {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make namespaces")
	}
	layout, err := cgroups.Read()
	if err != nil {
		t.Fatal(err)
	}
	if readOnly := layout.ReadOnly(); len(readOnly) > 0 {
		t.Skipf("control groups are read-only here: %v", readOnly)
	}
	// Another package's tests switch controllers of the root, too.
	release, err := layout.Lock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	return map[string]cgroups.Layout{"as mounted": layout, "cgroup2 alone": {V2: layout.V2}}
}

// testMachine is a small machine of its own clone, removed at the end of the test.
func testMachine(t *testing.T, layout cgroups.Layout) (*state, machine) {
	t.Helper()
	s := &state{Config: Config{Dir: t.TempDir(), Nodes: 1}, Layout: layout}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, folder := range []string{"bin", "logs", "m/state"} {
		if err := os.MkdirAll(s.path(folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(self, s.program()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if raw, err := os.ReadFile(s.path("logs/m-init.log")); err == nil && t.Failed() {
			t.Logf("m-init.log: %s", raw)
		}
		err := errors.Join(layout.Kill(s.Prefix(), machineTimeout), layout.Remove(s.Prefix(), machineTimeout))
		layout.Disable(s.Controllers)
		if err != nil {
			t.Error(err)
		}
	})
	return s, machine{
		Name: "m", Group: s.group("m"), Folder: s.path("m"), Logs: s.path("logs"), Layout: layout,
		Binds:   []bind{{Source: "state", Target: "/var/lib/state"}, {Source: "/usr", Target: "/opt/readonly", ReadOnly: true}},
		Sysctls: map[string]string{"net/ipv4/ip_forward": "1"},
		Masks:   map[string]string{"kernel/panic": "77"},
		Files:   map[string]string{"/etc/weft-test": "layer"},
		Units: []unit{
			{Name: "first", Argv: []string{"/bin/sh", "-c", "echo first >> /var/lib/state/starts; touch /var/lib/state/serves; trap 'until test -e /var/lib/state/release; do sleep 0.05; done; echo first ends >> /var/lib/state/ends; exit' TERM; while :; do sleep 0.05; done"}},
			{Name: "second", WaitFor: "/var/lib/state/serves", Argv: []string{"/bin/sh", "-c", "echo second >> /var/lib/state/starts; trap 'echo second ends >> /var/lib/state/ends; exit' TERM; while :; do sleep 0.05; done"}},
		},
	}
}

// within waits until check succeeds.
func within(t *testing.T, what string, check func() error) {
	t.Helper()
	if err := waitFor(t.Context(), what, time.Minute, func(context.Context) error { return check() }); err != nil {
		t.Fatal(err)
	}
}

func content(file, want string) func() error {
	return func() error {
		raw, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if got := strings.TrimSpace(string(raw)); got != want {
			return fmt.Errorf("%s holds %q, want %q", filepath.Base(file), got, want)
		}
		return nil
	}
}

func TestMachine(t *testing.T) {
	for name, layout := range machineLayouts(t) {
		t.Run(name, func(t *testing.T) {
			s, m := testMachine(t, layout)
			forward, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
			if err != nil {
				t.Fatal(err)
			}
			panicAfter, err := os.ReadFile("/proc/sys/kernel/panic")
			if err != nil {
				t.Fatal(err)
			}
			connected := 0
			pid, err := s.startMachine(t.Context(), m, func(pid int) error {
				connected = pid
				if _, err := os.Stat(s.path("m/state/starts")); err == nil {
					t.Error("a unit started before the network was there")
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if pid != connected || pid == 0 {
				t.Errorf("pid 1 is %d, the network was laid for %d", pid, connected)
			}
			within(t, "both units", content(s.path("m/state/starts"), "first\nsecond"))

			inside := func(argv ...string) string {
				t.Helper()
				all := append(enter(pid), argv...)
				out, err := exec.CommandContext(t.Context(), all[0], all[1:]...).CombinedOutput()
				if err != nil {
					t.Errorf("%v: %v: %s", argv, err, out)
				}
				return strings.TrimSpace(string(out))
			}
			for _, view := range []struct{ argv, want string }{
				{"hostname", "m"},
				{"cat /etc/weft-test", "layer"},
				{"cat /proc/sys/kernel/panic", "77"},
				{"cat /proc/sys/net/ipv4/ip_forward", "1"},
				{"stat -f -c %T " + layout.InsideV2(), "cgroup2fs"},
				{"stat -f -c %T /sys/fs/bpf", "bpf_fs"},
				{"cat " + layout.InsideV2() + "/init/cgroup.procs", "1"},
				{"ls -A /run", "lock"},
			} {
				if got := inside(strings.Fields(view.argv)...); got != view.want {
					t.Errorf("%s inside: got %q, want %q", view.argv, got, view.want)
				}
			}
			if out, err := exec.Command(enter(pid)[0], append(enter(pid)[1:], "touch", "/opt/readonly/x")...).CombinedOutput(); err == nil {
				t.Errorf("write to a read-only bind: it worked: %s", out)
			}
			if _, err := os.Lstat("/etc/weft-test"); err == nil {
				t.Error("a file of the machine's layer shows outside")
			}
			for file, want := range map[string][]byte{"/proc/sys/net/ipv4/ip_forward": forward, "/proc/sys/kernel/panic": panicAfter} {
				if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s outside: got %q, %v, want %q", file, got, err, want)
				}
			}

			// A unit that dies is started again, in its own group.
			procs := layout.V2Path(s.group("m/first/cgroup.procs"))
			kill(t, procs)
			within(t, "the unit's second start", content(s.path("m/state/starts"), "first\nsecond\nfirst"))

			// A second SIGTERM, taken while the first unit still ends, cuts nothing short.
			for _, ends := range []string{"second ends", ""} {
				if err := unix.Kill(pid, unix.SIGTERM); err != nil {
					t.Fatal(err)
				}
				within(t, "pid 1 to take SIGTERM", func() error { return taken(pid, unix.SIGTERM) })
				if ends != "" {
					within(t, "the last unit's end", content(s.path("m/state/ends"), ends))
				}
			}
			if err := os.WriteFile(s.path("m/state/release"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			within(t, "the first unit's end", func() error {
				if content(s.path("m/state/ends"), "second ends\nfirst ends")() == nil || len(layout.Processes(s.group("m"))) == 0 {
					return nil
				}
				return errors.New("it still ends")
			})
			if err := s.stopMachine(t.Context(), "m", false); err != nil {
				t.Fatal(err)
			}
			if err := content(s.path("m/state/ends"), "second ends\nfirst ends")(); err != nil {
				t.Errorf("polite stop: %v", err)
			}
			if layout.Exists(s.group("m")) {
				t.Error("the machine's control group outlived it")
			}
			if _, err := s.initPID("m"); err == nil {
				t.Error("the machine's pid 1 outlived it")
			}
			if err := s.stopMachine(t.Context(), "m", false); err != nil {
				t.Errorf("stop a stopped machine: %v", err)
			}
		})
	}
}

// taken says that a signal sent to a process is no longer pending.
func taken(pid int, signal unix.Signal) error {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil // it has ended
	}
	for _, line := range strings.Split(string(status), "\n") {
		if mask, ok := strings.CutPrefix(line, "ShdPnd:"); ok {
			pending, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
			if err != nil || pending&(1<<(signal-1)) != 0 {
				return fmt.Errorf("%s is pending: %s, %v", signal, mask, err)
			}
		}
	}
	return nil
}

// kill ends the first process that a control group lists.
func kill(t *testing.T, procs string) {
	t.Helper()
	raw, err := os.ReadFile(procs)
	if err != nil {
		t.Fatal(err)
	}
	pids := strings.Fields(string(raw))
	if len(pids) == 0 {
		t.Fatalf("%s is empty", procs)
	}
	pid, err := strconv.Atoi(pids[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// A machine whose network cannot be laid, or that cannot lay its mounts, is not left running.
func TestMachineStartFails(t *testing.T) {
	for name, layout := range machineLayouts(t) {
		t.Run(name, func(t *testing.T) {
			s, m := testMachine(t, layout)
			failure := errors.New("no link")
			if _, err := s.startMachine(t.Context(), m, func(int) error { return failure }); !errors.Is(err, failure) {
				t.Errorf("start without network: got %v, want %v", err, failure)
			}
			if left := layout.Processes(s.group("m")); len(left) != 0 {
				t.Errorf("processes left: %v", left)
			}
			m.Binds = append(m.Binds, bind{Source: "missing", Target: "/mnt"})
			_, err := s.startMachine(t.Context(), m, func(int) error { t.Error("a machine without mounts got as far as its network"); return nil })
			if err == nil || !strings.Contains(err.Error(), "m-init.log") {
				t.Errorf("start with a bind whose source is missing: got %v, want the log named", err)
			}
			if left := layout.Processes(s.group("m")); len(left) != 0 {
				t.Errorf("processes left: %v", left)
			}
		})
	}
}
