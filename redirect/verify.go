package redirect

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/weftmesh/weft/api/names"
)

// Pods lists the pods that the kernel holds, gated ones included, by uid; not those withdrawn. After a restart the
// agent begins with it.
func (r *Redirect) Pods() ([]Pod, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var pods []Pod
	for uid, cookie := range r.pods {
		leaving, err := r.leaving(cookie)
		if err != nil {
			return nil, fmt.Errorf("list pods: %w", err)
		}
		if leaving {
			continue
		}
		var record weftPodRecord
		if err := r.maps[weftMapRecords].Lookup(cookie, &record); err != nil {
			return nil, fmt.Errorf("list pods: read pod %s: %w", uid, err)
		}
		pods = append(pods, podOf(cookie, record))
	}
	slices.SortFunc(pods, func(a, b Pod) int { return cmp.Compare(a.UID, b.UID) })
	return pods, nil
}

// Leaving counts the pods that are withdrawn and still have captured connections.
func (r *Redirect) Leaving() (n int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, cookie := range r.pods {
		leaving, err := r.leaving(cookie)
		if err != nil {
			return 0, fmt.Errorf("count pods that leave: %w", err)
		}
		if leaving {
			n++
		}
	}
	return n, nil
}

func podOf(cookie uint64, record weftPodRecord) Pod {
	return Pod{
		UID:       textOf(record.Uid[:]),
		Sandbox:   textOf(record.Sandbox[:]),
		NetnsPath: textOf(record.Netns[:]),
		Addresses: sourcesOf(record),
		Cookie:    cookie,
	}
}

// Listening names Envoy's listeners in the pod, of all attached generations, by generation and role.
func (r *Redirect) Listening(uid string) ([]Listener, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	cookie, err := r.cookieOf(uid)
	if err != nil {
		return nil, fmt.Errorf("list listeners: %w", err)
	}
	return listening(r.maps, cookie)
}

// listening reads the maps of listeners and of Envoys, the instance's own or its pins.
func listening(maps map[string]*ebpf.Map, cookie uint64) ([]Listener, error) {
	generations, err := generations(maps[weftMapProxies])
	if err != nil {
		return nil, err
	}
	var found []Listener
	for _, generation := range generations {
		for _, role := range []Role{RoleOut, RoleIn, RoleInFirst} {
			l, err := findListener(maps[weftMapListeners], cookie, generation, role)
			if errors.Is(err, ebpf.ErrKeyNotExist) {
				continue
			} else if err != nil {
				return nil, err
			}
			found = append(found, l)
		}
	}
	return found, nil
}

func findListener(listeners *ebpf.Map, cookie uint64, generation uint32, role Role) (Listener, error) {
	l := Listener{Role: role, Generation: generation, Port: names.ListenPort(names.PortFirst+uint16(role), generation)}
	key := weftListener{Netns: cookie, Generation: generation, Role: weftRole(role)}
	if err := listeners.Lookup(key, &l.Socket); err != nil {
		return l, fmt.Errorf("find listener on port %d: %w", l.Port, err)
	}
	return l, nil
}

// Verify reads a pod's state back from the kernel, through the pins and the pod's netns, not from what this process
// did. ErrUnknownPod: nothing is captured there.
func (r *Redirect) Verify(uid string) (State, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	cookie, err := r.cookieOf(uid)
	if err != nil {
		return State{}, fmt.Errorf("verify: %w", err)
	}
	state, err := r.verify(cookie)
	if err != nil {
		return state, fmt.Errorf("verify pod %s: %w", uid, err)
	}
	return state, nil
}

func (r *Redirect) verify(cookie uint64) (State, error) {
	maps, err := r.openPinned(weftMapPods, weftMapRecords, weftMapUsages, weftMapOwn, weftMapListeners, weftMapProxies)
	defer func() {
		for _, m := range maps {
			m.Close()
		}
	}()
	if err != nil {
		return State{}, err
	}
	var entry weftPod
	var record weftPodRecord
	var usage weftUsage
	err = errors.Join(maps[weftMapPods].Lookup(cookie, &entry), maps[weftMapRecords].Lookup(cookie, &record), maps[weftMapUsages].Lookup(cookie, &usage))
	if errors.Is(err, ebpf.ErrKeyNotExist) || entry.Flags&weftPodFlagPOD_LEAVING != 0 {
		return State{}, ErrUnknownPod
	} else if err != nil {
		return State{}, fmt.Errorf("read pod: %w", err)
	}
	state := State{
		Pod:             podOf(cookie, record),
		Gated:           entry.Flags&weftPodFlagPOD_GATED != 0,
		Inbound:         entry.Flags&weftPodFlagPOD_INBOUND != 0,
		Outbound:        entry.Flags&weftPodFlagPOD_OUTBOUND != 0,
		Strict:          entry.Flags&weftPodFlagPOD_STRICT != 0,
		Shortcut:        entry.Flags&weftPodFlagPOD_SHORTCUT != 0,
		Generation:      entry.Generation,
		Outgoing:        usage.Outgoing,
		Incoming:        usage.Incoming,
		RefusedOutgoing: usage.RefusedOutgoing,
		RefusedIncoming: usage.RefusedIncoming,
	}
	if state.Listeners, err = listening(maps, cookie); err != nil {
		return state, err
	}
	if state.Drift, err = r.drift(cookie, record, maps[weftMapOwn]); err != nil {
		return state, err
	}
	proxy, err := r.driftOfProxy(maps[weftMapProxies], entry.Generation)
	state.Drift = append(state.Drift, proxy...)
	if err == nil && state.Shortcut {
		var shortcut []string
		shortcut, err = r.driftOfShortcut()
		state.Drift = append(state.Drift, shortcut...)
	}
	return state, err
}

