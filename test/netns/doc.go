// Package netns tests the redirect package's hooks in real network namespaces, without Kubernetes and without Envoy:
// a stand-in in a cgroup of its own listens, answers and dials as Envoy does.
//
// The tests need root, a cgroup2 mount, veth and Linux 6.1 or later, and no other program: a `go test -c` binary with
// CGO_ENABLED=0 runs them on a machine that holds nothing else. The binary starts itself again in a mount namespace of
// its own, so that mounts, pins, links and network namespaces end with it, however it ends.
package netns
