package enrol

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netns"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/pods"
	"github.com/weftmesh/weft/redirect"
)

// Refusal says why a pod cannot be enrolled as it is. Its reason becomes the condition's.
type Refusal struct {
	Reason string
	Cause  error
}

func (r *Refusal) Error() string { return r.Cause.Error() }
func (r *Refusal) Unwrap() error { return r.Cause }

// refuse gives the kernel's refusals their reasons.
func refuse(err error) error {
	switch {
	case errors.Is(err, redirect.ErrPodsFull):
		return &Refusal{"NodeFull", err}
	case errors.Is(err, redirect.ErrNetnsGone):
		return &Refusal{"NetworkNamespaceGone", err}
	}
	return fmt.Errorf("enrol: %w", err)
}

// otherSidecar is the name of Istio's container.
const otherSidecar = "istio-proxy"

var errOtherSidecar = errors.New("the pod has an Istio sidecar: remove it, then the pod can join")

// check refuses pods whose connections cannot be captured rightly. What the API server says of a gated pod's addresses may still
// be of its sandbox before: kubelet tells it after the containers were made.
func (e *Enroller) check(p pods.Pod, wish *meshv1.LocalPod, gated bool) error {
	for _, sandboxed := range []string{"kata", "gvisor", "runsc"} {
		if strings.Contains(strings.ToLower(p.Runtime), sandboxed) {
			return &Refusal{"RuntimeUnsupported", fmt.Errorf("runtime %s keeps the pod's sockets out of this kernel: run it with the default RuntimeClass", p.Runtime)}
		}
	}
	if slices.Contains(p.Containers, otherSidecar) {
		return &Refusal{"OtherSidecar", errOtherSidecar}
	}
	if len(p.Addresses) == 0 {
		return &Refusal{"NoAddress", errors.New("the runtime knows no address of the pod: see that its network came up")}
	}
	for _, raw := range wish.Addresses {
		if a, ok := netip.AddrFromSlice(raw); ok && !gated && !slices.Contains(p.Addresses, a.Unmap()) {
			return &Refusal{"AddressMismatch", fmt.Errorf("the API server says %s, the runtime says %v: the pod's status is wrong, or of another sandbox", a, p.Addresses)}
		}
	}
	return e.inspect(p.NetnsPath)
}

// inspectNetns looks into the network namespace at a path.
func inspectNetns(path string) error {
	var found error
	err := inside(path, func() error {
		found = inspect()
		return nil
	})
	if err != nil {
		return &Refusal{"NetworkNamespaceGone", fmt.Errorf("enter the pod's network namespace: %w", err)}
	}
	return found
}

// inspect looks at the calling thread's network namespace.
func inspect() error {
	// Many runtimes hand the node's ip_forward=1 down to every pod; it takes a second interface to forward.
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); err == nil && strings.TrimSpace(string(b)) == "1" {
		devices, err := net.Interfaces()
		up := slices.DeleteFunc(devices, func(d net.Interface) bool { return d.Flags&net.FlagLoopback != 0 || d.Flags&net.FlagUp == 0 })
		if err == nil && len(up) > 1 {
			return &Refusal{"PodForwards", fmt.Errorf("the pod forwards packets between %d interfaces (net.ipv4.ip_forward=1): what it forwards could not be judged", len(up))}
		}
	}
	for _, table := range tables() {
		if port := listeningInRange(table); port != 0 {
			return &Refusal{"PortInUse", fmt.Errorf("the pod listens on port %d; ports %d to %d are Envoy's in an enrolled pod: let the app use another", port, names.PortFirst, names.PortLast)}
		}
	}
	return nil
}

// listeningInRange finds a listening socket (state 0A) on one of Envoy's ports in /proc/net/tcp's text.
func listeningInRange(table string) int {
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 4 || f[3] != "0A" {
			continue
		}
		_, hex, _ := strings.Cut(f[1], ":")
		port, err := strconv.ParseUint(hex, 16, 16)
		if err == nil && port >= names.PortFirst && port <= names.PortLast {
			return int(port)
		}
	}
	return 0
}

// tables are what /proc/net/tcp and tcp6 say in the calling thread's network namespace.
func tables() (all []string) {
	for _, file := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		if b, err := os.ReadFile(file); err == nil { // a kernel without IPv6 has no tcp6
			all = append(all, string(b))
		}
	}
	return all
}

// countEstablished counts the connections of the network namespace at a path that lead out of it.
func countEstablished(path string) (count uint32, err error) {
	err = inside(path, func() error {
		for _, table := range tables() {
			count += establishedIn(table)
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("count connections: %w", err)
	}
	return count, nil
}

// establishedIn counts the established connections (state 01) between different addresses in /proc/net/tcp's text.
func establishedIn(table string) (count uint32) {
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 4 || f[3] != "01" {
			continue
		}
		local, _, _ := strings.Cut(f[1], ":")
		remote, _, _ := strings.Cut(f[2], ":")
		if local != remote {
			count++
		}
	}
	return count
}

// inside runs f on a thread in a network namespace; the thread ends with it.
func inside(path string, f func() error) error {
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		h, err := netns.GetFromPath(path)
		if err != nil {
			failed <- err
			return
		}
		defer h.Close()
		if err := netns.Set(h); err != nil {
			failed <- err
			return
		}
		failed <- f()
	}()
	return <-failed
}
