package redirect

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// MinimumShortcutKernel is the oldest Linux that may have the short circuit. From it on the kernel charges what it
// redirects to the reader, counts FIONREAD right, and keeps the sockets of MPTCP listeners apart. tryShortcut looks at
// what a kernel really does.
const MinimumShortcutKernel = "6.18"

// The programs on the sockets that have joined. They hang on the map and stay with it; a socket keeps those that it
// joined with, whatever replaces them.
var shortcutHooks = []struct {
	name   string
	attach ebpf.AttachType
}{
	{shortcutProgStreamVerdict, ebpf.AttachSkSKBStreamVerdict},
	{shortcutProgMsgVerdict, ebpf.AttachSkMsgVerdict},
}

// SetShortcut switches a pod's short circuit: payload between its apps and Envoy goes past TCP, on connections made from
// now on, and again on those made while it was on. Either switch keeps every byte and their order. Switched off, sockets
// that have joined stay on TCP. The error is ErrUnsupported where this kernel cannot have it; ShortcutRefused says why.
func (r *Redirect) SetShortcut(uid string, on bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	cookie, err := r.cookieOf(uid)
	if err == nil {
		err = r.changePod(cookie, func(p *weftPod) {
			p.Flags &^= weftPodFlagPOD_SHORTCUT
			if on && r.shortcutRefused == nil {
				p.Flags |= weftPodFlagPOD_SHORTCUT
			}
		})
	}
	if err == nil && on {
		err = r.shortcutRefused
	}
	if err != nil {
		return fmt.Errorf("set short circuit of pod %s: %w", uid, err)
	}
	return nil
}

// ShortcutRefused tells why no pod of this node can have the short circuit. Nil: each can.
func (r *Redirect) ShortcutRefused() error { return r.shortcutRefused }

// loadShortcut loads the short circuit's programs where the kernel can have them, and notes why not where it cannot. The
// mesh does not depend on it.
func (r *Redirect) loadShortcut(try func() error) {
	r.shortcutRefused = func() error {
		if err := checkRelease(kernelRelease()); err != nil {
			return err
		}
		if err := try(); err != nil {
			return fmt.Errorf("kernel %s, %w", kernelRelease(), err)
		}
		return r.loadShortcutPrograms()
	}()
	if r.shortcutRefused != nil {
		r.log.Info("no pod of this node can have the short circuit", "error", r.shortcutRefused)
	}
}

func (r *Redirect) loadShortcutPrograms() error {
	spec, err := loadShortcut()
	if err != nil {
		return fmt.Errorf("read the object of the short circuit: %w", err)
	}
	for _, name := range []string{shortcutMapTrialJoined, shortcutMapTrialSeen} {
		delete(spec.Maps, name)
	}
	delete(spec.Programs, shortcutProgTrialVerdict)
	shared := map[string]*ebpf.Map{}
	for name, m := range spec.Maps {
		m.MaxEntries = r.maps[name].MaxEntries()
		shared[name] = r.maps[name]
	}
	loaded, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		return fmt.Errorf("load the short circuit: %w: %w", ErrUnsupported, err)
	}
	defer loaded.Close()
	for _, h := range shortcutHooks {
		r.programs[h.name] = loaded.DetachProgram(h.name)
	}
	return nil
}

// ensureShortcut attaches the programs that joined lacks, or has of another version.
func (r *Redirect) ensureShortcut(undo *undoList) error {
	if r.shortcutRefused != nil {
		return nil
	}
	for _, h := range shortcutHooks {
		attached, err := r.shortcutProgram(h.attach)
		if err != nil {
			return err
		}
		change := linkMade
		if attached != 0 {
			same, err := sameProgram(attached, r.programs[h.name])
			if err != nil {
				return err
			} else if same {
				continue
			}
			change = linkReplaced
		}
		if err := undo.attach(r.maps[weftMapJoined], h.attach, attached, r.programs[h.name]); err != nil {
			return fmt.Errorf("attach %s to sockets that join: %w", h.name, err)
		}
		r.logChange(change, h.name)
	}
	return nil
}

// shortcutProgram is what runs on sockets that join now; 0 for nothing.
func (r *Redirect) shortcutProgram(attach ebpf.AttachType) (ebpf.ProgramID, error) {
	attached, err := link.QueryPrograms(link.QueryOptions{Target: r.maps[weftMapJoined].FD(), Attach: attach})
	if err != nil {
		return 0, fmt.Errorf("list programs of sockets that join: %w", err)
	}
	if len(attached.Programs) == 0 {
		return 0, nil
	}
	return attached.Programs[0].ID, nil
}

// driftOfShortcut looks at the programs that a pod with the short circuit needs.
func (r *Redirect) driftOfShortcut() (drift []string, err error) {
	for _, h := range shortcutHooks {
		if r.programs[h.name] == nil {
			return []string{"the short circuit is on, and this kernel cannot have it"}, nil
		}
		attached, err := r.shortcutProgram(h.attach)
		if err != nil {
			return nil, err
		}
		if attached == 0 {
			drift = append(drift, fmt.Sprintf("hook %s is not attached to sockets that join the short circuit", h.name))
			continue
		}
		if same, err := sameProgram(attached, r.programs[h.name]); err != nil {
			return nil, err
		} else if !same {
			drift = append(drift, fmt.Sprintf("hook %s of the short circuit is another program (%d)", h.name, attached))
		}
	}
	return drift, nil
}

func kernelRelease() string {
	var uts unix.Utsname
	if unix.Uname(&uts) != nil {
		return "of this node"
	}
	return unix.ByteSliceToString(uts.Release[:])
}

// checkRelease refuses kernels older than MinimumShortcutKernel.
func checkRelease(release string) error {
	have, want := version(release), version(MinimumShortcutKernel)
	if have[0] > want[0] || have[0] == want[0] && have[1] >= want[1] {
		return nil
	}
	return fmt.Errorf("kernel %s is too old for the short circuit, which needs Linux %s or later: %w", release, MinimumShortcutKernel, ErrUnsupported)
}

// version reads the first two numbers of a kernel's release; what is none is 0.
func version(release string) (v [2]int) {
	for i, s := range strings.SplitN(release, ".", 3) {
		if i == len(v) {
			break
		}
		end := strings.IndexFunc(s, func(c rune) bool { return c < '0' || c > '9' })
		if end >= 0 {
			s = s[:end]
		}
		v[i], _ = strconv.Atoi(s)
	}
	return v
}

// attach gives the map's sockets another program, and notes how to give them back the one before.
func (u *undoList) attach(to *ebpf.Map, attach ebpf.AttachType, before ebpf.ProgramID, program *ebpf.Program) error {
	var old *ebpf.Program
	if before != 0 {
		var err error
		if old, err = ebpf.NewProgramFromID(before); err != nil {
			return fmt.Errorf("open program %d: %w", before, err)
		}
		u.kept = append(u.kept, old)
	}
	if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: to.FD(), Program: program, Attach: attach}); err != nil {
		return err
	}
	u.steps = append(u.steps, func() error {
		var err error
		if old != nil {
			err = link.RawAttachProgram(link.RawAttachProgramOptions{Target: to.FD(), Program: old, Attach: attach})
		} else {
			err = link.RawDetachProgram(link.RawDetachProgramOptions{Target: to.FD(), Program: program, Attach: attach})
		}
		if err != nil {
			return errors.Join(errors.New("undo: give sockets that join their program back"), err)
		}
		return nil
	})
	return nil
}
