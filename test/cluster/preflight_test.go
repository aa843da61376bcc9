package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// preflight runs hack/preflight.sh with a PATH of the given programs alone, shell scripts by name, and returns what it
// lists.
func preflight(t *testing.T, uid uint32, programs map[string]string, args ...string) (string, error) {
	t.Helper()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Fatal(err)
	}
	// A copy, because another user may not read the clone.
	clone, err := os.MkdirTemp("/tmp", "weft-preflight-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(clone) })
	if err := os.Chmod(clone, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"go.mod", "hack/preflight.sh", "hack/deps.sh", "hack/packages/envoy.txt"} {
		content, err := os.ReadFile(filepath.Join("../..", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := writeFile(filepath.Join(clone, name), content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, script := range programs {
		if err := writeFile(filepath.Join(clone, "bin", name), []byte("#!"+bash+"\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	command := exec.CommandContext(t.Context(), bash, append([]string{filepath.Join(clone, "hack/preflight.sh")}, args...)...)
	command.Env = []string{"PATH=" + filepath.Join(clone, "bin"), "HOME=" + clone}
	if os.Geteuid() != int(uid) {
		command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	out, err := command.CombinedOutput()
	return string(out), err
}

// Whoever starts with little learns at once of all that is missing and of what to do about each.
func TestPreflightListsAll(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	const nobody = 65534
	df := `echo "Filesystem 1024-blocks Used Available Capacity Mounted on"; echo "/dev/sda1 9000000 8000000 1000000 89% /"`
	for _, test := range []struct {
		name     string
		uid      uint32
		programs map[string]string
		memory   string
		want     []string
	}{
		{"an empty PATH", nobody, nil, "1", []string{"root:", "Go:", "Debian:"}},
		{"Debian's own Go, no memory, no disk", nobody, map[string]string{
			"go": "echo go1.19.8", "df": df, "apt-get": ":", "dpkg-query": "echo installed"}, "999999999",
			[]string{"root:", "Go 1.26: this is go1.19.8", "memory:", "disk: 976 MiB free at /tmp/weft-preflight-"}},
		{"a package", nobody, map[string]string{
			"go": "echo go1.26.8", "apt-get": ":", "dirname": `echo "${1%/*}"`, "sort": `echo "$(<"$2")"`,
			"dpkg-query": `[[ ${!#} == python3-pip ]] || echo -n installed`}, "1", []string{"root:", "Debian packages: python3-pip"}},
		{"root with an old Go", 0, map[string]string{"go": "echo go1.25.1", "apt-get": ":"}, "1", []string{"Go 1.26: this is go1.25.1"}},
		{"nothing", 0, map[string]string{"go": "echo go1.27rc1", "df": df, "apt-get": ":"}, "1", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			disk := "976"
			if test.memory != "1" {
				disk = "977"
			}
			out, err := preflight(t, test.uid, test.programs, test.memory, disk, "envoy")
			if (err != nil) != (len(test.want) > 0) {
				t.Errorf("got error %v", err)
			}
			var got []string
			for _, line := range strings.Split(out, "\n") {
				if what, ok := strings.CutPrefix(line, "  - "); ok {
					got = append(got, what)
				}
			}
			if len(got) != len(test.want) || strings.Count(out, "\n    remedy: ") != len(test.want) {
				t.Fatalf("got %q, want %d problems, each with its remedy", out, len(test.want))
			}
			for i, want := range test.want {
				if !strings.HasPrefix(got[i], want) {
					t.Errorf("got %q, want %q", got[i], want)
				}
			}
		})
	}
}

// The Go part lists its problems in the same way.
func TestPreflightWithoutPrograms(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	c := Config{Dir: filepath.Join("..", ".."), Nodes: 1}
	err := Preflight(t.Context(), c)
	if err == nil {
		t.Fatal("a machine without programs passes")
	}
	text := err.Error()
	for _, want := range []string{"programs: runc, nft", "apt-get install runc nftables", "Go: go env GOVERSION fails"} {
		if !strings.Contains(text, want) {
			t.Errorf("the list lacks %q: %s", want, text)
		}
	}
	problems := strings.Count(text, "\n  - ")
	if problems < 2 || strings.Count(text, "\n    remedy: ") != problems || !strings.HasPrefix(text, fmt.Sprintf("check the machine: %d problems:", problems)) {
		t.Errorf("%d problems: %s", problems, text)
	}
}
