// Command init is process 1 of the machines that package kernels boots. It runs the plan and powers off.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/test/kernels"
)

// openFiles is the hard limit of open files. The tests must do with what a common node gives a process.
const openFiles = 20000

func main() {
	report, err := start()
	if err != nil {
		fmt.Println("init:", err) // on the console
	} else if err = run(report); err != nil {
		fmt.Fprintln(report, kernels.MarkerBroken+err.Error())
	}
	if err == nil {
		fmt.Fprintln(report, kernels.MarkerDone)
	}
	if report != nil {
		_ = unix.IoctlSetInt(int(report.Fd()), unix.TCSBRK, 1) // until the last byte is out
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// start mounts the file systems and opens the serial port for reports.
func start() (*os.File, error) {
	for _, m := range []struct{ kind, at string }{
		{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"cgroup2", "/sys/fs/cgroup"}, {"bpf", "/sys/fs/bpf"},
		{"tmpfs", "/tmp"}, {"tmpfs", "/run"},
	} {
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	report, err := os.OpenFile(kernels.ReportDevice, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("open the serial port for reports: %w", err)
	}
	settings, err := unix.IoctlGetTermios(int(report.Fd()), unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("read the settings of the serial port for reports: %w", err)
	}
	settings.Oflag &^= unix.OPOST // lines as they are
	settings.Lflag = 0
	if err := unix.IoctlSetTermios(int(report.Fd()), unix.TCSETS, settings); err != nil {
		return nil, fmt.Errorf("set the serial port for reports: %w", err)
	}
	return report, nil
}

func run(report *os.File) error {
	content, err := os.ReadFile(kernels.PlanPath)
	if err != nil {
		return err
	}
	var plan kernels.Plan
	if err := json.Unmarshal(content, &plan); err != nil {
		return fmt.Errorf("read the plan: %w", err)
	}
	for _, module := range plan.Modules {
		if err := load(module); err != nil {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	limit := unix.Rlimit{Cur: openFiles, Max: openFiles}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("limit open files: %w", err)
	}
	for _, r := range plan.Runs {
		fmt.Fprintln(report, kernels.MarkerBegin+r.Name)
		code, err := command(r, report)
		if err != nil {
			return fmt.Errorf("run %s: %w", r.Name, err)
		}
		fmt.Fprintf(report, "\n%s%s %d\n", kernels.MarkerEnd, r.Name, code) // a line of its own, whatever was said last
	}
	return nil
}

func load(module string) error {
	file, err := os.Open(module)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := unix.FinitModule(int(file.Fd()), "", 0); err != nil {
		return fmt.Errorf("load %s: %w", module, err)
	}
	return nil
}

// command runs one test binary and, as process 1 must, reaps every process that lost its parent.
func command(r kernels.Run, report *os.File) (code int, err error) {
	process, err := os.StartProcess(r.Command[0], r.Command, &os.ProcAttr{
		Dir:   r.Folder,
		Env:   []string{"PATH=/bin", "HOME=/tmp", "TMPDIR=/tmp"},
		Files: []*os.File{nil, report, report},
	})
	if err != nil {
		return 0, err
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case pid == process.Pid && status.Signaled():
			return 128 + int(status.Signal()), nil
		case pid == process.Pid:
			return status.ExitStatus(), nil
		}
	}
}
