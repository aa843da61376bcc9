package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
)

// AttachProxy makes the processes of a cgroup one generation of Envoy: its sockets are exempt from capture, its
// listeners in enrolled pods are recorded, its SO_ORIGINAL_DST and tag options are answered, and it may connect only
// inside enrolled pods. The cgroup lies below CgroupRoot and holds Envoy and its broker and nothing else. Call it again after the directory
// was remade: the kernel then knows it by another number.
func (r *Redirect) AttachProxy(generation uint32, cgroupPath string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !strings.HasPrefix(filepath.Clean(cgroupPath), r.cgroupRoot+"/") {
		return fmt.Errorf("attach Envoy's hooks: cgroup %s does not lie below %s, whose hooks its sockets need too", cgroupPath, r.cgroupRoot)
	}
	cgroup, err := openCgroup(cgroupPath, 0)
	if err != nil {
		return fmt.Errorf("attach Envoy's hooks: %w", err)
	}
	defer cgroup.file.Close()
	if err := os.MkdirAll(r.pins.proxy(generation), 0o700); err != nil {
		return fmt.Errorf("attach Envoy's hooks: make pin directory: %w", err)
	}
	// What serves already stays, whatever fails now: the error is ErrStillAttached then.
	var of uint32
	served := r.maps[weftMapProxies].Lookup(cgroup.id, &of) == nil && of == generation
	fail := func(err error) error {
		err = fmt.Errorf("attach Envoy's hooks: %w", err)
		if served {
			return errors.Join(err, ErrStillAttached)
		}
		return errors.Join(err, r.detachProxy(generation))
	}
	for _, name := range proxyHooks {
		if err := r.attachProxyHook(name, generation, cgroup); err != nil {
			return fail(err)
		}
	}
	// The exemption comes last: without the hooks it would be one nobody can see through.
	if err := r.exempt(generation, cgroup.id); err != nil {
		return fail(err)
	}
	return nil
}

func (r *Redirect) attachProxyHook(name string, generation uint32, cgroup target) error {
	program, err := r.program(name, uint64(generation))
	if err != nil {
		return err
	}
	defer program.Close()
	cgroup.attach = r.spec.Programs[name].AttachType
	path := filepath.Join(r.pins.proxy(generation), name)
	if err := keepBefore(path, cgroup.id); err != nil {
		return err
	}
	var undo undoList
	defer undo.drop()
	change, err := ensureLink(path, cgroup, program, &undo)
	r.logChange(change, name)
	return err
}

// before is what the pin of a generation's last link is called, at the cgroup that its Envoy had in a container that has ended.
// What waits at that Envoy's sockets for the next one has that cgroup's hooks: without them the next one would not learn where
// it was meant for.
func before(path string) string { return path + "-before" }

// keepBefore keeps the link pinned at path when it is of another cgroup.
func keepBefore(path string, cgroup uint64) error {
	last, err := openAttachment(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer last.link.Close()
	if last.id == cgroup || last.id == 0 {
		return nil
	}
	if err := os.Rename(path, before(path)); err != nil {
		return fmt.Errorf("keep the hooks of Envoy's last container: %w", err)
	}
	return nil
}

// DetachProxy takes AttachProxy back. A generation that is not attached is no error.
func (r *Redirect) DetachProxy(generation uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.detachProxy(generation)
}

func (r *Redirect) detachProxy(generation uint32) error {
	errs := []error{r.exempt(generation, 0)}
	for _, name := range proxyHooks {
		path := filepath.Join(r.pins.proxy(generation), name)
		errs = append(errs, removePin(path), removePin(before(path)))
	}
	errs = append(errs, removePin(r.pins.proxy(generation)))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detach generation %d of Envoy: %w", generation, err)
	}
	return nil
}

// exempt makes cgroup the only one of a generation; 0 leaves none.
func (r *Redirect) exempt(generation uint32, cgroup uint64) error {
	if cgroup != 0 {
		if err := r.put(weftMapProxies, cgroup, generation); err != nil {
			return fmt.Errorf("exempt cgroup: %w", err)
		}
	}
	var old []uint64
	var id uint64
	var value uint32
	all := r.maps[weftMapProxies].Iterate()
	for all.Next(&id, &value) {
		if value == generation && id != cgroup {
			old = append(old, id)
		}
	}
	errs := []error{all.Err()}
	for _, id := range old {
		errs = append(errs, ignoreMissing(r.maps[weftMapProxies].Delete(id)))
	}
	return errors.Join(errs...)
}

// generations lists the attached generations of Envoy, oldest first.
func generations(proxies *ebpf.Map) ([]uint32, error) {
	var found []uint32
	var id uint64
	var generation uint32
	all := proxies.Iterate()
	for all.Next(&id, &generation) {
		found = append(found, generation)
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("list generations of Envoy: %w", err)
	}
	slices.Sort(found)
	return slices.Compact(found), nil
}
