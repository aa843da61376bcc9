package redirect

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// placeholder is the constant that PATCHED in bpf/inline.h leaves in the instructions.
const placeholder = 0x1122334455667788

// loadInstance loads one copy of a program that serves a single pod or Envoy, with its number in the placeholder's
// place. Without line info and BTF a copy takes 9 KB of kernel memory instead of 19.
func loadInstance(spec *ebpf.ProgramSpec, maps map[string]*ebpf.Map, number uint64) (*ebpf.Program, error) {
	spec = spec.Copy()
	patched := 0
	for i := range spec.Instructions {
		ins := &spec.Instructions[i]
		name := ins.Reference()
		ins.Metadata = asm.Metadata{}
		switch {
		case ins.OpCode.IsDWordLoad() && ins.Constant == placeholder:
			ins.Constant = int64(number)
			patched++
		case name != "" && ins.IsLoadFromMap():
			m, ok := maps[name]
			if !ok {
				return nil, fmt.Errorf("load program %s: no map %s", spec.Name, name)
			}
			if err := ins.AssociateMap(m); err != nil {
				return nil, fmt.Errorf("load program %s: %w", spec.Name, err)
			}
		case name != "":
			*ins = ins.WithReference(name)
		}
	}
	if patched != 1 {
		return nil, fmt.Errorf("load program %s: placeholder found %d times, not once", spec.Name, patched)
	}
	// Jumps name their targets; they were resolved to offsets when the object was read.
	return ebpf.NewProgram(spec)
}

// program opens a hook's program: the one that all share, or for those that serve one pod or one Envoy a copy with its
// number. The caller closes it.
func (r *Redirect) program(name string, number uint64) (*ebpf.Program, error) {
	if shared := r.programs[name]; shared != nil {
		return shared.Clone()
	}
	program, err := loadInstance(r.spec.Programs[name], r.maps, number)
	if err != nil {
		return nil, explain(err)
	}
	return program, nil
}

// hookCopy names a program; number is 0 where all share it.
type hookCopy struct {
	name   string
	number uint64
}

// tagOf is the kernel's hash of the instructions that a hook has in this version.
func (r *Redirect) tagOf(name string, number uint64) (string, error) {
	if r.programs[name] != nil {
		number = 0
	}
	key := hookCopy{name, number}
	if tag, known := r.tags[key]; known {
		return tag, nil
	}
	program, err := r.program(name, number)
	if err != nil {
		return "", err
	}
	defer program.Close()
	tag, err := tagOfProgram(program)
	if err != nil {
		return "", err
	}
	r.tags[key] = tag
	return tag, nil
}

func tagOfProgram(program *ebpf.Program) (string, error) {
	info, err := program.Info()
	if err != nil {
		return "", fmt.Errorf("read program: %w", err)
	}
	return info.Tag, nil
}

// tagOfID is the tag of a program that somebody may have loaded; "" if the kernel has it no more.
func tagOfID(id ebpf.ProgramID) (string, error) {
	program, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", fmt.Errorf("open program %d: %w", id, err)
	}
	defer program.Close()
	return tagOfProgram(program)
}

// sameProgram reports whether the kernel's program has the instructions of ours.
func sameProgram(id ebpf.ProgramID, ours *ebpf.Program) (bool, error) {
	theirs, err := tagOfID(id)
	if err != nil {
		return false, err
	}
	tag, err := tagOfProgram(ours)
	return err == nil && theirs == tag, err
}