// driftOfProxy looks at the hooks of a generation of Envoy. One that is not attached has none: its listeners are missing
// from the state, which says enough.
func (r *Redirect) driftOfProxy(proxies *ebpf.Map, generation uint32) (drift []string, err error) {
	var cgroup uint64
	var value uint32
	all := proxies.Iterate()
	for all.Next(&cgroup, &value) {
		if value != generation {
			continue
		}
		for _, name := range proxyHooks {
			path := filepath.Join(r.pins.proxy(generation), name)
			fault, err := r.hookFault(path, cgroup, hookCopy{name, uint64(generation)}, fmt.Sprintf("the cgroup of Envoy's generation %d", generation))
			if err != nil {
				return nil, err
			}
			drift = append(drift, fault...)
		}
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("list generations of Envoy: %w", err)
	}
	return drift, nil
}

func (r *Redirect) openPinned(wanted ...string) (map[string]*ebpf.Map, error) {
	maps := map[string]*ebpf.Map{}
	for _, name := range wanted {
		m, err := ebpf.LoadPinnedMap(r.pins.mapFile(name), nil)
		if err != nil {
			return maps, fmt.Errorf("open map: %w", err)
		}
		maps[name] = m
	}
	return maps, nil
}

// drift lists what differs from what Enrol left.
func (r *Redirect) drift(cookie uint64, record weftPodRecord, own *ebpf.Map) ([]string, error) {
	var drift []string
	root, err := cgroupID(r.cgroupRoot)
	if err != nil {
		return nil, err
	}
	for _, name := range rootHooks {
		fault, err := r.hookFault(r.pins.hook(name), root, hookCopy{name: name}, "the cgroup root")
		if err != nil {
			return nil, err
		}
		drift = append(drift, fault...)
	}
	fault, err := r.hookFault(r.pins.pod(cookie), record.NetnsInode, hookCopy{weftProgLookup, cookie}, "the network namespace")
	if err != nil {
		return nil, err
	}
	drift = append(drift, fault...)
	ns, err := openNetns(textOf(record.Netns[:]))
	if errors.Is(err, ErrNetnsGone) {
		return append(drift, "the network namespace is gone"), nil
	} else if err != nil {
		return nil, err
	}
	defer ns.close()
	if ns.cookie != cookie {
		return append(drift, "another network namespace has taken the path"), nil
	}
	if record.Prepared == 0 {
		return drift, nil // gated only
	}
	inside, err := driftInside(ns, record, own)
	return append(drift, inside...), err
}

// hookFault tells, in a phrase or none, what is wrong with the link pinned at path: it should run the hook's program of
// this version at the place that the kernel calls id.
func (r *Redirect) hookFault(path string, id uint64, hook hookCopy, place string) ([]string, error) {
	a, err := openAttachment(path)
	if errors.Is(err, fs.ErrNotExist) {
		a = nil
	} else if err != nil {
		return nil, err
	} else {
		defer a.link.Close()
	}
	if a == nil || a.id != id {
		return []string{fmt.Sprintf("hook %s is not attached to %s", hook.name, place)}, nil
	}
	theirs, err := tagOfID(a.program)
	if err != nil {
		return nil, err
	}
	if ours, err := r.tagOf(hook.name, hook.number); err != nil {
		return nil, err
	} else if theirs != ours {
		return []string{fmt.Sprintf("hook %s at %s runs another program (%d)", hook.name, place, a.program)}, nil
	}
	return nil, nil
}

// driftInside looks at what can change within the pod's netns.
func driftInside(ns *namespace, record weftPodRecord, own *ebpf.Map) (drift []string, err error) {
	err = ns.run(func() error {
		for _, source := range sourcesOf(record) {
			present, err := hasSteeringRoute(source)
			if err != nil {
				return err
			}
			if !present {
				drift = append(drift, fmt.Sprintf("the steering route from %s is missing", source))
			}
		}
		addresses, err := localAddresses()
		if err != nil {
			return err
		}
		for _, a := range addresses {
			var value uint32
			if err := own.Lookup(weftPodAddress{Netns: ns.cookie, Addr: words(a)}, &value); errors.Is(err, ebpf.ErrKeyNotExist) {
				drift = append(drift, fmt.Sprintf("the address %s is new", a))
			} else if err != nil {
				return fmt.Errorf("look up own address %s: %w", a, err)
			}
		}
		settings, err := driftOfSysctls()
		drift = append(drift, settings...)
		return err
	})
	return drift, err
}

func driftOfSysctls() (drift []string, err error) {
	reserved, err := reservedPorts()
	if err != nil {
		return nil, err
	}
	if maskOf(reserved) != allProxyPorts {
		drift = append(drift, fmt.Sprintf("sysctl net/%s leaves proxy ports to listen without bind", sysctlReservedPorts))
	}
	migrate, err := readSysctl(sysctlMigrateRequests)
	if err == nil && migrate != "1" {
		drift = append(drift, fmt.Sprintf("sysctl net/%s is %s, not 1", sysctlMigrateRequests, migrate))
	}
	return drift, err
}
