package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Gate closes a pod that is not enrolled yet: nothing is accepted, every connect(2) is refused (a datagram sent without
// one is not: no container runs behind a gate). Capture of both
// directions opens the gate, and so does Withdraw. A pod that is already gated or enrolled stays as it is.
func (r *Redirect) Gate(pod Pod) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	ns, err := openPod(pod)
	if err != nil {
		return fmt.Errorf("gate pod %s: %w", pod.UID, err)
	}
	defer ns.close()
	if err := r.admit(pod, ns, weftPodFlagPOD_GATED); err != nil {
		return fmt.Errorf("gate pod %s: %w", pod.UID, err)
	}
	return nil
}

// Enrol prepares a pod's netns: own addresses, routes, sysctls, the sk_lookup program. It captures nothing yet: a
// gated pod stays gated, any other goes on as before, but only Envoy may listen on the proxy ports from now on. New
// connections will go to the newest attached generation of Envoy. Enrol keeps what an enrolled pod has and adds what is
// missing: calling it again repairs what Verify calls drift, and takes in addresses that the pod gained.
// ErrPodsFull and ErrNetnsGone leave the pod untouched; so does any other failure of a first call.
func (r *Redirect) Enrol(pod Pod) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	ns, err := openPod(pod)
	if err != nil {
		return fmt.Errorf("enrol pod %s: %w", pod.UID, err)
	}
	defer ns.close()
	if err := r.keepHooks(); err != nil {
		return fmt.Errorf("enrol pod %s: %w", pod.UID, err)
	}
	_, known := r.pods[pod.UID]
	if err := r.admit(pod, ns, 0); err != nil {
		return fmt.Errorf("enrol pod %s: %w", pod.UID, err)
	}
	if err := r.prepare(ns); err != nil {
		err = fmt.Errorf("enrol pod %s: %w", pod.UID, err)
		if !known {
			err = errors.Join(err, r.remove(pod.UID, ns.cookie))
		}
		return err
	}
	return nil
}

func openPod(pod Pod) (*namespace, error) {
	if pod.UID == "" || len(pod.Addresses) == 0 {
		return nil, errors.New("a pod has a uid and at least one address")
	}
	ns, err := openNetns(pod.NetnsPath)
	if err != nil {
		return nil, err
	}
	if pod.Cookie != 0 && pod.Cookie != ns.cookie {
		ns.close()
		return nil, fmt.Errorf("network namespace %s has cookie %d, not %d: %w", pod.NetnsPath, ns.cookie, pod.Cookie, ErrNetnsGone)
	}
	return ns, nil
}

// admit enters a pod that is not known, with the flags given, and attaches its sk_lookup program.
func (r *Redirect) admit(pod Pod, ns *namespace, flags weftPodFlag) error {
	if ns.cookie == r.instance.NodeNetns {
		return errors.New("its network namespace is the node's own: hostNetwork pods are not enrolled")
	}
	if err := r.admitIdentity(pod, ns); err != nil {
		return err
	}
	record, err := newRecord(pod, ns)
	if err != nil {
		return err
	}
	if _, known := r.pods[pod.UID]; known {
		return r.readmit(record, ns)
	}
	envoys, err := listening(r.maps, ns.cookie)
	if err != nil {
		return err
	}
	if err := ns.run(func() error { return checkProxyPorts(envoys) }); err != nil {
		return err
	}
	// The record comes first: Release must find whatever a crash leaves behind.
	err = r.put(weftMapRecords, ns.cookie, record)
	if err == nil {
		err = r.enter(r.put, ns.cookie, flags)
	}
	if err == nil {
		r.pods[pod.UID] = ns.cookie
		err = r.attachLookup(ns)
	}
	if errors.Is(err, ErrFull) {
		err = fmt.Errorf("%d pods are enrolled: %w", r.maps[weftMapPods].MaxEntries(), ErrPodsFull)
	}
	if err != nil {
		return errors.Join(err, r.remove(pod.UID, ns.cookie))
	}
	return nil
}

// enter writes what the hooks know of a pod, by put or add.
func (r *Redirect) enter(write func(name string, key, value any) error, cookie uint64, flags weftPodFlag) error {
	generations, err := generations(r.maps[weftMapProxies])
	if err != nil {
		return err
	}
	entry := weftPod{Flags: flags, Limit: r.instance.Limit}
	if len(generations) > 0 {
		entry.Generation = generations[len(generations)-1]
	}
	if err := write(weftMapUsages, cookie, weftUsage{}); err != nil {
		return err
	}
	if err := write(weftMapLegs, cookie, uint64(0)); err != nil {
		return err
	}
	return write(weftMapPods, cookie, entry)
}

