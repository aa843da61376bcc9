// Umbrella of the short circuit: sk_msg and stream_verdict programs on the sockets in the map joined, which sockops.c
// fills. An object of its own, because it reads the kernel's structures (CO-RE): a kernel that it does not fit has the
// mesh all the same.
#include <linux/bpf.h>
#include <stdbool.h>
#include <stddef.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "types.h"
#include "maps.h"
#include "inline.h"
#include "kernel.h"

#include "msg.c"
#include "verdict.c"
#include "trial.c"

char LICENSE[] SEC("license") = "GPL";
