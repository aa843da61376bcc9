package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Withdraw takes a pod out: at once no new connection is captured, and the pod is forgotten. Captured connections that
// are still open, and live in Envoy, keep what they need (the steering routes, their count) until Sweep finds the last
// one closed; so does, for a second, a pod whose outbound capture was on until now.
// An unknown pod or a netns that is gone is no error.
func (r *Redirect) Withdraw(uid string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	cookie, known := r.pods[uid]
	if !known {
		return nil
	}
	err := r.changePod(cookie, func(p *weftPod) {
		r.noteQuiet(cookie, p.Flags)
		p.Flags &= weftPodFlagPOD_IPV4 | weftPodFlagPOD_IPV6
		p.Flags |= weftPodFlagPOD_LEAVING
	})
	if err := ignoreMissing(err); err != nil {
		return fmt.Errorf("withdraw pod %s: %w", uid, err)
	}
	if used, err := r.inUse(cookie); err != nil {
		return fmt.Errorf("withdraw pod %s: %w", uid, err)
	} else if used {
		return nil
	}
	if err := r.remove(uid, cookie); err != nil {
		return fmt.Errorf("withdraw pod %s: %w", uid, err)
	}
	return nil
}

// quietTime is how long after the end of outbound capture a connect may still be between the connect hook, which has
// steered it, and sockops, which counts it.
const quietTime = time.Second

// noteQuiet remembers that a pod with these flags was captured outbound until now.
func (r *Redirect) noteQuiet(cookie uint64, flags weftPodFlag) {
	if flags&weftPodFlagPOD_OUTBOUND != 0 {
		r.capturedUntil[cookie] = time.Now()
	}
}

func (r *Redirect) leaving(cookie uint64) (bool, error) {
	var entry weftPod
	if err := r.maps[weftMapPods].Lookup(cookie, &entry); errors.Is(err, ebpf.ErrKeyNotExist) {
		return true, nil // a crash of Withdraw, or of Enrol, left the record alone
	} else if err != nil {
		return false, fmt.Errorf("read pod's entry: %w", err)
	}
	return entry.Flags&weftPodFlagPOD_LEAVING != 0, nil
}

// inUse reports whether a captured connection of the pod is open. In a netns that is gone none is, whatever was counted.
func (r *Redirect) inUse(cookie uint64) (bool, error) {
	var usage weftUsage
	if err := ignoreMissing(r.maps[weftMapUsages].Lookup(cookie, &usage)); err != nil {
		return false, fmt.Errorf("read connections: %w", err)
	}
	var legs uint64
	if err := ignoreMissing(r.maps[weftMapLegs].Lookup(cookie, &legs)); err != nil {
		return false, fmt.Errorf("read local legs: %w", err)
	}
	if usage.Outgoing+usage.Incoming+legs == 0 && time.Since(r.capturedUntil[cookie]) > quietTime {
		return false, nil
	}
	var record weftPodRecord
	if err := ignoreMissing(r.maps[weftMapRecords].Lookup(cookie, &record)); err != nil {
		return false, fmt.Errorf("read pod: %w", err)
	}
	ns, err := openNetns(textOf(record.Netns[:]))
	if errors.Is(err, ErrNetnsGone) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	defer ns.close()
	return ns.cookie == cookie, nil
}

// remove takes a pod's traces out of its netns and the kernel. The record goes last, so that a failure can be repeated.
func (r *Redirect) remove(uid string, cookie uint64) error {
	if err := takeOut(r.maps, r.pins, cookie, false); err != nil {
		return err
	}
	delete(r.pods, uid)
	delete(r.capturedUntil, cookie)
	delete(r.tags, hookCopy{weftProgLookup, cookie})
	return nil
}

// later are maps by netns cookie that the pins of an earlier version may not have.
var later = []string{weftMapLostLegs, weftMapLegs}

// takeOut leaves connections in use, if told so, what they need inside the pod.
func takeOut(maps map[string]*ebpf.Map, pins pins, cookie uint64, spare bool) error {
	var record weftPodRecord
	var usage weftUsage
	switch err := maps[weftMapRecords].Lookup(cookie, &record); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("read pod: %w", err)
	}
	if err := ignoreMissing(maps[weftMapUsages].Lookup(cookie, &usage)); err != nil {
		return fmt.Errorf("read connections: %w", err)
	}
	spare = spare && usage.Outgoing+usage.Incoming > 0
	errs := []error{
		ignoreMissing(maps[weftMapPods].Delete(cookie)), // from here on every hook passes
		removePin(pins.pod(cookie)),
		deleteWhere(maps[weftMapOwn], func(k weftPodAddress, _ uint32) bool { return k.Netns == cookie }),
		deleteWhere(maps[weftMapProbes], func(_ weftEndpoint, netns uint64) bool { return netns == cookie }),
		deleteWhere(maps[weftMapServerFirst], func(k weftPodPort, _ uint32) bool { return k.Netns == cookie }),
		deleteWhere(maps[weftMapHandovers], func(k weftTuple, _ weftHandover) bool { return k.Netns == cookie }),
		ignoreMissing(maps[weftMapUsages].Delete(cookie)),
	}
	for _, name := range later {
		if m := maps[name]; m != nil {
			errs = append(errs, ignoreMissing(m.Delete(cookie)))
		}
	}
	ns, err := openNetns(textOf(record.Netns[:]))
	switch {
	case err == nil && ns.cookie == cookie:
		errs = append(errs, ns.run(func() error { return restoreNetns(record, spare) }))
	case err != nil && !errors.Is(err, ErrNetnsGone):
		errs = append(errs, err)
	}
	if err == nil {
		ns.close()
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return ignoreMissing(maps[weftMapRecords].Delete(cookie))
}

