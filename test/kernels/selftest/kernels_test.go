// Package selftest runs the hooks' tests, compiled from the same sources as elsewhere, on Debian's kernels.
package selftest

import (
	"bytes"
	"context"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kernels"
)

var logs = flag.String("logs", "", "folder for every machine's console and report; none: they are kept only while the tests run")

// The longest that machines may take, and that the tests may take in one; both end in less than a quarter of it on two
// idle processors.
const (
	patience      = 25 * time.Minute
	innerPatience = 20 * time.Minute
)

// sources are the packages whose tests run in every machine.
var sources = []struct {
	name, pkg string
	args      []string
}{
	{"cgroups", "test/cluster/cgroups", nil},
	// A page of the documentation depends on no kernel, and is not there.
	{"redirect", "redirect", []string{"-test.skip=^TestMetricsAreDocumented$"}},
	// Short: one pod holds 402 connections instead of 40,200, with a hundredth of the source ports.
	// One node of the two that run the table side by side: that they leave each other alone is no matter of the kernel's age.
	{"netns", "test/netns", []string{"-test.short", "-test.skip=^TestHooks$/./^right$"}},
}

func TestKernels(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	cache, err := kernels.Cache()
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	build := func(what string, args ...string) string {
		t.Helper()
		to := filepath.Join(work, what)
		cmd := exec.CommandContext(ctx, "go", append([]string{args[0]}, append(args[1:len(args)-1], "-o", to, args[len(args)-1])...)...)
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", what, err, out)
		}
		return to
	}
	machine := kernels.Machine{
		Init:     build("init", "build", "./test/kernels/init"),
		Programs: map[string]string{"sleep": busybox(t)},
		MemoryMB: 2048,
		CPUs:     1, // emulated, more of them spend their time waiting for one another
	}
	for _, s := range sources {
		test := kernels.Test{Name: s.name, Binary: build(s.name+".test", "test", "-c", "./"+s.pkg), Files: recorded(t, filepath.Join(root, s.pkg))}
		test.Args = append([]string{"-test.v=test2json", "-test.count=1", "-test.timeout=" + innerPatience.String()}, s.args...)
		machine.Tests = append(machine.Tests, test)
	}
	for _, line := range kernels.Lines {
		t.Run(line, func(t *testing.T) {
			k, err := kernels.Find(ctx, cache, line)
			if err != nil {
				t.Fatal(err)
			}
			t.Parallel() // one machine for each processor of a small computer
			m := machine
			m.Kernel, m.Folder = k, folder(t, line)
			boot(ctx, t, &m)
		})
	}
}

// busybox is the program that stands for those that the tests start.
func busybox(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal("find busybox: install the Debian package busybox-static (make deps): ", err)
	}
	return path
}

// recorded lists the files that a package's tests read.
func recorded(t *testing.T, pkg string) map[string]string {
	t.Helper()
	files := map[string]string{}
	paths, err := filepath.Glob(filepath.Join(pkg, "testdata", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		files[filepath.Join("testdata", filepath.Base(path))] = path
	}
	return files
}

func folder(t *testing.T, line string) string {
	t.Helper()
	if *logs == "" {
		return t.TempDir()
	}
	dir, err := filepath.Abs(filepath.Join(*logs, "kernel-"+line))
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// boot runs the machine and gives every test in it a subtest here.
func boot(ctx context.Context, t *testing.T, m *kernels.Machine) {
	var report bytes.Buffer
	file, err := os.Create(filepath.Join(m.Folder, "report.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for attempts := 2; ; attempts-- {
		started := time.Now()
		if err := m.Boot(ctx, &both{file: file, buffer: &report}); err != nil {
			t.Error(err) // what the machine said until then comes below
		}
		t.Logf("kernel %s ran for %v", m.Kernel.Version, time.Since(started).Round(time.Second))
		// An emulated kernel may die of its emulation while it starts; of a hook it cannot, before there is one.
		early, err := os.ReadFile(m.Console())
		if err != nil || report.Len() > 0 || attempts == 0 || !bytes.Contains(early, []byte("Kernel panic")) {
			break
		}
		t.Logf("it died before a test began, and is started again:\n%s", early)
	}
	sections, err := kernels.Sections(report.Bytes())
	if err != nil {
		t.Errorf("kernel %s: %v", m.Kernel.Version, err)
	}
	ran := map[string]bool{}
	for _, s := range sections {
		ran[s.Name] = true
		t.Run(s.Name, func(t *testing.T) {
			outcome, err := s.Outcomes(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, part := range outcome.Parts {
				replay(t, part)
			}
			switch {
			case len(outcome.Parts) == 0 && s.Code == 0:
				t.Error("no test ran")
			case !s.Ended || s.Code != 0:
				t.Errorf("it ended: %t, with code %d\n%s", s.Ended, s.Code, strings.Join(outcome.Output, ""))
			}
		})
	}
	for _, test := range m.Tests {
		if !ran[test.Name] {
			t.Errorf("%s did not run", test.Name)
		}
	}
	console, err := os.ReadFile(m.Console())
	if err != nil {
		t.Fatal(err)
	}
	for _, fault := range kernels.Faults(string(console)) {
		t.Errorf("kernel %s complains: %s", m.Kernel.Version, fault)
	}
	if t.Failed() {
		t.Logf("console of kernel %s:\n%s", m.Kernel.Version, console)
	}
}

// both writes to a file that can be watched and to memory.
type both struct {
	mu     sync.Mutex
	file   *os.File
	buffer *bytes.Buffer
}

func (b *both) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buffer.Write(p)
	return b.file.Write(p)
}

// replay tells the outcome of a test in a machine as one of this process's own.
func replay(t *testing.T, o *kernels.Outcome) {
	t.Run(o.Name, func(t *testing.T) {
		for _, part := range o.Parts {
			replay(t, part)
		}
		switch o.Action {
		case "pass":
			t.Logf("%.2f s in the machine", o.Seconds)
		case "skip":
			t.Errorf("skipped in the machine, whose kernel has everything: %s", o.Reason())
		case "fail":
			t.Errorf("failed after %.2f s in the machine:\n%s", o.Seconds, strings.Join(o.Output, ""))
		default:
			t.Errorf("did not end in the machine:\n%s", strings.Join(o.Output, ""))
		}
	})
}
