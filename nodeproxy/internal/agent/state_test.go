package agent

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/weftmesh/weft/nodeproxy/internal/envoy"
)

func TestPodMemory(t *testing.T) {
	m := podMemory{t.TempDir()}
	if got, err := m.Load("pod"); got != nil || err != nil {
		t.Errorf("nothing is kept, and: %q, %v", got, err)
	}
	for _, record := range []string{"first", "second"} {
		if err := m.Save("pod", []byte(record)); err != nil {
			t.Fatal(err)
		}
		if got, err := m.Load("pod"); string(got) != record || err != nil {
			t.Errorf("kept %q, want %q; %v", got, record, err)
		}
	}
	if err := os.WriteFile(filepath.Join(m.folder, "pod"), []byte("weft-state 1 cut sh"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Load("pod"); err == nil {
		t.Errorf("a damaged record is taken: %q", got)
	}
	for range 2 {
		if err := m.Drop("pod"); err != nil {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(m.folder); len(left) != 0 || err != nil {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestLeavingClearsTheRunFolder: of supervisors too that were killed, and not of one that lives.
func TestLeavingClearsTheRunFolder(t *testing.T) {
	dir := t.TempDir()
	for path, text := range map[string]string{
		"generation-0/envoy/admin.sock": "", "generation-0/pod": "killed", "supervisor-0.lock": "",
		"generation-1/pod": "lives",
		"state/index.123":  "an agent was killed as it wrote", "agent.owners": "a", "agent.owners.next": "a b", "agent.next": "",
	} {
		path = filepath.Join(dir, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	lives, err := envoy.TryLock(filepath.Join(dir, "supervisor-1.lock"))
	if err != nil || lives == nil {
		t.Fatal(err)
	}
	defer lives()
	b := newBench(t, dir)
	if err := b.forget(); err != nil {
		t.Fatal(err)
	}
	var left []string
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			name, _ := filepath.Rel(dir, path)
			left = append(left, name)
		}
		return err
	})
	if err != nil || !slices.Equal(left, []string{"generation-1/pod", "supervisor-1.lock"}) {
		t.Errorf("left: %v, %v", left, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "generation-0")); err == nil {
		t.Error("the folder of the killed supervisor is there")
	}
}

// TestLeavingWaitsForOpenConnections: as long as Envoy may serve them, and no longer.
func TestLeavingWaitsForOpenConnections(t *testing.T) {
	for _, c := range []struct {
		name  string
		drain time.Duration
		inUse int // sweeps
		runs  bool
		left  int
	}{
		{"connections that end", time.Hour, 2, true, 0},
		{"connections that outlive the drain", -time.Hour, 1000, true, 1},
		{"connections that end with Envoy", time.Hour, 2, false, 0},
		{"what is counted for ever when no Envoy is left", time.Hour, 1000, false, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, t.TempDir())
			b.config.DrainTimeout, b.kernel.pods, b.kernel.leaving = c.drain, map[string]int{"used": c.inUse, "idle": 0}, map[string]int{}
			if c.runs {
				end, err := envoy.TryLock(filepath.Join(b.config.RunDir, "supervisor-1.lock"))
				if err != nil || end == nil {
					t.Fatal(err)
				}
				defer end()
			}
			if err := b.takeOut(); err != nil {
				t.Fatal(err)
			}
			if len(b.kernel.pods) > 0 || len(b.kernel.leaving) != c.left {
				t.Errorf("pods %v, %d sweeps, leaving %v", b.kernel.pods, len(b.kernel.swept), b.kernel.leaving)
			}
		})
	}
}
