// cgroup/bind4, bind6, post_bind4 and post_bind6, at the cgroup root: only Envoy binds a stream socket to a proxy port
// of an enrolled pod. post_bind sees ports that the kernel chose; listen(2) without bind runs no hook, which
// net.ipv4.ip_local_reserved_ports covers.

INLINE int bind(void *ctx, __u32 type, __u32 port)
{
	if (type != SOCK_STREAM || !is_proxy_port(port))
		return PASS;
	__u64 netns = bpf_get_netns_cookie(ctx);
	if (!find_pod(netns) || in_proxy())
		return PASS;
	count(COUNT_REFUSED_BIND);
	return REFUSE;
}

SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx)
{
	return bind(ctx, ctx->type, bpf_ntohs(ctx->user_port));
}

SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx)
{
	return bind(ctx, ctx->type, bpf_ntohs(ctx->user_port));
}

SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *ctx)
{
	return bind(ctx, ctx->type, ctx->src_port);
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *ctx)
{
	return bind(ctx, ctx->type, ctx->src_port);
}
