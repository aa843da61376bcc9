package kernels

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestSourcesAreTheMachinesMirrorsWithBackports(t *testing.T) {
	sources, err := sourcesFrom(`http://mirror.test/debian/ bookworm main
http://mirror.test/debian/ bookworm contrib
http://mirror.test/debian/ bookworm-updates main
http://mirror.test/debian/ bookworm main
http://mirror.test/security/ bookworm-security main
https://other.test/apt/ stable main
`)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(sources) {
		fields := strings.Fields(line)
		got = append(got, strings.Join(fields[len(fields)-3:], " "))
	}
	want := []string{"http://mirror.test/debian/ bookworm main", "http://mirror.test/debian/ bookworm-backports main", "http://mirror.test/security/ bookworm-security main"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if _, err := sourcesFrom("https://other.test/apt/ stable main\n"); err == nil || !strings.Contains(err.Error(), "sources.list.d") {
		t.Errorf("without a mirror: %v", err)
	}
}

func TestKernelsAreTheSignedOnesForClouds(t *testing.T) {
	names := `linux-image-6.1.0-49-cloud-amd64
linux-image-6.1.0-49-cloud-amd64-dbg
linux-image-6.1.0-49-cloud-amd64-unsigned
linux-image-6.1.0-49-amd64
linux-image-6.12.48+deb12-cloud-amd64
`
	for line, want := range map[string][]string{
		"6.1":  {"linux-image-6.1.0-49-cloud-amd64"},
		"6.12": {"linux-image-6.12.48+deb12-cloud-amd64"},
		"6.13": nil,
	} {
		if got := kernelNames(names, line); !slices.Equal(got, want) {
			t.Errorf("line %s: got %q, want %q", line, got, want)
		}
	}
}

func TestModulesLoadAfterWhatTheyNeed(t *testing.T) {
	needs := map[string][]string{"tcp_diag": {"inet_diag"}, "inet_diag": {"deep", "builtin"}, "deep": nil, "veth": nil, "odd": {"nowhere"}}
	depends := func(name string) ([]string, bool, error) {
		if name == "builtin" {
			return nil, false, nil
		}
		needed, known := needs[name]
		if !known {
			return nil, false, fmt.Errorf("find %s", name)
		}
		return needed, true, nil
	}
	order, err := loadOrder([]string{"veth", "tcp-diag", "inet_diag"}, depends)
	if want := []string{"veth", "deep", "inet_diag", "tcp_diag"}; err != nil || !slices.Equal(order, want) {
		t.Errorf("got %q, %v, want %q", order, err, want)
	}
	if _, err := loadOrder([]string{"odd"}, depends); err == nil || !strings.Contains(err.Error(), "find nowhere, which odd needs") {
		t.Errorf("a module that is missing: %v", err)
	}
	if got := dependsOf("license=GPL\x00depends=inet_diag,deep\x00name=x\x00"); !slices.Equal(got, []string{"inet_diag", "deep"}) {
		t.Errorf("depends: %q", got)
	}
	if got := dependsOf("license=GPL\x00depends=\x00"); got != nil {
		t.Errorf("depends on nothing: %q", got)
	}
	if got := moduleName("kernel/net/ipv4/inet-diag.ko.xz"); got != "inet_diag" {
		t.Errorf("module name: %s", got)
	}
}

func TestInitramfsHasItsFilesAndAnOpenRoot(t *testing.T) {
	var out bytes.Buffer
	if err := writeInitramfs(&out, map[string][]byte{"/init": []byte("abc"), "/tests/netns/run": []byte("12345")}, "/proc"); err != nil {
		t.Fatal(err)
	}
	if out.Len()%4 != 0 {
		t.Errorf("%d bytes are no multiple of four", out.Len())
	}
	var got []string
	for rest := out.Bytes(); len(rest) > 0; {
		field := func(n int) (value int) {
			if _, err := fmt.Sscanf(string(rest[6+8*n:14+8*n]), "%x", &value); err != nil {
				t.Fatal(err)
			}
			return value
		}
		if string(rest[:6]) != "070701" {
			t.Fatalf("no header: %q", rest[:6])
		}
		mode, size, nameSize := field(1), field(6), field(11)
		name := string(rest[110 : 110+nameSize-1])
		body := (110 + nameSize + 3) &^ 3
		got = append(got, fmt.Sprintf("%s %o %s", name, mode, rest[body:body+size]))
		rest = rest[(body+size+3)&^3:]
	}
	want := []string{". 40755 ", "proc 40755 ", "tests 40755 ", "tests/netns 40755 ", "init 100755 abc", "tests/netns/run 100755 12345", "TRAILER!!! 0 "}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestReportsAreTakenApart(t *testing.T) {
	whole := MarkerBegin + "one\n=== RUN   A\nPASS\n\n" + MarkerEnd + "one 0\n" + MarkerBegin + "two\nFAIL\n" + MarkerEnd + "two 1\n"
	sections, err := Sections([]byte(whole + MarkerDone + "\n"))
	if err != nil || len(sections) != 2 {
		t.Fatal(sections, err)
	}
	if s := sections[0]; s.Name != "one" || !s.Ended || s.Code != 0 || !strings.HasPrefix(string(s.Output), "=== RUN   A\nPASS\n") {
		t.Errorf("%+v", s)
	}
	if s := sections[1]; s.Name != "two" || !s.Ended || s.Code != 1 {
		t.Errorf("%+v", s)
	}
	for report, says := range map[string]string{
		whole:                               "before its plan did",
		whole + MarkerBegin + "three\nhalf": "before its plan did",
		MarkerBroken + "load /veth.ko: no":  "load /veth.ko: no",
		"":                                  "before its plan did",
	} {
		sections, err := Sections([]byte(report))
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", report, err)
		}
		if n := len(sections); n == 3 && sections[2].Ended {
			t.Error("a binary that was cut off has ended")
		}
	}
}

func TestEventsBecomeATree(t *testing.T) {
	root, err := readEvents("netns", []byte(`{"Action":"start"}
{"Action":"run","Test":"T"}
{"Action":"run","Test":"T/a_b/left"}
{"Action":"output","Test":"T/a_b/left","Output":"    x_test.go:3: no such thing\n"}
{"Action":"skip","Test":"T/a_b/left","Elapsed":0.5}
{"Action":"pass","Test":"T/a_b"}
{"Action":"run","Test":"T/cut"}
{"Action":"fail"}
`))
	if err != nil {
		t.Fatal(err)
	}
	if root.Action != "fail" || len(root.Parts) != 1 || len(root.Parts[0].Parts) != 2 {
		t.Fatalf("%+v", root)
	}
	both := root.Parts[0].Parts
	if left := both[0].Parts[0]; both[0].Action != "pass" || left.Action != "skip" || left.Seconds != 0.5 || left.Reason() != "no such thing" {
		t.Errorf("%+v", left)
	}
	if both[1].Name != "cut" || both[1].Action != "" {
		t.Errorf("a test that did not end: %+v", both[1])
	}
}

func TestFaultsOfTheKernelShow(t *testing.T) {
	console := "[ 1.0] mtrr: fine\n[ 2.0] BUG: unable to handle page fault\n[ 3.0] WARNING: CPU: 0 PID: 7 at net/core\n[ 4.0] watchdog: BUG: soft lockup - CPU#0 stuck for 26s!\n"
	if got := Faults(console); len(got) != 2 || !strings.Contains(got[0], "BUG:") {
		t.Errorf("faults %q", got)
	}
}

func TestAKernelThatCannotBeHadIsNoSkip(t *testing.T) {
	cache := t.TempDir()
	// Half a kernel, as a crash would leave it, does not count.
	if err := os.MkdirAll(filepath.Join(cache, "6.1.1-1", "modules"), 0o755); err != nil {
		t.Fatal(err)
	}
	if k := cached(t.Context(), cache, "6.1"); k != nil {
		t.Errorf("half a kernel was taken: %+v", k)
	}
	t.Setenv("PATH", "/nonexistent")
	_, err := Find(t.Context(), cache, "6.1")
	if err == nil || !strings.Contains(err.Error(), "connect this machine") || !errors.Is(err, os.ErrNotExist) && !strings.Contains(err.Error(), "not found") {
		t.Errorf("without apt: %v", err)
	}
}