// readmit takes in what changed of a known pod, and takes a Withdraw back that has not ended.
func (r *Redirect) readmit(record weftPodRecord, ns *namespace) error {
	var before weftPodRecord
	if err := r.maps[weftMapRecords].Lookup(ns.cookie, &before); err != nil {
		return fmt.Errorf("read pod: %w", err)
	}
	record.Prepared, record.LoopbackWithoutIpv6 = before.Prepared, before.LoopbackWithoutIpv6
	record.MigrateRequests, record.ReservedPorts = before.MigrateRequests, before.ReservedPorts
	if record != before {
		if err := r.put(weftMapRecords, ns.cookie, record); err != nil {
			return fmt.Errorf("write pod: %w", err)
		}
	}
	if err := r.enter(r.add, ns.cookie, 0); err != nil { // somebody else may have deleted it
		return err
	}
	if err := r.changePod(ns.cookie, func(p *weftPod) { p.Flags &^= weftPodFlagPOD_LEAVING }); err != nil {
		return err
	}
	return r.attachLookup(ns)
}

// admitIdentity lets one uid have one netns and the reverse. The pod's earlier sandbox is another pod, and goes.
func (r *Redirect) admitIdentity(pod Pod, ns *namespace) error {
	for uid, cookie := range r.pods {
		if cookie == ns.cookie && uid != pod.UID {
			return fmt.Errorf("its network namespace belongs to pod %s", uid)
		}
	}
	if cookie, known := r.pods[pod.UID]; known && cookie != ns.cookie {
		return r.remove(pod.UID, cookie)
	}
	return nil
}

func newRecord(pod Pod, ns *namespace) (weftPodRecord, error) {
	record := weftPodRecord{NetnsInode: ns.inode}
	err := errors.Join(
		text(record.Uid[:], "uid", pod.UID),
		text(record.Sandbox[:], "sandbox id", pod.Sandbox),
		text(record.Netns[:], "network namespace", pod.NetnsPath))
	for _, addr := range pod.Addresses {
		switch addr = canonical(addr); {
		case !addr.IsGlobalUnicast():
			return record, fmt.Errorf("address %s is not one that other pods could call", addr)
		case addr.Is4() && record.Source4 == [4]uint32{}:
			record.Source4 = words(addr)
		case addr.Is6() && record.Source6 == [4]uint32{}:
			record.Source6 = words(addr)
		}
	}
	return record, err
}

func (r *Redirect) attachLookup(ns *namespace) error {
	spec := r.spec.Programs[weftProgLookup]
	program, err := r.program(weftProgLookup, ns.cookie)
	if err != nil {
		return err
	}
	defer program.Close()
	var undo undoList
	defer undo.drop()
	change, err := ensureLink(r.pins.pod(ns.cookie), target{file: ns.file, attach: spec.AttachType, id: ns.inode}, program, &undo)
	r.logChange(change, weftProgLookup)
	return err
}

// changePod replaces a pod's entry as a whole: the hooks see all of the change or nothing.
func (r *Redirect) changePod(cookie uint64, change func(*weftPod)) error {
	var entry weftPod
	if err := r.maps[weftMapPods].Lookup(cookie, &entry); err != nil {
		return fmt.Errorf("read pod's entry: %w", err)
	}
	before := entry
	change(&entry)
	if entry == before {
		return nil
	}
	if err := r.put(weftMapPods, cookie, entry); err != nil {
		return fmt.Errorf("write pod's entry: %w", err)
	}
	return nil
}

func (r *Redirect) cookieOf(uid string) (uint64, error) {
	cookie, known := r.pods[uid]
	if !known {
		return 0, fmt.Errorf("pod %s: %w", uid, ErrUnknownPod)
	}
	return cookie, nil
}

