package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"
)

// Steering ids are 22 bits, the host part of names.SteerIPv4: services have the lower half, pods' addresses the next quarter.
// The last one is names.LegIPv4.
const (
	maxServiceID   = 1<<21 - 1
	firstAddressID = 1 << 21
	maxAddressID   = 1<<20 - 1
)

// allocator gives out ids first..last, going round, so that an id that was just freed is the last to come again.
type allocator struct {
	first, last, next uint32
	used              map[uint32]netip.AddrPort // what each id stands for; a pod's address has no port
}

func newAllocator(first, last uint32) allocator {
	return allocator{first: first, last: last, next: first, used: map[uint32]netip.AddrPort{}}
}

// take returns a free id; there are always more ids than map entries.
func (a *allocator) take(at netip.AddrPort) uint32 {
	for {
		id := a.next
		a.advance()
		if _, used := a.used[id]; !used {
			a.used[id] = at
			return id
		}
	}
}

func (a *allocator) advance() {
	if a.next++; a.next > a.last {
		a.next = a.first
	}
}

func (a *allocator) free(id uint32) { delete(a.used, id) }

// readBack rebuilds from the maps what the agent of before knew.
func (r *Redirect) readBack() error {
	r.pods = map[string]uint64{}
	r.capturedUntil = map[uint64]time.Time{}
	r.services = map[netip.AddrPort]weftService{}
	r.addresses = map[netip.Addr]uint32{}
	r.serviceID = newAllocator(1, maxServiceID)
	r.addressID = newAllocator(firstAddressID, firstAddressID+maxAddressID)

	var cookie uint64
	var record weftPodRecord
	records := r.maps[weftMapRecords].Iterate()
	for records.Next(&cookie, &record) {
		r.pods[textOf(record.Uid[:])] = cookie
	}
	var endpoint weftEndpoint
	var service weftService
	services := r.maps[weftMapServices].Iterate()
	for services.Next(&endpoint, &service) {
		r.services[addrPortOf(endpoint)] = service
		r.serviceID.used[service.Id] = addrPortOf(endpoint)
	}
	var addr weftAddress
	var id uint32
	addresses := r.maps[weftMapAddresses].Iterate()
	for addresses.Next(&addr, &id) {
		r.addresses[addrOf(addr.Word)] = id
		r.addressID.used[id] = netip.AddrPortFrom(addrOf(addr.Word), 0)
	}
	if err := errors.Join(records.Err(), services.Err(), addresses.Err()); err != nil {
		return fmt.Errorf("read maps back: %w", err)
	}
	return nil
}

// SetServices makes the given services the whole set that is captured; connections that exist stay as they are. What
// does not fit, or names an address that is not a unicast one, is refused one by one, in the order given.
func (r *Redirect) SetServices(services []Service) ([]Refusal, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	wanted := make(map[netip.AddrPort]Class, len(services))
	order := make([]netip.AddrPort, 0, len(services))
	var refused []Refusal
	for _, s := range services {
		at := netip.AddrPortFrom(canonical(s.Addr.Addr()), s.Addr.Port())
		switch _, twice := wanted[at]; {
		case s.Class != ClassHTTP && s.Class != ClassTCP && s.Class != ClassAuto:
			refused = append(refused, Refusal{s.Addr, fmt.Sprintf("class %d is not HTTP, TCP or Auto", s.Class)})
		case !at.IsValid() || at.Port() == 0:
			refused = append(refused, Refusal{s.Addr, "not an address and port"})
		case !at.Addr().IsGlobalUnicast():
			refused = append(refused, Refusal{s.Addr, "loopback, link-local and multicast addresses are not captured"})
		case twice:
			refused = append(refused, Refusal{s.Addr, "given twice"})
		default:
			wanted[at] = s.Class
			order = append(order, at)
		}
	}
	for at := range r.services {
		if _, keep := wanted[at]; !keep {
			if err := r.removeService(at); err != nil {
				return refused, err
			}
		}
	}
	for _, at := range order {
		err := r.putService(at, wanted[at])
		if errors.Is(err, ErrFull) {
			refused = append(refused, Refusal{at, fmt.Sprintf("the map holds %d service addresses and is full: raise the limit", r.maps[weftMapServices].MaxEntries())})
		} else if err != nil {
			return refused, err
		}
	}
	return refused, nil
}

