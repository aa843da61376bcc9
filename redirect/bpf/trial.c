// sk_msg on one connection of the loader's own (shortcut_trial.go), which tries how this kernel counts what it redirects:
// a single byte stays on TCP and leaves the sender's copied_seq in trial_seen, anything longer goes to the other socket.

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} trial_joined SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} trial_seen SEC(".maps");

#define TRIAL_READER 1

SEC("sk_msg")
int trial_verdict(struct sk_msg_md *ctx)
{
	__u32 reader = TRIAL_READER, zero = 0;
	struct bpf_sock *sk = ctx->sk;
	if (!sk)
		return SK_PASS;
	if (ctx->size > 1) {
		bpf_msg_redirect_hash(ctx, &trial_joined, &reader, BPF_F_INGRESS);
		return SK_PASS;
	}
	struct tcp_sock *self = bpf_skc_to_tcp_sock(sk);
	__u32 *seen = bpf_map_lookup_elem(&trial_seen, &zero);
	if (self && seen)
		*seen = self->copied_seq;
	return SK_PASS;
}
