package resolve

import (
	"fmt"
	"testing"

	"github.com/weftmesh/weft/api/v1alpha1"
)

// big is a mesh of services with pods behind them, one AccessPolicy and one route each ten services.
func big(services, podsEach int) Input {
	var all []any
	for i := range services {
		name := fmt.Sprintf("s%d", i)
		ip := fmt.Sprintf("10.%d.%d.%d", 100+i>>16, i>>8&255, i&255)
		addresses := ""
		for j := range podsEach {
			n := i*podsEach + j
			address := fmt.Sprintf("10.%d.%d.%d", n>>16, n>>8&255, n&255)
			addresses += " " + address
			full := fmt.Sprintf("ns%d/%s-%d", i%50, name, j)
			all = append(all, pod(full, address, label("enabled")), in(full))
		}
		full := fmt.Sprintf("ns%d/%s", i%50, name)
		all = append(all, service(full, ip, "http:80>8080"), slice(full, "http:8080", addresses))
		if i%10 == 0 {
			a := access(full, v1alpha1.Allow, from("api"))
			a.Spec.TargetRefs = []v1alpha1.TargetRef{{Kind: "Service", Name: name}}
			all = append(all, a, httpRoute(full, full, rule(nil, name+":80")))
		}
	}
	return world(all...)
}

// BenchmarkResolve measures one change in a mesh of 5,000 services and 20,000 pods.
func BenchmarkResolve(b *testing.B) {
	w := big(5000, 4)
	r := Resolve(nil, w)
	b.ReportAllocs()
	for b.Loop() {
		r = Resolve(r, w)
	}
}
