// sk_lookup, in a pod's netns: which socket a packet that belongs to no connection yet is for. One instance per pod,
// because the program type cannot ask for the netns it runs in; a shared one could not serve fe80:: addresses.

#define ABSENT -1

// Gives the packet to Envoy's listener of the pod's generation. ABSENT: there is none, nothing is decided.
INLINE int assign(struct bpf_sk_lookup *ctx, __u64 netns, __u32 generation, __u32 role, __u32 counter)
{
	struct listener key = { .netns = netns, .generation = generation, .role = role };
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &key);
	if (!sk)
		return ABSENT;
	long failed = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	if (failed)
		return ABSENT; // a listener of the other family
	count(counter);
	return SK_PASS;
}

INLINE int drop(__u32 counter)
{
	count(counter);
	return SK_DROP; // answered by RST
}

// How long a SYN of a local leg may still come: longer than Envoy tries to connect.
#define LEG_NS 15000000000ULL

// True for what may be a local leg that found no room for its hand-over. Envoy's inbound listener would make another leg
// of it, and so on for ever; so for as long as one may be on its way, nothing that the pod dials at itself is accepted.
INLINE bool is_lost_leg(__u64 netns, const __u32 *source)
{
	__u64 *lost = bpf_map_lookup_elem(&lost_legs, &netns);
	if (!lost || bpf_ktime_get_ns() - *lost > LEG_NS)
		return false;
	struct pod_address key = { .netns = netns };
	COPY(key.addr, source);
	return bpf_map_lookup_elem(&own, &key) != NULL;
}

INLINE int lookup_inbound(struct bpf_sk_lookup *ctx, __u64 netns, struct pod *pod, const __u32 *source, __u16 port)
{
	if (is_lost_leg(netns, source))
		return drop(COUNT_DROP_NO_HANDOVER);
	struct usage *usage = bpf_map_lookup_elem(&usages, &netns);
	if (usage && usage->incoming >= pod->limit) {
		__sync_fetch_and_add(&usage->refused_incoming, 1);
		return drop(COUNT_IN_REFUSED_LIMIT);
	}
	struct address peer;
	COPY(peer.word, source);
	bool open = !(pod->flags & POD_STRICT) && !bpf_map_lookup_elem(&addresses, &peer);
	struct pod_port key = { .netns = netns, .port = port };
	// The source picks the listener, it gives no authority: the inspectors of the other would delay the server's banner.
	if (open && bpf_map_lookup_elem(&server_first, &key)) {
		int verdict = assign(ctx, netns, pod->generation, ROLE_IN_FIRST, COUNT_IN_FIRST_ASSIGNED);
		if (verdict != ABSENT)
			return verdict;
	}
	int verdict = assign(ctx, netns, pod->generation, ROLE_IN, COUNT_IN_ASSIGNED);
	if (verdict != ABSENT)
		return verdict;
	if (!open && ((pod->flags & POD_STRICT) || !abandoned()))
		return drop(COUNT_DROP_NO_LISTENER); // Strict, or a peer that expects mTLS
	count(COUNT_IN_PLAIN);
	return SK_PASS; // Permissive: better plain than down
}

SEC("sk_lookup")
int lookup(struct bpf_sk_lookup *ctx)
{
	__u64 netns;
	PATCHED(netns);
	struct pod *pod = find_pod(netns);
	if (!pod)
		return SK_PASS; // on its way out
	if (pod->flags & POD_GATED)
		return drop(COUNT_DROP_GATED);
	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	struct tuple key = {
		.netns = netns,
		.source_port = bpf_ntohs(ctx->remote_port),
		.destination_port = ctx->local_port,
	};
	// The branches differ, or clang 14 sinks the loads into one that computes on ctx.
	if (ctx->family == AF_INET) {
		map_ipv4(key.source, ctx->remote_ip4);
		map_ipv4(key.destination, ctx->local_ip4);
		asm volatile("" ::: "memory");
	} else {
		asm volatile("r0 = 0" ::: "r0", "memory");
		key.source[0] = ctx->remote_ip6[0];
		key.source[1] = ctx->remote_ip6[1];
		key.source[2] = ctx->remote_ip6[2];
		key.source[3] = ctx->remote_ip6[3];
		key.destination[0] = ctx->local_ip6[0];
		key.destination[1] = ctx->local_ip6[1];
		key.destination[2] = ctx->local_ip6[2];
		key.destination[3] = ctx->local_ip6[3];
	}
	struct handover *value = bpf_map_lookup_elem(&handovers, &key);
	if (value && value->kind == KIND_OUT) {
		int verdict = assign(ctx, netns, pod->generation, ROLE_OUT, COUNT_OUT_ASSIGNED);
		return verdict == ABSENT ? drop(COUNT_DROP_NO_LISTENER) : verdict;
	}
	if (value && value->kind == KIND_LOCAL) {
		count(COUNT_LOCAL_LEG);
		return SK_PASS;
	}
	if (value && value->kind == KIND_PROBE)
		return SK_PASS;
	if (is_steering6(key.destination) || is_leg(key.source))
		return drop(COUNT_DROP_NO_HANDOVER);
	if (is_proxy_port(key.destination_port))
		return drop(COUNT_DROP_PROXY_PORT); // nobody but a hook leads there
	if (is_loopback(key.destination) || !(pod->flags & POD_INBOUND))
		return SK_PASS;
	return lookup_inbound(ctx, netns, pod, key.source, key.destination_port);
}
