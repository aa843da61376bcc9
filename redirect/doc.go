// Package redirect hands the TCP connections of enrolled pods to the node's Envoy inside the kernel.
//
// Load attaches a set of eBPF programs to the node's cgroup tree; Enrol adds one sk_lookup program to a pod's network
// namespace. Outbound, the connect hook sends a captured connection to a steering address (names.SteerIPv4 or
// names.SteerIPv6) that stands for the service address, and remembers where the app meant to connect. Inbound, sk_lookup
// assigns every TCP connection to any non-loopback address of the pod to Envoy's listener there. Both find the listener
// in a map that only Envoy's own listen(2) fills.
//
// Everything lives in the kernel, pinned under one directory of a bpffs: the agent may stop, crash and start again
// while connections go on, and Release removes an instance from its pins alone. Several instances (nodes, or an old and
// a new one) share a kernel without touching each other's pods: every hook first looks the socket's netns cookie up in
// its own maps and passes what is not its own.
//
// A pod may also have the short circuit (SetShortcut): what its apps and Envoy send each other on captured connections and
// local legs goes from socket to socket, past TCP. It is the one part that reads the kernel's own structures, and needs
// Linux 6.18 or later; a kernel without it has all the rest.
//
// The order of calls for one pod is Enrol, wait until Listening names the listeners, Capture inbound, Capture outbound,
// SetMode; and backwards: SetMode permissive, Capture off, Withdraw. Gate comes first for a pod that must not speak before.
//
// It needs Linux 6.1 or later, cgroup2, a bpffs, and CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN (to enter a pod's netns).
package redirect
