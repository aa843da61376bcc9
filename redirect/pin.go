package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// pins names the files of one instance on the bpffs:
//
//	maps/<map>                 every map of the object; on joined hang the programs of the short circuit
//	hooks/<program>            links at the cgroup root
//	proxies/<generation>/<program>  links at an Envoy's cgroup
//	pods/<netns cookie>        the sk_lookup link of a pod
type pins string

func (p pins) mapFile(name string) string { return filepath.Join(string(p), "maps", name) }
func (p pins) hook(name string) string    { return filepath.Join(string(p), "hooks", name) }
func (p pins) pod(cookie uint64) string {
	return filepath.Join(string(p), "pods", strconv.FormatUint(cookie, 10))
}
func (p pins) proxies() string { return filepath.Join(string(p), "proxies") }
func (p pins) proxy(generation uint32) string {
	return filepath.Join(p.proxies(), strconv.FormatUint(uint64(generation), 10))
}

func (p pins) makeDirectories() error {
	for _, dir := range []string{"maps", "hooks", "proxies", "pods"} {
		if err := os.MkdirAll(filepath.Join(string(p), dir), 0o700); err != nil {
			return fmt.Errorf("make pin directory: %w", err)
		}
	}
	return nil
}

// target is what a link hangs on, with the number by which the kernel names it: a cgroup id or a netns inode.
type target struct {
	file   *os.File
	attach ebpf.AttachType
	id     uint64
}

// attachment is a pinned link as the kernel shows it. id is 0 once it was detached.
type attachment struct {
	link    link.Link
	program ebpf.ProgramID
	id      uint64
}

// openAttachment reads the link pinned at path; the error is fs.ErrNotExist if there is none. The caller closes the link.
func openAttachment(path string) (*attachment, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return nil, fmt.Errorf("open link %s: %w", path, err)
	}
	info, err := l.Info()
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("read link %s: %w", path, err)
	}
	a := &attachment{link: l, program: info.Program}
	if c := info.Cgroup(); c != nil {
		a.id = c.CgroupId
	} else if n := info.NetNs(); n != nil {
		a.id = uint64(n.NetnsInode)
	}
	return a, nil
}

// ensureLink makes the link pinned at path run program at the target: an existing one gets the program in place if it
// has another, a detached or missing one is made anew. It reports what it did, and undo takes it back. The link's file
// descriptor is closed: the pin alone keeps it, so that no finalizer ever detaches it.
func ensureLink(path string, to target, program *ebpf.Program, undo *undoList) (linkChange, error) {
	existing, err := openAttachment(path)
	if err == nil {
		defer existing.link.Close()
		if existing.id == to.id {
			same, err := sameProgram(existing.program, program)
			if err != nil || same {
				return linkKept, err
			}
			if err := undo.replace(path, existing, program); err != nil {
				return linkKept, err
			}
			return linkReplaced, nil
		}
		if err := os.Remove(path); err != nil {
			return linkKept, fmt.Errorf("remove stale pin: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return linkKept, err
	}
	if err := awaitDetached(to, program); err != nil {
		return linkKept, fmt.Errorf("attach %s: %w", filepath.Base(path), err)
	}
	made, err := link.AttachRawLink(link.RawLinkOptions{Target: int(to.file.Fd()), Program: program, Attach: to.attach})
	if err != nil {
		return linkKept, explainAttach(filepath.Base(path), to, err)
	}
	defer made.Close()
	if err := made.Pin(path); err != nil {
		return linkKept, fmt.Errorf("pin link: %w", err)
	}
	undo.removeFile(path)
	return linkMade, nil
}

// explainAttach tells what to change where the kernel refuses a link.
func explainAttach(hook string, to target, cause error) error {
	remedy := ""
	switch lacking := lackingRights(); {
	case len(lacking) > 0:
		remedy = fmt.Sprintf(": the agent lacks %s; grant them in its security context", strings.Join(lacking, ", "))
	case errors.Is(cause, unix.EPERM):
		remedy = ": another program has this hook there or above for itself; find it with `bpftool cgroup tree`, and detach it or attach it with `multi`"
	case errors.Is(cause, unix.E2BIG):
		remedy = ": 64 programs have this hook already, which is all that the kernel takes; find them with `bpftool cgroup tree` or `bpftool net`"
	}
	return fmt.Errorf("attach hook %s to %s%s: %w", hook, to.file.Name(), remedy, cause)
}

// awaitDetached waits for the end of a link of the same program whose pin was just removed, which the kernel frees
// later: the hook would otherwise run twice, and see its own steering address as a dial of a proxy port.
func awaitDetached(to target, program *ebpf.Program) error {
	info, err := program.Info()
	if err != nil {
		return fmt.Errorf("read program: %w", err)
	}
	id, _ := info.ID()
	const limit = 3 * time.Second
	for deadline := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		attached, err := link.QueryPrograms(link.QueryOptions{Target: int(to.file.Fd()), Attach: to.attach})
		if errors.Is(err, unix.ENOSPC) && time.Now().Before(deadline) {
			continue // another program was attached between the count and the list
		}
		if err != nil {
			return fmt.Errorf("list programs: %w", err)
		}
		if !slices.ContainsFunc(attached.Programs, func(p link.AttachedProgram) bool { return p.ID == id }) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("program %d is still attached after %v by a link that is not pinned: end the process that holds it", id, limit)
		}
	}
}

type linkChange int

const (
	linkKept linkChange = iota
	linkMade
	linkReplaced
)

// put writes one entry. ErrFull if there is no room.
func (r *Redirect) put(name string, key, value any) error {
	return r.update(name, key, value, ebpf.UpdateAny)
}

// add is put of an entry that stays as it is if it exists.
func (r *Redirect) add(name string, key, value any) error {
	if err := r.update(name, key, value, ebpf.UpdateNoExist); !errors.Is(err, ebpf.ErrKeyExist) {
		return err
	}
	return nil
}

func (r *Redirect) update(name string, key, value any, flags ebpf.MapUpdateFlags) error {
	err := r.maps[name].Update(key, value, flags)
	if errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("%s holds %d entries: %w", name, r.maps[name].MaxEntries(), ErrFull)
	}
	return err
}

// removePin unpins one link or map, which ends it unless somebody holds it open. A missing one is no error.
func removePin(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin: %w", err)
	}
	return nil
}
