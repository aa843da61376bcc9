// Package lds builds everything that the node's agent itself puts into Envoy: the listeners of enrolled pods, the
// scopes that lead to routes, the static clusters and the secrets. It is pure: plain data in, resources out, the same
// input giving the same bytes. All of it is checked against the real Envoy (test/contract).
//
// Per enrolled pod there are two listeners in the pod's own network namespace, and a third where a server speaks first
// (docs/ARCHITECTURE.md). "out" takes what the pod's apps dial; the steering port says which chain. "in" takes what
// others dial; its filter chain matcher goes by destination port, then transport, then the ALPN list that the caller
// offered, and so picks the one chain that the port's policy wants (docs/adr/0001). "in-first" is for callers without
// mesh TLS on ports whose server speaks first: nothing there waits for the client's bytes.
//
// What a listener carries besides its chains is the same in every mode and under every policy, so that Envoy applies a
// change of mode or policy in place and only the chains that changed drain.
package lds
