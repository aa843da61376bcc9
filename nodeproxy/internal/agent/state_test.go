package agent

import (
	"os"
	"path/filepath"
	"testing"
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
