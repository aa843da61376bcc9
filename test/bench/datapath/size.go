package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/weftmesh/weft/test/bench/machine"
	"github.com/weftmesh/weft/test/bench/report"
	"github.com/weftmesh/weft/test/contract/proxy"
	"github.com/weftmesh/weft/test/datapath/lab"
)

// Goals of the mesh's size.
const (
	agentGoal   = 64 // MiB
	serviceGoal = 4  // KiB of Envoy
)

// size runs the real agent and the real supervisor with Envoy against a controller that gives an index of the wanted size, and
// a container runtime without pods.
func size(ctx context.Context, o options) (out []report.Figure, processes []report.Process, err error) {
	program := filepath.Join(lab.Scratch(), "bin", "nodeproxy")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./nodeproxy")
	build.Dir = o.root
	if out, err := build.CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("build nodeproxy: %w: %s", err, out)
	}
	sized := map[string]sizes{}
	for _, c := range []struct {
		name string
		extent
	}{
		{"empty", extent{families: 1}}, {"single", extent{services: o.services, pods: o.pods, families: 1}}, {"dual", extent{services: o.services, pods: o.pods, families: 2}},
	} {
		fmt.Printf("an agent and an Envoy with %d services and %d pods, %d addresses each\n", c.services, c.pods, c.families)
		got, err := weigh(ctx, program, c.name, c.extent)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", c.name, err)
		}
		fmt.Printf("  in force after %s; agent %d KiB (peak %d), supervisor %d, broker %d, Envoy %d\n", got.took.Round(time.Millisecond), got.agent, got.peak, got.supervisor, got.broker, got.envoy)
		sized[c.name] = got
	}
	mesh := fmt.Sprintf("%d services, %d pods", o.services, o.pods)
	how := "a real agent and Envoy, the index served over mTLS; resident memory %s after it is in force"
	for _, c := range []struct{ name, text string }{{"single", "one address each"}, {"dual", "IPv4 and IPv6 each"}} {
		got := sized[c.name]
		out = append(out,
			report.Figure{Name: "agent's memory, " + mesh + ", " + c.text, Unit: "MiB", Value: float64(got.agent) / 1024, AtMost: agentGoal, How: fmt.Sprintf(how, rest)},
			report.Figure{Name: "agent's peak, " + mesh + ", " + c.text, Unit: "MiB", Value: float64(got.peak) / 1024, How: "VmHWM of the same process"})
		if o.services > 0 {
			out = append(out, report.Figure{Name: "Envoy's memory per unused service, " + c.text, Unit: "KiB", AtMost: serviceGoal,
				Value: (float64(got.envoy) - float64(sized["empty"].envoy)) / float64(o.services), How: fmt.Sprintf("over an Envoy without services, divided by %d", o.services)})
		}
	}
	empty := sized["empty"]
	for _, p := range []struct {
		name string
		kib  uint64
	}{{"agent", empty.agent}, {"supervisor", empty.supervisor}, {"broker", empty.broker}, {"Envoy", empty.envoy}} {
		out = append(out, report.Figure{Name: p.name + "'s memory, empty mesh", Unit: "MiB", Value: float64(p.kib) / 1024, How: "resident"})
	}
	return out, []report.Process{{Of: report.Weft, Name: "weft: nodeproxy agent, empty mesh", Node: 0, RSS: empty.agent, PSS: empty.agentPSS}}, nil
}

// rest is how long the processes are left alone before they are weighed: Envoy's allocator gives back what has not been needed for a
// minute or so.
const rest = 100 * time.Second

// extent is how large a mesh is.
type extent struct{ services, pods, families int }

// sizes are resident memory in KiB.
type sizes struct {
	agent, agentPSS, peak, supervisor, broker, envoy uint64
	took                                             time.Duration
}

// weigh runs one agent and one Envoy.
func weigh(ctx context.Context, program, name string, e extent) (s sizes, err error) {
	dir := filepath.Join(lab.Scratch(), "size-"+name)
	run, cgroup := filepath.Join(dir, "run"), filepath.Join(lab.Cgroup(), "size-"+name)
	bpf := filepath.Join(lab.Scratch(), "bpf", "size-"+name)
	for _, path := range []string{run, cgroup, bpf} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return s, err
		}
	}
	binary, err := lab.Envoy()
	if err != nil {
		return s, err
	}
	controller, err := newController(dir, e)
	if err != nil {
		return s, err
	}
	defer controller.stop()
	nri, err := newPodless(filepath.Join(dir, "nri.sock"))
	if err != nil {
		return s, err
	}
	defer nri.stop()
	begun := time.Now()
	supervisor, err := launch(cgroup, filepath.Join(dir, "supervisor.log"), program, "envoy", "--envoy", binary, "--run-dir", run, "--node-name", "node-0", "--pod-uid", "size",
		"--cgroup-root", cgroup, "--self-cgroup", "/nonexistent", "--drain-timeout", "1s")
	if err != nil {
		return s, err
	}
	defer end(supervisor)
	agent, err := launch(cgroup, filepath.Join(dir, "agent.log"), program, "agent", "--node-name", "node-0", "--controller", controller.address, "--token-file", controller.token, "--bundle-file", controller.bundle,
		"--run-dir", run, "--bpffs", bpf, "--cgroup-root", cgroup, "--nri-socket", nri.path, "--netns-dir", filepath.Join(lab.Scratch(), "netns"), "--metrics", "127.0.0.1:0")
	if err != nil {
		return s, err
	}
	defer end(agent)
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := proxy.Until(wait, controller.inForce); err != nil {
		log, _ := os.ReadFile(filepath.Join(dir, "agent.log"))
		return s, fmt.Errorf("wait until the index is in force: %w\n%s", err, tail(string(log)))
	}
	s.took = time.Since(begun)
	select {
	case <-ctx.Done():
		return s, ctx.Err()
	case <-time.After(rest):
	}
	return s, s.read(agent.Process.Pid, supervisor.Process.Pid)
}

func (s *sizes) read(agent, supervisor int) (err error) {
	if s.agent, s.agentPSS, err = memory(agent); err != nil {
		return err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", agent))
	if err != nil {
		return err
	}
	if s.peak, err = strconv.ParseUint(strings.TrimSuffix(machine.Field(string(status), "VmHWM"), " kB"), 10, 64); err != nil {
		return fmt.Errorf("read the agent's peak: %w", err)
	}
	if s.supervisor, _, err = memory(supervisor); err != nil {
		return err
	}
	children, err := exec.Command("pgrep", "-P", strconv.Itoa(supervisor)).Output()
	if err != nil {
		return fmt.Errorf("find Envoy: %w", err)
	}
	for _, text := range strings.Fields(string(children)) {
		pid, err := strconv.Atoi(text)
		if err != nil {
			return err
		}
		rss, _, err := memory(pid)
		if err != nil {
			return err
		}
		if strings.HasSuffix(program(pid), "envoy-broker") {
			s.broker = rss
		} else {
			s.envoy = rss
		}
	}
	if s.broker == 0 || s.envoy == 0 {
		return errors.New("find Envoy and its broker: one is not there")
	}
	return nil
}

func launch(cgroup, log string, arguments ...string) (*exec.Cmd, error) {
	dir, err := os.Open(cgroup)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	out, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd := exec.Command(arguments[0], arguments[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s %s: %w", arguments[0], arguments[1], err)
	}
	return cmd, nil
}

// end asks a process to end and waits for it.
func end(cmd *exec.Cmd) {
	_ = cmd.Process.Signal(syscall.SIGTERM)
	killer := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
	defer killer.Stop()
	_ = cmd.Wait()
}
