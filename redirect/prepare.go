package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
)

// prepare brings an admitted pod's netns to where Envoy can serve it. Every step may be repeated.
func (r *Redirect) prepare(ns *namespace) error {
	var record weftPodRecord
	if err := r.maps[weftMapRecords].Lookup(ns.cookie, &record); err != nil {
		return fmt.Errorf("read pod: %w", err)
	}
	sources := sourcesOf(record)
	var own []netip.Addr
	err := ns.run(func() (err error) {
		if own, err = localAddresses(); err != nil {
			return err
		}
		return saveSysctls(&record)
	})
	if err != nil {
		return err
	}
	if err := r.put(weftMapRecords, ns.cookie, record); err != nil {
		return fmt.Errorf("write pod: %w", err)
	}
	if err := r.setOwn(ns.cookie, append(own, sources...)); err != nil {
		return err
	}
	if err := ns.run(func() error { return prepareNetns(sources) }); err != nil {
		return err
	}
	return r.changePod(ns.cookie, func(p *weftPod) {
		p.Flags &^= weftPodFlagPOD_IPV4 | weftPodFlagPOD_IPV6
		for _, a := range sources {
			if a.Is4() {
				p.Flags |= weftPodFlagPOD_IPV4
			} else {
				p.Flags |= weftPodFlagPOD_IPV6
			}
		}
	})
}

// sourcesOf returns the addresses that captured connections come from.
func sourcesOf(record weftPodRecord) []netip.Addr {
	return slices.DeleteFunc([]netip.Addr{addrOf(record.Source4), addrOf(record.Source6)}, func(a netip.Addr) bool { return !a.IsValid() })
}

// saveSysctls notes once what prepareNetns changes, for restoreNetns. It runs in the pod's netns, as do both of them.
func saveSysctls(record *weftPodRecord) error {
	if record.Prepared != 0 {
		return nil
	}
	migrate, err := readSysctl(sysctlMigrateRequests)
	if err != nil {
		return err
	}
	record.MigrateRequests = flag(migrate == "1")
	reserved, err := reservedPorts()
	if err != nil {
		return err
	}
	record.ReservedPorts = maskOf(reserved)
	switch disabled, err := readSysctl(sysctlLoopbackIPv6); {
	case err == nil:
		record.LoopbackWithoutIpv6 = flag(disabled == "1")
	case !errors.Is(err, fs.ErrNotExist): // a kernel without IPv6
		return err
	}
	record.Prepared = 1
	return nil
}

func flag(set bool) uint8 {
	if set {
		return 1
	}
	return 0
}

func prepareNetns(sources []netip.Addr) error {
	if err := reservePorts(allProxyPorts); err != nil {
		return err
	}
	// Connections half open at a listener of Envoy that closes move to the next one of its group.
	if err := writeSysctl(sysctlMigrateRequests, "1"); err != nil {
		return err
	}
	for _, source := range sources {
		if source.Is6() {
			if disabled, err := readSysctl(sysctlLoopbackIPv6); err != nil {
				return err
			} else if disabled == "1" {
				if err := writeSysctl(sysctlLoopbackIPv6, "0"); err != nil {
					return err
				}
			}
		}
		if err := addSteeringRoute(source); err != nil {
			return err
		}
	}
	return nil
}

// restoreNetns undoes prepareNetns; steered connections, if any are to be spared, keep their routes and IPv6 on lo.
func restoreNetns(record weftPodRecord, spare bool) error {
	var errs []error
	for _, source := range sourcesOf(record) {
		if !spare {
			errs = append(errs, deleteSteeringRoute(source))
		}
	}
	if record.Prepared != 0 {
		errs = append(errs, reservePorts(record.ReservedPorts))
		if record.MigrateRequests == 0 {
			errs = append(errs, writeSysctl(sysctlMigrateRequests, "0"))
		}
		if record.LoopbackWithoutIpv6 != 0 && !spare {
			errs = append(errs, writeSysctl(sysctlLoopbackIPv6, "1"))
		}
	}
	return errors.Join(errs...)
}

// setOwn makes addresses the whole set of a pod's own ones.
func (r *Redirect) setOwn(cookie uint64, addresses []netip.Addr) error {
	wanted := map[weftPodAddress]bool{}
	for _, a := range addresses {
		key := weftPodAddress{Netns: cookie, Addr: words(a)}
		wanted[key] = true
		if err := r.put(weftMapOwn, key, uint32(1)); err != nil {
			return fmt.Errorf("add own address %s: %w", a, err)
		}
	}
	have, err := r.ownKeys(cookie)
	if err != nil {
		return err
	}
	for _, key := range have {
		if wanted[key] {
			continue
		}
		if err := ignoreMissing(r.maps[weftMapOwn].Delete(key)); err != nil {
			return fmt.Errorf("remove own address %s: %w", addrOf(key.Addr), err)
		}
	}
	return nil
}

func (r *Redirect) ownKeys(cookie uint64) ([]weftPodAddress, error) {
	var keys []weftPodAddress
	var key weftPodAddress
	var value uint32
	all := r.maps[weftMapOwn].Iterate()
	for all.Next(&key, &value) {
		if key.Netns == cookie {
			keys = append(keys, key)
		}
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("list own addresses: %w", err)
	}
	return keys, nil
}
