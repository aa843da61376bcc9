package datapath

import (
	"fmt"
	"testing"

	"github.com/weftmesh/weft/test/datapath/lab"
)

// What a new connection from outside the mesh to a server that speaks first costs, where the app sees its pod's own address
// and where it sees the client's: the client's time until the banner, and the processor time of the server's Envoy.
func BenchmarkClientAddress(b *testing.B) {
	m := enrolled(b)
	m.policy(permissive())
	server := m.Pod("near")
	dial := func(b *testing.B, from *lab.Pod, ipv6 bool) {
		if got, err := line(from, m.direct("near", bannerPort, ipv6), ""); err != nil || got != "banner of "+server.Name {
			b.Fatal(got, err)
		}
	}
	for _, family := range []string{"IPv4", "IPv6"} {
		for _, own := range []bool{true, false} {
			b.Run(fmt.Sprintf("%s/%s", family, map[bool]string{true: "Own", false: "Preserve"}[own]), func(b *testing.B) {
				if err := m.ClientAddress(own); err != nil {
					b.Fatal(err)
				}
				dial(b, m.Pod("stranger"), family == "IPv6")
				before, err := m.CPU(0)
				if err != nil {
					b.Fatal(err)
				}
				for b.Loop() {
					dial(b, m.Pod("stranger"), family == "IPv6")
				}
				after, err := m.CPU(0)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64((after-before).Microseconds())/float64(b.N), "envoy-µs/op")
			})
		}
	}
}
