package redirect

import "fmt"

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
}

// Counters reads the instance's counters, summed over all processors, by name.
func (r *Redirect) Counters() (map[string]uint64, error) {
	counters := make(map[string]uint64, len(counterNames))
	for i, name := range counterNames {
		var perCPU []uint64
		if err := r.maps[weftMapCounters].Lookup(uint32(i), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", name, err)
		}
		for _, n := range perCPU {
			counters[name] += n
		}
	}
	return counters, nil
}
