package redirect

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// counterNames are the names of enum counter in bpf/types.h, in its order.
var counterNames = [...]string{
	"out_captured",          // connects sent to Envoy
	"out_assigned",          // of those, packets that found Envoy's listener
	"out_refused_limit",     // connects refused with EAGAIN: the pod's connection limit
	"out_refused_full",      // connects refused with EAGAIN: the map of hand-overs is full
	"out_lost_full",         // connects reset, Envoy's last hops too: the map filled up between two hooks
	"out_device_cleared",    // sockets taken off SO_BINDTODEVICE
	"in_assigned",           // packets given to Envoy's inbound listener
	"in_first_assigned",     // and to that without inspectors
	"in_plain",              // let through for want of a listener, Permissive only
	"in_refused_limit",      // reset: the pod's connection limit
	"local_leg",             // Envoy's last hops
	"probe",                 // kubelet's connects to probe ports
	"drop_gated",            // packets to a gated pod
	"drop_no_listener",      // reset for want of a listener
	"drop_no_handover",      // reset: a steering address that no connect led to, or what may be a local leg that was lost
	"drop_proxy_port",       // reset: a proxy port dialled from elsewhere
	"refused_proxy_port",    // connects to the pod's own proxy ports
	"refused_bind",          // binds to proxy ports
	"refused_gated",         // connects of a gated pod
	"refused_proxy_connect", // connects of Envoy that would loop or leave from its own netns
	"listener_added",        // Envoy's listeners recorded
	"listener_failed",       // and not: no plain TCP socket, or the map is full
	"original_dst_missing",  // Envoy asked for an original destination that was not recorded
	"closed_before_accept",  // hand-overs that ended with their client
	"out_plain",             // connects let through on a node that weft is gone from, Permissive only
	"leg_refused_limit",     // Envoy's last hops refused: twice the pod's connection limit
	"refused_leg_address",   // binds and connects to the addresses from which last hops come
	"client_unknown",        // an app saw its own pod's address as its client's, for want of memory
}

// shortcutNames are the names of enum shortcut_counter in bpf/types.h, in its order. Passed is what stayed on TCP.
var shortcutNames = [...]string{
	"shortcut_joined",              // sockets that joined the short circuit
	"shortcut_full",                // sockets that found no room in it
	"shortcut_refused",             // sockets that the kernel does not take, such as MPTCP's
	"shortcut_trimmed_bytes",       // bytes that TCP had brought twice, taken off
	"shortcut_trim_failed",         // and not, for want of memory: the reader gets them twice
	"shortcut_redirected_bytes",    // payload past TCP
	"shortcut_passed_off_bytes",    // switched off since the socket joined
	"shortcut_passed_alone_bytes",  // the other end has not joined
	"shortcut_passed_closed_bytes", // the other end is not accepted yet, closed, or has kTLS
	"shortcut_passed_unread_bytes", // the reader has not taken what was sent by TCP
	"shortcut_passed_bound_bytes",  // too much waits for the reader
}

// Counters reads the instance's counters, summed over all processors, by name.
func (r *Redirect) Counters() (map[string]uint64, error) {
	counters := make(map[string]uint64, len(counterNames)+len(shortcutNames))
	err := errors.Join(
		readCounters(r.maps[weftMapCounters], counterNames[:], counters),
		readCounters(r.maps[weftMapShortcuts], shortcutNames[:], counters))
	if err != nil {
		return nil, err
	}
	return counters, nil
}

func readCounters(from *ebpf.Map, names []string, to map[string]uint64) error {
	for i, name := range names {
		var perCPU []uint64
		switch err := from.Lookup(uint32(i), &perCPU); {
		case errors.Is(err, ebpf.ErrKeyNotExist): // the pins of an earlier version, which did not count this
		case err != nil:
			return fmt.Errorf("read counter %s: %w", name, err)
		}
		for _, n := range perCPU {
			to[name] += n
		}
	}
	return nil
}
