#pragma once

#define HASH(NAME, KEY, VALUE, MAX)                      \
	struct {                                         \
		__uint(type, BPF_MAP_TYPE_HASH);         \
		__uint(map_flags, BPF_F_NO_PREALLOC);    \
		__uint(max_entries, MAX);                \
		__type(key, KEY);                        \
		__type(value, VALUE);                    \
	} NAME SEC(".maps")

HASH(pods, __u64, struct pod, 1024);                     // by netns cookie: what makes a netns ours
HASH(records, __u64, struct pod_record, 1024);           // by netns cookie
HASH(usages, __u64, struct usage, 1024);                 // by netns cookie
HASH(legs, __u64, __u64, 1024);                          // by netns cookie: local legs that are open
HASH(own, struct pod_address, __u32, 16384);             // every non-loopback address of every pod
HASH(services, struct endpoint, struct service, 65536);  // captured service addresses
HASH(service_ids, __u32, struct endpoint, 65536);        // the way back, for MPTCP's getpeername
HASH(addresses, struct address, __u32, 262144);          // enrolled pods' addresses in the cluster → id
HASH(server_first, struct pod_port, __u32, 16384);       // ports whose server speaks first
HASH(probes, struct endpoint, __u64, 16384);             // (pod address, probe port) → netns cookie
HASH(proxies, __u64, __u32, 64);                         // cgroup id of an Envoy → generation
HASH(handovers, struct tuple, struct handover, 65536);   // never an LRU: a lost entry is a lost connection

// By netns cookie: when a local leg of Envoy last found no room for its hand-over, in ns since boot. An entry for every
// pod, allocated before: writing it cannot fail.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, __u64);
} lost_legs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 8192);
	__type(key, struct listener);
	__type(value, __u64);
} listeners SEC(".maps");

// The short circuit. Both are by the connection as the socket itself sees it. Entries of joined go with their sockets and
// are never deleted by anybody: bytes that wait in a socket would be lost with its entry.
HASH(peers, struct tuple, struct peer, 32768);
HASH(received, __u64, struct passed, 32768);             // by the socket's cookie

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 32768);
	__type(key, struct tuple);
	__type(value, __u64);
} joined SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SHORTCUT_COUNTERS);
	__type(key, enum shortcut_counter);
	__type(value, __u64);
} shortcuts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct socket_state);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct instance);
} config SEC(".maps");

// When the agent last said that it lives, in ns since boot; 0: it never did.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} seen SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, enum counter);
	__type(value, __u64);
} counters SEC(".maps");
