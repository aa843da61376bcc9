package xds

import (
	"strings"

	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// Source is what Build makes a resource of: while it is the same value, so is the resource. False: it is made of more than
// one thing.
func Source(s *ir.Snapshot, typeURL, name string) (source any, one bool) {
	switch typeURL {
	case TypeRoute:
		key, _ := parsePort("route", name)
		port := findPort(s, key)
		return port, port == nil || len(port.Routes) == 0 // a route's backends are ports of their own
	case TypeCluster, TypeEndpoints:
		if key, ok := parsePort("svc", name); ok {
			return findPort(s, key), true
		}
		if port := portByAddress(s, name); port != nil {
			return port, true
		}
		return podByName(s, name), true
	case TypeMesh:
		return s.Mesh, true
	case TypeNamespace:
		return s.Namespaces[name], true
	case TypeService:
		namespace, service, _ := strings.Cut(name, "/")
		return s.Services[ir.Key{Namespace: namespace, Name: service}], true
	case TypeWorkload:
		return s.Pods[name], true
	case TypeLocalPod:
		_, uid, _ := strings.Cut(name, "/")
		return s.Pods[uid], true
	case TypeInboundPolicy:
		return s.Policies[name], true
	}
	return nil, false
}
