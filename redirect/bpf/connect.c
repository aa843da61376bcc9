// cgroup/connect4 and connect6, at the cgroup root: decides about every connect(2) of an enrolled pod, of Envoy, and of
// kubelet. IPv4-mapped destinations arrive at connect6.

// Makes the per-connection state, or refuses with EAGAIN: the app may try again, nothing slips by uncaptured.
INLINE struct socket_state *reserve(struct bpf_sock_addr *ctx, __u64 netns)
{
	struct socket_state *state = bpf_sk_storage_get(&sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	__u64 cookie = bpf_get_socket_cookie(ctx);
	// The source port is not known before sockops runs, where refusing is no longer possible: try the room now.
	struct tuple key = { .netns = netns, .source = { cookie, cookie >> 32 } };
	struct handover value = {};
	if (state && !bpf_map_update_elem(&handovers, &key, &value, BPF_ANY)) {
		bpf_map_delete_elem(&handovers, &key);
		return state;
	}
	count(COUNT_OUT_REFUSED_FULL);
	bpf_set_retval(-EAGAIN);
	return NULL;
}

// A connect from the node's own netns: kubelet may reach probe ports, everybody else is a stranger like any other.
INLINE int connect_from_node(struct bpf_sock_addr *ctx, const __u32 *addr, __u16 port, struct instance *set)
{
	struct endpoint to = { .port = port };
	COPY(to.addr, addr);
	__u64 *netns = bpf_map_lookup_elem(&probes, &to);
	if (!netns || !set->kubelet_cgroup || bpf_get_current_cgroup_id() != set->kubelet_cgroup)
		return PASS;
	struct socket_state *state = reserve(ctx, *netns);
	if (!state)
		return REFUSE;
	state->kind = KIND_PROBE;
	state->netns = *netns;
	count(COUNT_PROBE);
	return PASS;
}

// A connect of Envoy inside an enrolled pod. Its tag says which leg it is; only a local leg reaches the pod itself
// without passing Envoy's inbound listener, and an untagged one would come back to Envoy for ever.
INLINE int connect_from_proxy(struct bpf_sock_addr *ctx, const __u32 *addr, __u16 port, __u64 netns,
			      struct pod *pod, struct socket_state *state, bool named)
{
	struct pod_address key = { .netns = netns };
	COPY(key.addr, addr);
	bool unreachable = is_loopback(addr) || is_steering6(addr);
	bool mine = bpf_map_lookup_elem(&own, &key) != NULL;
	__u32 tag = state ? state->tag >> 16 : 0;

	if (unreachable || (mine && is_proxy_port(port)))
		goto refuse;
	if (tag == TAG_LOCAL_LEG) {
		if (!mine)
			goto refuse;
		// A client's idle legs outlive its connection, and another address makes others: half of them at most are idle.
		__u64 *open = bpf_map_lookup_elem(&legs, &netns);
		if (open && *open >= 2 * (__u64)pod->limit) {
			count(COUNT_LEG_REFUSED_LIMIT);
			bpf_set_retval(-EAGAIN);
			return REFUSE;
		}
		state = reserve(ctx, netns);
		if (!state)
			return REFUSE;
		if (!named) {
			state->addr[0] = 0;
			state->addr[1] = 0;
			state->addr[2] = 0;
			state->addr[3] = 0;
		}
		state->kind = KIND_LOCAL;
		state->netns = netns;
		return PASS;
	}
	if (tag != TAG_OUTBOUND_LEG && mine)
		goto refuse;
	return PASS; // an outbound leg, judged where it arrives, be it this very pod
refuse:
	count(COUNT_REFUSED_PROXY_CONNECT);
	return REFUSE;
}

// Where a captured destination is steered to; false: this destination is none of ours.
INLINE bool find_destination(const __u32 *addr, __u16 port, struct service *found)
{
	struct endpoint to = { .port = port };
	COPY(to.addr, addr);
	struct service *service = bpf_map_lookup_elem(&services, &to);
	if (service) {
		*found = *service;
		return true;
	}
	struct address peer;
	COPY(peer.word, addr);
	__u32 *id = bpf_map_lookup_elem(&addresses, &peer);
	if (!id)
		return false;
	found->id = *id;
	found->port = PORT_OUT_POD;
	return true;
}

// True where Envoy listens for what the pod's apps dial.
INLINE bool is_served(__u64 netns, __u32 generation)
{
	struct listener key = { .netns = netns, .generation = generation, .role = ROLE_OUT };
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &key);
	if (sk)
		bpf_sk_release(sk);
	return sk != NULL;
}

