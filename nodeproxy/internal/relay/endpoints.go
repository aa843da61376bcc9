package relay

import (
	"strings"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/api/names"
)

// A cluster has one transport socket match for each identity among its endpoints, and an endpoint without its match is
// refused. So an endpoint must not appear before Envoy has the match. Sending the cluster first is not enough: Envoy warms
// the changed cluster beside the old one and gives both the same endpoints. Therefore each version of a cluster asks for
// its endpoints under a name of its own, and gets only such as its matches cover; the old version keeps the old ones
// until the new one takes its place.

// assignmentMark stands between a cluster's name and its version in the name of its endpoints.
const assignmentMark = "@"

// tie makes a cluster ask for its endpoints by its version. Any but an EDS cluster stays as it is.
func tie(name string, e entry) entry {
	var c cluster.Cluster
	if err := proto.Unmarshal(e.body.Value, &c); err != nil || c.GetType() != cluster.Cluster_EDS {
		return e
	}
	if c.EdsClusterConfig == nil {
		return e
	}
	c.EdsClusterConfig.ServiceName = name + assignmentMark + e.version
	body, _, err := Pack(&c)
	if err != nil {
		return e
	}
	e.body, e.assignment, e.peers = body, c.EdsClusterConfig.ServiceName, map[string]bool{}
	for _, m := range c.TransportSocketMatches {
		e.peers[m.GetMatch().GetFields()[names.MetadataPeer].GetStringValue()] = true
	}
	return e
}

// origin is the name under which the controller has the endpoints that Envoy asks for.
func origin(name string) string {
	name, _, _ = strings.Cut(name, assignmentMark)
	return name
}

// upward is the resource of the controller that a stream's key stands for.
func upward(k Key) Key {
	if k.TypeURL == TypeEndpoints {
		k.Name = origin(k.Name)
	}
	return k
}

// endpoints are what a stream is to have under an assignment's name; false: nothing that fits it is here.
func (s *stream) endpoints(k Key) (entry, bool) {
	e, ok := s.cache.entries[upward(k)]
	if !ok || upward(k) == k {
		return e, ok
	}
	peers, known := s.peers[k.Name]
	if current := s.cache.entries[Key{TypeCluster, origin(k.Name)}]; current.assignment == k.Name {
		peers, known = current.peers, true
	}
	var load endpoint.ClusterLoadAssignment
	if err := proto.Unmarshal(e.body.Value, &load); err != nil || !known || !covers(peers, &load) {
		return entry{}, false
	}
	load.ClusterName = k.Name
	body, _, err := Pack(&load)
	if err != nil {
		return entry{}, false
	}
	return entry{version: e.version, body: body}, true
}

// covers tells whether every endpoint's peer is among those that the cluster can speak to.
func covers(peers map[string]bool, load *endpoint.ClusterLoadAssignment) bool {
	for _, group := range load.Endpoints {
		for _, e := range group.LbEndpoints {
			peer := e.GetMetadata().GetFilterMetadata()[names.MetadataNamespace].GetFields()[names.MetadataPeer].GetStringValue()
			if peer != "" && !peers[peer] {
				return false
			}
		}
	}
	return true
}