// Capture switches the capture of new connections; those that exist stay where they are. With both on a gated pod's
// gate opens. Inbound capture comes first and goes last, for an app's connection to a captured peer expects to be answered.
func (r *Redirect) Capture(uid string, inbound, outbound bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	cookie, err := r.cookieOf(uid)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	err = r.changePod(cookie, func(p *weftPod) {
		r.noteQuiet(cookie, p.Flags)
		p.Flags &^= weftPodFlagPOD_INBOUND | weftPodFlagPOD_OUTBOUND
		if inbound {
			p.Flags |= weftPodFlagPOD_INBOUND
		}
		if outbound {
			p.Flags |= weftPodFlagPOD_OUTBOUND
		}
		if inbound && outbound {
			p.Flags &^= weftPodFlagPOD_GATED
		}
	})
	if err != nil {
		return fmt.Errorf("capture pod %s: %w", uid, err)
	}
	return nil
}

// Flip moves new connections, in and out together, to the listeners of a generation of Envoy, by one map update. It
// refuses a generation that does not listen yet, for then everything would be dropped.
func (r *Redirect) Flip(uid string, generation uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	cookie, err := r.cookieOf(uid)
	if err != nil {
		return fmt.Errorf("flip: %w", err)
	}
	for _, role := range []Role{RoleOut, RoleIn} {
		if _, err := findListener(r.maps[weftMapListeners], cookie, generation, role); err != nil {
			return fmt.Errorf("flip pod %s to generation %d of Envoy, which does not listen there: %w", uid, generation, err)
		}
	}
	if err := r.changePod(cookie, func(p *weftPod) { p.Generation = generation }); err != nil {
		return fmt.Errorf("flip pod %s: %w", uid, err)
	}
	return nil
}

// SetMode sets how inbound connections are judged. Probe ports must not belong to another pod of the same address.
func (r *Redirect) SetMode(uid string, mode Mode) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	cookie, err := r.cookieOf(uid)
	if err != nil {
		return fmt.Errorf("set mode: %w", err)
	}
	err = r.setProbes(cookie, mode.Probes)
	if err == nil {
		err = r.setServerFirst(cookie, mode.ServerFirst)
	}
	if err == nil {
		err = r.changePod(cookie, func(p *weftPod) {
			p.Flags &^= weftPodFlagPOD_STRICT
			if mode.Strict {
				p.Flags |= weftPodFlagPOD_STRICT
			}
		})
	}
	if err != nil {
		return fmt.Errorf("set mode of pod %s: %w", uid, err)
	}
	return nil
}

func (r *Redirect) setProbes(cookie uint64, ports []uint16) error {
	wanted := map[weftEndpoint]bool{}
	if len(ports) > 0 {
		var record weftPodRecord
		if err := r.maps[weftMapRecords].Lookup(cookie, &record); err != nil {
			return fmt.Errorf("read pod: %w", err)
		}
		for _, addr := range sourcesOf(record) {
			for _, port := range ports {
				wanted[endpointOf(netip.AddrPortFrom(addr, port))] = true
			}
		}
	}
	var old []weftEndpoint
	var key weftEndpoint
	var netns uint64
	all := r.maps[weftMapProbes].Iterate()
	for all.Next(&key, &netns) {
		if netns == cookie && !wanted[key] {
			old = append(old, key)
		}
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("list probe ports: %w", err)
	}
	for _, key := range old {
		if err := ignoreMissing(r.maps[weftMapProbes].Delete(key)); err != nil {
			return fmt.Errorf("remove probe port %s: %w", addrPortOf(key), err)
		}
	}
	for key := range wanted {
		if err := r.put(weftMapProbes, key, cookie); err != nil {
			return fmt.Errorf("add probe port %s: %w", addrPortOf(key), err)
		}
	}
	return nil
}

func (r *Redirect) setServerFirst(cookie uint64, ports []uint16) error {
	var old []weftPodPort
	var key weftPodPort
	var value uint32
	all := r.maps[weftMapServerFirst].Iterate()
	for all.Next(&key, &value) {
		if key.Netns == cookie && !slices.Contains(ports, key.Port) {
			old = append(old, key)
		}
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("list server-first ports: %w", err)
	}
	for _, key := range old {
		if err := ignoreMissing(r.maps[weftMapServerFirst].Delete(key)); err != nil {
			return fmt.Errorf("remove server-first port %d: %w", key.Port, err)
		}
	}
	for _, port := range ports {
		if err := r.put(weftMapServerFirst, weftPodPort{Netns: cookie, Port: port}, uint32(1)); err != nil {
			return fmt.Errorf("add server-first port %d: %w", port, err)
		}
	}
	return nil
}