// A connect of an app in an enrolled pod. Rewrites addr and port and sets *steered if Envoy is to have it.
INLINE int connect_from_app(struct bpf_sock_addr *ctx, __u32 *addr, __u16 *port, __u64 netns, struct pod *pod,
			    bool *steered)
{
	if (is_proxy_port(*port)) {
		struct pod_address key = { .netns = netns };
		COPY(key.addr, addr);
		if (is_loopback(addr) || is_steering6(addr) || bpf_map_lookup_elem(&own, &key)) {
			count(COUNT_REFUSED_PROXY_PORT);
			return REFUSE;
		}
	}
	if (is_leg(addr)) {
		count(COUNT_REFUSED_LEG_ADDRESS);
		return REFUSE;
	}
	if (is_loopback(addr) || !(pod->flags & POD_OUTBOUND))
		return PASS;
	bool ipv4 = is_ipv4(addr);
	if (!(pod->flags & (ipv4 ? POD_IPV4 : POD_IPV6)))
		return PASS; // the pod has no such address: the connect fails by itself
	struct service to;
	if (!find_destination(addr, *port, &to))
		return PASS; // no mesh feature needs it
	if (!(pod->flags & POD_STRICT) && abandoned() && !is_served(netns, pod->generation)) {
		count(COUNT_OUT_PLAIN);
		return PASS;
	}

	struct usage *usage = bpf_map_lookup_elem(&usages, &netns);
	if (usage && usage->outgoing >= pod->limit) {
		__sync_fetch_and_add(&usage->refused_outgoing, 1);
		count(COUNT_OUT_REFUSED_LIMIT);
		bpf_set_retval(-EAGAIN);
		return REFUSE;
	}
	struct socket_state *state = reserve(ctx, netns);
	if (!state)
		return REFUSE;
	if (ctx->sk->bound_dev_if) { // Envoy is reached by lo alone
		char none[4] = {};
		count(COUNT_OUT_DEVICE_CLEARED);
		if (bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, none, sizeof(none)))
			return REFUSE;
	}
	COPY(state->addr, addr);
	state->port = *port;
	state->kind = KIND_OUT;
	state->netns = netns;
	if (ipv4) {
		map_ipv4(addr, STEER4 | bpf_htonl(to.id & STEER4_HOST));
	} else {
		addr[0] = STEER6;
		addr[1] = 0;
		addr[2] = 0;
		addr[3] = bpf_htonl(to.id);
	}
	*port = to.port;
	*steered = true;
	count(COUNT_OUT_CAPTURED);
	return PASS;
}

INLINE int connect(struct bpf_sock_addr *ctx, __u32 *addr, __u16 *port, bool *steered)
{
	__u32 zero = 0;
	struct instance *set = bpf_map_lookup_elem(&config, &zero);
	if (!ctx->sk || !set)
		return PASS;
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = find_pod(netns);
	bool proxy = in_proxy();
	if (!pod && proxy) { // Envoy's own netns holds nothing to reach; nor does a pod that left
		count(COUNT_REFUSED_PROXY_CONNECT);
		return REFUSE;
	}
	if (!pod && set->node_netns && netns != set->node_netns)
		return PASS;
	// connect(AF_UNSPEC) and a failed connect run no hook: what the socket was before ends here.
	struct socket_state *state = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);
	bool named = state && state->kind == KIND_LEG;
	if (state)
		state->kind = KIND_NONE;
	if (pod && (pod->flags & POD_GATED) && !proxy) {
		count(COUNT_REFUSED_GATED);
		return REFUSE;
	}
	if (ctx->protocol != IPPROTO_TCP)
		return PASS; // of MPTCP the subflow comes by itself, as TCP
	if (!pod)
		return connect_from_node(ctx, addr, *port, set);
	if (proxy)
		return connect_from_proxy(ctx, addr, *port, netns, pod, state, named);
	return connect_from_app(ctx, addr, port, netns, pod, steered);
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	__u32 addr[4];
	__u16 port = bpf_ntohs(ctx->user_port);
	bool steered = false;
	map_ipv4(addr, ctx->user_ip4);
	int verdict = connect(ctx, addr, &port, &steered);
	if (steered) {
		ctx->user_ip4 = addr[3];
		ctx->user_port = bpf_htons(port);
	}
	return verdict;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	__u32 addr[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };
	__u16 port = bpf_ntohs(ctx->user_port);
	bool steered = false;
	int verdict = connect(ctx, addr, &port, &steered);
	if (steered) {
		COPY(ctx->user_ip6, addr);
		ctx->user_port = bpf_htons(port);
	}
	return verdict;
}
