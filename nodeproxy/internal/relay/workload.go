package relay

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// workload is what is kept of a meshv1.Workload: its version, whether peers speak mTLS to it, and its addresses, packed into one
// string. A mesh has tens of thousands, on every node. The last known state holds no more either, under the version that the
// controller gave: an agent that acts on more than this must not take that state over.
type workload string

// The first byte of a workload.
const (
	speaksMTLS = 1 << iota
	// hashed: the version is the controller's, 16 hexadecimal digits, in 8 bytes; else it stands behind its length.
	hashed
)

func compact(m *meshv1.Workload, version string) workload {
	packed := []byte{0}
	if m.Mtls {
		packed[0] |= speaksMTLS
	}
	if raw, err := hex.DecodeString(version); err == nil && len(raw) == 8 && strings.ToLower(version) == version {
		packed[0] |= hashed
		packed = append(packed, raw...)
	} else {
		packed = append(binary.AppendUvarint(packed, uint64(len(version))), version...)
	}
	for _, a := range m.Addresses {
		if len(a) == 4 || len(a) == 16 {
			packed = append(append(packed, byte(len(a))), a...)
		}
	}
	return workload(packed)
}

// parts are the version, and the addresses, each behind its length.
func (w workload) parts() (version, addresses string) {
	rest := string(w[1:])
	if w[0]&hashed != 0 {
		return hex.EncodeToString([]byte(rest[:8])), rest[8:]
	}
	length, n := binary.Uvarint([]byte(rest))
	end := n + int(length)
	return rest[n:end], rest[end:]
}

func (w workload) mtls() bool { return w[0]&speaksMTLS != 0 }

// each gives the addresses one by one.
func (w workload) each(give func([]byte)) {
	for _, rest := w.parts(); rest != ""; {
		end := 1 + int(rest[0])
		give([]byte(rest[1:end]))
		rest = rest[end:]
	}
}

func (w workload) message() *meshv1.Workload {
	m := &meshv1.Workload{Mtls: w.mtls()}
	w.each(func(a []byte) { m.Addresses = append(m.Addresses, a) })
	return m
}

// uid is a pod's, in 17 bytes where it is a UUID as Kubernetes makes them: a NUL goes before, which no name begins with.
type uid string

func compactUID(name string) uid {
	if raw, err := hex.DecodeString(strings.ReplaceAll(name, "-", "")); err == nil && len(raw) == 16 {
		if packed := uid("\x00" + string(raw)); packed.name() == name {
			return packed
		}
	}
	return uid(name)
}

func (u uid) name() string {
	if len(u) != 17 || u[0] != 0 {
		return string(u)
	}
	digits := hex.EncodeToString([]byte(u[1:]))
	return digits[:8] + "-" + digits[8:12] + "-" + digits[12:16] + "-" + digits[16:20] + "-" + digits[20:]
}

// Captured are the addresses of the pods that speak mTLS, in order.
func (u *Upstream) Captured() []netip.Addr {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := make([]netip.Addr, 0, len(u.workloads))
	for _, w := range u.workloads {
		if w.mtls() {
			w.each(func(a []byte) {
				if address, ok := netip.AddrFromSlice(a); ok {
					out = append(out, address.Unmap())
				}
			})
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}
