// The layouts that the hooks and the Go side share; bpf2go emits their Go twins.
// Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Ports are in host order.
#pragma once

// Twins of constants in api/names; a Go test compares them.
enum port {
	PORT_FIRST = 15000,
	PORT_LAST = 15019,
	PORT_OUT_POD = 15004,
	GENERATION_ROW = 10,
};

enum option {
	TAG_LOCAL_LEG = 1,
	TAG_OUTBOUND_LEG = 3,
	OPTION_NAME = 1,
	OPTION_LEVEL = 0x5746,
};

enum role {
	ROLE_OUT = 1,
	ROLE_IN = 6,
	ROLE_IN_FIRST = 7,
};

enum pod_flag {
	POD_GATED = 1,     // nothing in, nothing out
	POD_INBOUND = 2,   // inbound connections go to Envoy
	POD_OUTBOUND = 4,  // outbound connections to known addresses go to Envoy
	POD_STRICT = 8,    // inbound without Envoy's listener is dropped
	POD_IPV4 = 16,     // the pod has an IPv4 address and a steering route
	POD_IPV6 = 32,
	POD_LEAVING = 64,  // withdrawn; only its open connections still need the entry
	POD_SHORTCUT = 128, // payload between its apps and Envoy may take the short circuit
};

// What a socket or a hand-over is.
enum kind {
	KIND_NONE,
	KIND_OUT,          // an app's captured connection
	KIND_LOCAL,        // Envoy's last hop to the app
	KIND_PROBE,        // kubelet's probe
	KIND_OUT_ACCEPTED, // Envoy's end of KIND_OUT
	KIND_IN_ACCEPTED,  // Envoy's end of an inbound connection
	KIND_LEG,          // a socket of Envoy's that is to be KIND_LOCAL, with the client's address
	KIND_LOCAL_ACCEPTED, // the app's end of KIND_LOCAL
};

// Order is counterNames in counters.go.
enum counter {
	COUNT_OUT_CAPTURED,
	COUNT_OUT_ASSIGNED,
	COUNT_OUT_REFUSED_LIMIT,
	COUNT_OUT_REFUSED_FULL,
	COUNT_OUT_LOST_FULL,
	COUNT_OUT_DEVICE_CLEARED,
	COUNT_IN_ASSIGNED,
	COUNT_IN_FIRST_ASSIGNED,
	COUNT_IN_PLAIN,
	COUNT_IN_REFUSED_LIMIT,
	COUNT_LOCAL_LEG,
	COUNT_PROBE,
	COUNT_DROP_GATED,
	COUNT_DROP_NO_LISTENER,
	COUNT_DROP_NO_HANDOVER,
	COUNT_DROP_PROXY_PORT,
	COUNT_REFUSED_PROXY_PORT,
	COUNT_REFUSED_BIND,
	COUNT_REFUSED_GATED,
	COUNT_REFUSED_PROXY_CONNECT,
	COUNT_LISTENER_ADDED,
	COUNT_LISTENER_FAILED,
	COUNT_ORIGINAL_DST_MISSING,
	COUNT_CLOSED_BEFORE_ACCEPT,
	COUNT_OUT_PLAIN,
	COUNT_LEG_REFUSED_LIMIT,
	COUNT_REFUSED_LEG_ADDRESS,
	COUNT_CLIENT_UNKNOWN,
	COUNTERS,
};

// Of the short circuit. Order is shortcutNames in counters.go.
enum shortcut_counter {
	SHORTCUT_JOINED,
	SHORTCUT_FULL,
	SHORTCUT_REFUSED,
	SHORTCUT_TRIMMED_BYTES,
	SHORTCUT_TRIM_FAILED,
	SHORTCUT_REDIRECTED_BYTES,
	SHORTCUT_PASSED_OFF_BYTES,
	SHORTCUT_PASSED_ALONE_BYTES,
	SHORTCUT_PASSED_CLOSED_BYTES,
	SHORTCUT_PASSED_UNREAD_BYTES,
	SHORTCUT_PASSED_BOUND_BYTES,
	SHORTCUT_COUNTERS,
};

struct address {
	__u32 word[4];
};

struct endpoint {
	__u32 addr[4];
	__u16 port;
	__u16 pad;
};

struct pod {
	enum pod_flag flags;
	__u32 generation; // of Envoy, for new connections in and out
	__u32 limit;      // captured connections, in and out each
	__u32 pad;
};

// Live and refused connections of a pod. Apart from struct pod, which the agent replaces as a whole.
struct usage {
	__u64 outgoing;
	__u64 incoming;
	__u64 refused_outgoing;
	__u64 refused_incoming;
};

// What only the agent reads: enough to take the pod out without the agent that enrolled it.
struct pod_record {
	__u8 uid[64];
	__u8 sandbox[80];
	__u8 netns[256];
	__u64 netns_inode;
	__u32 source4[4]; // the addresses of the steering routes, zero: none
	__u32 source6[4];
	__u8 prepared;             // the sysctls below were saved
	__u8 loopback_without_ipv6;
	__u8 migrate_requests;
	__u8 pad;
	__u32 reserved_ports; // those of the proxy ports that the pod had reserved itself, PORT_FIRST in the lowest bit
};

struct pod_address {
	__u64 netns;
	__u32 addr[4];
};

struct pod_port {
	__u64 netns;
	__u16 port;
	__u16 pad[3];
};

struct service {
	__u32 id;   // the host part of the steering address
	enum port port; // the class port
};

// A connection as its client sees it, in the netns it arrives in.
struct tuple {
	__u64 netns;
	__u32 source[4];
	__u32 destination[4];
	__u16 source_port;
	__u16 destination_port;
	__u32 pad;
};

// A connection on its way from the client's connect to the server's accept queue.
struct handover {
	__u64 socket; // the client's cookie
	__u64 time;   // ns since boot
	__u32 addr[4]; // as in struct socket_state
	__u16 port;
	__u16 kind; // enum kind
	__u32 pad;
};

struct socket_state {
	__u64 netns;   // where the connection arrives
	__u32 addr[4]; // where the app meant to connect; of a local leg, the client that the app is to see, zero: none
	__u16 port;
	__u8 kind;     // enum kind
	__u8 counted;  // in struct usage
	enum option tag; // as Envoy set it: shifted left by 16 bits
};

struct listener {
	__u64 netns;
	__u32 generation;
	enum role role;
};

struct instance {
	__u64 node_netns;
	__u64 kubelet_cgroup;
	__u8 boot_id[64];
	__u32 limit; // connections per pod, for new pods
	__u16 own_address; // 1: apps see their own pod's address as their client's
	__u16 bound; // KiB that may wait in one socket by the short circuit
};

// What verdict.c has passed of a connection's TCP bytes.
struct passed {
	__u32 next; // the sequence number of the next byte
	__u32 known;
};

// A socket that has joined the short circuit, as msg.c finds it from the other end: by its address in the kernel, which
// counts only while the cookie there is this one.
struct peer {
	__u64 socket;
	__u64 cookie;
};
