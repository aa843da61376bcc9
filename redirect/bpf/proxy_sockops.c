// sockops, at Envoy's own cgroup: the only way into the listeners map, and the count of inbound connections, which the
// one at the root takes back: it stays while a generation that left still has open connections. This one runs before it.
// One instance per generation.

INLINE void on_listen(struct bpf_sock_ops *ctx)
{
	__u64 generation;
	PATCHED(generation);
	__u32 port = ctx->local_port;
	if (!is_proxy_port(port))
		return;
	__u32 offset = port - PORT_FIRST;
	if (offset / GENERATION_ROW != (generation & 1))
		return; // another generation's row: this one would steal its connections
	struct listener key = {
		.netns = bpf_get_netns_cookie(ctx),
		.generation = generation,
		.role = offset % GENERATION_ROW,
	};
	if (!find_pod(key.netns))
		return;
	long failed = bpf_sock_hash_update(ctx, &listeners, &key, BPF_ANY);
	count(failed ? COUNT_LISTENER_FAILED : COUNT_LISTENER_ADDED);
}

INLINE void on_proxy_accept(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct tuple key = { .netns = bpf_get_netns_cookie(ctx) };
	if (!sk || !find_pod(key.netns))
		return;
	if (!read_ends(ctx, key.destination, key.source, &key.destination_port, &key.source_port))
		return;
	if (bpf_map_lookup_elem(&handovers, &key))
		return; // outbound, counted at the client's end
	struct socket_state *state = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	struct usage *usage = bpf_map_lookup_elem(&usages, &key.netns);
	if (!state || !usage || state->counted)
		return;
	__sync_fetch_and_add(&usage->incoming, 1);
	state->kind = KIND_IN_ACCEPTED;
	state->netns = key.netns;
	state->counted = 1;
	watch_close(ctx);
}

SEC("sockops")
int proxy_socket_ops(struct bpf_sock_ops *ctx)
{
	__u32 op = ctx->op;
	if (op == BPF_SOCK_OPS_TCP_LISTEN_CB)
		on_listen(ctx);
	else if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		on_proxy_accept(ctx);
	return 1;
}
