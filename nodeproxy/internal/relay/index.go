package relay

import (
	"slices"

	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// list returns all of a type in the index, by name.
func list[M proto.Message](u *Upstream, typeURL string) []M {
	u.mu.Lock()
	defer u.mu.Unlock()
	var all []string
	for k := range u.bodies {
		if k.TypeURL == typeURL {
			all = append(all, k.Name)
		}
	}
	slices.Sort(all)
	out := make([]M, 0, len(all))
	for _, n := range all {
		if m, ok := u.bodies[Key{typeURL, n}].(M); ok {
			out = append(out, m)
		}
	}
	return out
}

// Mesh returns the settings of the whole mesh, nil before the controller has spoken.
func (u *Upstream) Mesh() *meshv1.Mesh {
	if all := list[*meshv1.Mesh](u, TypeMesh); len(all) > 0 {
		return all[0]
	}
	return nil
}

// Namespace returns one namespace, nil when the controller has not spoken of it.
func (u *Upstream) Namespace(name string) *meshv1.Namespace {
	u.mu.Lock()
	defer u.mu.Unlock()
	n, _ := u.bodies[Key{TypeNamespace, name}].(*meshv1.Namespace)
	return n
}

// Services of the mesh, by name.
func (u *Upstream) Services() []*meshv1.Service { return list[*meshv1.Service](u, TypeService) }

// LocalPods of this node, by uid.
func (u *Upstream) LocalPods() []*meshv1.LocalPod { return list[*meshv1.LocalPod](u, TypeLocalPod) }

// Policy returns an inbound policy, nil when it is not there yet.
func (u *Upstream) Policy(hash string) *meshv1.InboundPolicy {
	u.mu.Lock()
	defer u.mu.Unlock()
	p, _ := u.bodies[Key{TypeInboundPolicy, hash}].(*meshv1.InboundPolicy)
	return p
}

// WantPolicies subscribes to exactly these policies.
func (u *Upstream) WantPolicies(hashes map[string]bool) {
	u.mu.Lock()
	var old []Key
	for k := range u.wanted {
		if k.TypeURL == TypeInboundPolicy && !hashes[k.Name] {
			old = append(old, k)
		}
	}
	u.mu.Unlock()
	for h := range hashes {
		u.Want(Key{TypeInboundPolicy, h}, true)
	}
	for _, k := range old {
		u.Want(k, false)
	}
}

// LocalPod returns one pod of this node, nil when the controller has not spoken of it.
func (u *Upstream) LocalPod(node, uid string) *meshv1.LocalPod {
	u.mu.Lock()
	defer u.mu.Unlock()
	p, _ := u.bodies[Key{TypeLocalPod, node + "/" + uid}].(*meshv1.LocalPod)
	return p
}
