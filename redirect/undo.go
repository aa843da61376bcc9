package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// undoList holds what brings the node back to where it was, latest last.
type undoList struct {
	steps []func() error
	kept  []*ebpf.Program // programs that only the list keeps in the kernel
}

func (u *undoList) removeFile(path string) {
	u.steps = append(u.steps, func() error {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("undo: %w", err)
		}
		return nil
	})
}

// replace gives the link pinned at path another program, and notes how to give it back what it has now.
func (u *undoList) replace(path string, a *attachment, program *ebpf.Program) error {
	before, err := ebpf.NewProgramFromID(a.program)
	if err != nil {
		return fmt.Errorf("open program %d of link %s: %w", a.program, path, err)
	}
	if err := a.link.Update(program); err != nil {
		before.Close()
		return fmt.Errorf("replace program of link %s: %w", path, err)
	}
	u.kept = append(u.kept, before)
	u.steps = append(u.steps, func() error {
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return fmt.Errorf("undo: open link %s: %w", path, err)
		}
		defer l.Close()
		if err := l.Update(before); err != nil {
			return fmt.Errorf("undo: give link %s its program back: %w", path, err)
		}
		return nil
	})
	return nil
}

// run undoes everything, the latest first, and goes on where a step fails.
func (u *undoList) run() error {
	var errs []error
	for i := len(u.steps) - 1; i >= 0; i-- {
		errs = append(errs, u.steps[i]())
	}
	u.drop()
	return errors.Join(errs...)
}

// drop forgets what was done: it stays.
func (u *undoList) drop() {
	for _, p := range u.kept {
		p.Close()
	}
	u.steps, u.kept = nil, nil
}