// removeService takes the service out before its id, so that no connection is steered to an id that means nothing.
func (r *Redirect) removeService(at netip.AddrPort) error {
	old := r.services[at]
	err := errors.Join(
		ignoreMissing(r.maps[weftMapServices].Delete(endpointOf(at))),
		ignoreMissing(r.maps[weftMapServiceIds].Delete(old.Id)))
	if err != nil {
		return fmt.Errorf("remove service %s: %w", at, err)
	}
	delete(r.services, at)
	r.serviceID.free(old.Id)
	return nil
}

func (r *Redirect) putService(at netip.AddrPort, class Class) error {
	service, known := r.services[at]
	if known && service.Port == weftPort(class) {
		return nil
	}
	if !known {
		service.Id = r.serviceID.take(at)
		if err := r.put(weftMapServiceIds, service.Id, endpointOf(at)); err != nil {
			r.serviceID.free(service.Id)
			return fmt.Errorf("add id of service %s: %w", at, err)
		}
	}
	service.Port = weftPort(class)
	if err := r.put(weftMapServices, endpointOf(at), service); err != nil {
		if !known {
			r.serviceID.free(service.Id)
			err = errors.Join(err, ignoreMissing(r.maps[weftMapServiceIds].Delete(service.Id)))
		}
		return fmt.Errorf("add service %s: %w", at, err)
	}
	r.services[at] = service
	return nil
}

// SetAddresses makes the given addresses of enrolled pods, in the whole cluster, those that are captured (as ClassTCP)
// when dialled directly, and whose plaintext is never let through. It returns those that did not fit.
func (r *Redirect) SetAddresses(addresses []netip.Addr) ([]netip.Addr, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	wanted := make(map[netip.Addr]bool, len(addresses))
	for _, a := range addresses {
		wanted[canonical(a)] = true
	}
	for a, id := range r.addresses {
		if wanted[a] {
			continue
		}
		err := errors.Join(
			ignoreMissing(r.maps[weftMapAddresses].Delete(weftAddress{Word: words(a)})),
			ignoreMissing(r.maps[weftMapServiceIds].Delete(id)))
		if err != nil {
			return nil, fmt.Errorf("remove address %s: %w", a, err)
		}
		delete(r.addresses, a)
		r.addressID.free(id)
	}
	var refused []netip.Addr
	for _, a := range addresses {
		err := r.putAddress(canonical(a))
		if errors.Is(err, ErrFull) || errors.Is(err, errNotUnicast) {
			refused = append(refused, a)
		} else if err != nil {
			return refused, err
		}
	}
	return slices.Clip(refused), nil
}

var errNotUnicast = errors.New("not a unicast address")

func (r *Redirect) putAddress(a netip.Addr) error {
	if _, known := r.addresses[a]; known {
		return nil
	}
	if !a.IsGlobalUnicast() {
		return fmt.Errorf("add address %s: %w", a, errNotUnicast)
	}
	id := r.addressID.take(netip.AddrPortFrom(a, 0))
	if err := r.put(weftMapServiceIds, id, weftEndpoint{Addr: words(a)}); err != nil {
		r.addressID.free(id)
		return fmt.Errorf("add id of address %s: %w", a, err)
	}
	if err := r.put(weftMapAddresses, weftAddress{Word: words(a)}, id); err != nil {
		r.addressID.free(id)
		return fmt.Errorf("add address %s: %w", a, errors.Join(err, ignoreMissing(r.maps[weftMapServiceIds].Delete(id))))
	}
	r.addresses[a] = id
	return nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}