// deleteWhere deletes the entries that match. Collecting first keeps the iteration whole.
func deleteWhere[K comparable, V any](m *ebpf.Map, match func(K, V) bool) error {
	var key K
	var value V
	var found []K
	all := m.Iterate()
	for all.Next(&key, &value) {
		if match(key, value) {
			found = append(found, key)
		}
	}
	errs := []error{all.Err()}
	for _, key := range found {
		errs = append(errs, ignoreMissing(m.Delete(key)))
	}
	return errors.Join(errs...)
}

// Sweep does what only time brings; call it every few seconds. It forgets hand-overs older than age, whose end the
// kernel did not show us, and returns how many (age must exceed the time in which a connect gives up, about 130 s);
// it takes out withdrawn pods whose last connection closed; it looks at kubelet's cgroup again, which has another number
// after kubelet was restarted; it attaches hooks that are missing at the cgroup root, and puts services and addresses back
// that somebody else took out of the kernel.
func (r *Redirect) Sweep(age time.Duration) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0, fmt.Errorf("sweep: read clock: %w", err)
	}
	forgotten := 0
	errs := []error{deleteWhere(r.maps[weftMapHandovers], func(_ weftTuple, h weftHandover) bool {
		old := h.Time != 0 && time.Duration(now.Nano()-int64(h.Time)) > age
		if old {
			forgotten++
		}
		return old
	})}
	for uid, cookie := range r.pods {
		leaving, err := r.leaving(cookie)
		if err == nil && leaving {
			var used bool
			if used, err = r.inUse(cookie); err == nil && !used {
				err = r.remove(uid, cookie)
			}
		}
		errs = append(errs, err)
	}
	r.lookAtKubelet()
	errs = append(errs, r.writeInstance(), r.keepHooks(), r.keepServices())
	if err := errors.Join(errs...); err != nil {
		return forgotten, fmt.Errorf("sweep: %w", err)
	}
	return forgotten, nil
}

// Release removes the instance from the kernel and its traces from the pods' netns: every pod is then outside the mesh,
// at once. Captured connections that are open go on in Envoy, if one runs, until one end closes them; a pod that made one
// keeps its steering routes then, without which IPv6 packets for Envoy would leave by the pod's interface. It closes the
// instance as well.
func (r *Redirect) Release(envoyRuns bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(Release(string(r.pins), envoyRuns), r.close())
}

// Release does the same as the method from the pins alone, for a node whose agent is gone. A missing directory is no
// error, and what fails half-way can be repeated.
func Release(pinDir string, envoyRuns bool) error {
	p := pins(pinDir)
	if _, err := os.Stat(pinDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var errs []error
	// What captures new connections goes first: connect4 and connect6 are the last of rootHooks.
	for i := len(rootHooks) - 1; i >= 0; i-- {
		errs = append(errs, removePin(p.hook(rootHooks[i])))
	}
	errs = append(errs, releasePods(p, envoyRuns))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("release: %w", err)
	}
	if err := os.RemoveAll(pinDir); err != nil {
		return fmt.Errorf("release: remove pins: %w", err)
	}
	return nil
}

func releasePods(p pins, envoyRuns bool) error {
	maps := map[string]*ebpf.Map{}
	defer func() {
		for _, m := range maps {
			m.Close()
		}
	}()
	for _, name := range append([]string{weftMapRecords, weftMapPods, weftMapOwn, weftMapProbes, weftMapServerFirst, weftMapHandovers, weftMapUsages}, later...) {
		m, err := ebpf.LoadPinnedMap(p.mapFile(name), nil)
		if errors.Is(err, fs.ErrNotExist) && slices.Contains(later, name) {
			continue
		} else if errors.Is(err, fs.ErrNotExist) {
			return nil // Load did not get far enough to admit a pod
		} else if err != nil {
			return fmt.Errorf("open map: %w", err)
		}
		maps[name] = m
	}
	var cookies []uint64
	var cookie uint64
	var record weftPodRecord
	all := maps[weftMapRecords].Iterate()
	for all.Next(&cookie, &record) {
		cookies = append(cookies, cookie)
	}
	errs := []error{all.Err()}
	for _, cookie := range cookies {
		errs = append(errs, takeOut(maps, p, cookie, envoyRuns))
	}
	return errors.Join(errs...)
}

// ofOtherBoot reports whether the pins were made under another boot id: their pods are gone with it.
func ofOtherBoot(cfg Config) (bool, error) {
	m, err := ebpf.LoadPinnedMap(pins(cfg.PinDir).mapFile(weftMapConfig), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("load hooks: open configuration: %w", err)
	}
	defer m.Close()
	var instance weftInstance
	if err := m.Lookup(uint32(0), &instance); err != nil {
		return false, fmt.Errorf("load hooks: read configuration: %w", err)
	}
	before := textOf(instance.BootId[:])
	return cfg.BootID != "" && before != "" && before != cfg.BootID, nil
}
