package redirect

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"

	"github.com/cilium/ebpf"
)

// keepServices reads the maps of services and addresses back and makes good what somebody else changed in them.
func (r *Redirect) keepServices() error {
	services, servicesErr := keep(r.maps[weftMapServices], len(r.services), func(at weftEndpoint) (weftService, bool) {
		s, known := r.services[addrPortOf(at)]
		return s, known
	}, func(yield func(weftEndpoint, weftService) bool) {
		for at, s := range r.services {
			if !yield(endpointOf(at), s) {
				return
			}
		}
	})
	addresses, addressesErr := keep(r.maps[weftMapAddresses], len(r.addresses), func(a weftAddress) (uint32, bool) {
		id, known := r.addresses[addrOf(a.Word)]
		return id, known
	}, func(yield func(weftAddress, uint32) bool) {
		for a, id := range r.addresses {
			if !yield(weftAddress{Word: words(a)}, id) {
				return
			}
		}
	})
	ids, idsErr := keep(r.maps[weftMapServiceIds], len(r.services)+len(r.addresses), r.steered, r.allSteered)
	if n := services + addresses + ids; n > 0 {
		r.log.Warn("services were changed behind the agent's back and are repaired", "entries", n)
	}
	if err := errors.Join(servicesErr, addressesErr, idsErr); err != nil {
		return fmt.Errorf("keep services: %w", err)
	}
	return nil
}

// steered is what an entry of service_ids must say: the service or address whose entry has the id.
func (r *Redirect) steered(id uint32) (weftEndpoint, bool) {
	at, known := r.serviceID.used[id]
	if !known {
		at, known = r.addressID.used[id]
	}
	return endpointOf(at), known
}

func (r *Redirect) allSteered(yield func(uint32, weftEndpoint) bool) {
	for _, used := range []map[uint32]netip.AddrPort{r.serviceID.used, r.addressID.used} {
		for id, at := range used {
			if !yield(id, endpointOf(at)) {
				return
			}
		}
	}
}

// keep makes a hash map hold the n entries of all, which want finds by key, and no other. It returns how many it changed.
// A map that is as it should be is read once, without making anything.
func keep[K, V comparable](m *ebpf.Map, n int, want func(K) (V, bool), all iter.Seq2[K, V]) (changed int, err error) {
	right := 0
	var foreign []K
	err = everyEntry(m, func(key K, value V) {
		if wanted, known := want(key); !known {
			foreign = append(foreign, key)
		} else if wanted == value {
			right++
		}
	})
	if err != nil {
		return 0, err
	}
	changed = len(foreign) + n - right
	if changed == 0 {
		return 0, nil
	}
	var errs []error
	for _, key := range foreign {
		errs = append(errs, ignoreMissing(m.Delete(key)))
	}
	for key, value := range all {
		errs = append(errs, m.Put(key, value))
	}
	return changed, errors.Join(errs...)
}

// everyEntry reads a hash map a thousand entries at a time.
func everyEntry[K, V any](m *ebpf.Map, visit func(K, V)) error {
	keys, values := make([]K, 1024), make([]V, 1024)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			visit(keys[i], values[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil // that was the last of them
		} else if err != nil {
			return fmt.Errorf("read map: %w", err)
		}
	}
}
