package hostile

import "github.com/weftmesh/weft/test/hostile/attack"

// own is an attempt for whose ID the test has code of its own.
func own(id, what string, where Place, verdict Verdict, by ...Attacker) Attempt {
	return Attempt{ID: id, What: what, By: by, Where: where, Verdict: verdict, Shown: Here}
}

// alone is such an attempt that would disturb other tests.
func alone(id, what string, where Place, verdict Verdict, by ...Attacker) Attempt {
	return Attempt{ID: id, What: what, By: by, Where: where, Verdict: verdict, Shown: Alone}
}

// elsewhere is an attempt that another test makes.
func elsewhere(id, what string, where Place, verdict Verdict, shown string, by ...Attacker) Attempt {
	return Attempt{ID: id, What: what, By: by, Where: where, Verdict: verdict, Shown: shown}
}

func packets() []Attempt {
	syn := &attack.Segment{Seq: 1, Flags: attack.SYN}
	all := []Attempt{
		{ID: "spoof-syn4", What: "SYNs from the allowed pod's IPv4 address", By: outsiders, Where: Both, Verdict: Unheard, Shown: Here,
			Make: &attack.Attempt{Kind: "inject", From: "{allowed4}:40002", To: "{pod4}:9000", Segment: syn, Count: 3}, Uncontrolled: notReached},
		{ID: "spoof-syn6", What: "SYNs from the allowed pod's IPv6 address", By: outsiders, Where: Both, Verdict: Unheard, Shown: Here,
			Make: &attack.Attempt{Kind: "inject", From: "[{allowed6}]:40002", To: "[{pod6}]:9000", Segment: syn, Count: 3}, Uncontrolled: notReached},
		{ID: "blind-data", What: "data without a handshake", By: outsiders, Where: Both, Verdict: Unheard, Shown: Here,
			Make: &attack.Attempt{Kind: "inject", From: "{own4}:40003", To: "{pod4}:9000", Segment: &attack.Segment{Seq: 2, Ack: 2, Flags: attack.PSH | attack.ACK}, Send: []byte("{mark}\n"), Count: 3}, Uncontrolled: "no kernel takes it"},
		{ID: "blind-answer", What: "a SYN-ACK without a SYN", By: outsiders, Where: Both, Verdict: Unheard, Shown: Here,
			Make: &attack.Attempt{Kind: "inject", From: "{own4}:40004", To: "{pod4}:9000", Segment: &attack.Segment{Seq: 2, Ack: 2, Flags: attack.SYN | attack.ACK}, Count: 3}, Uncontrolled: "no kernel takes it"},
		{ID: "self-source", What: "a SYN from the pod's own address", By: outsiders, Where: Both, Verdict: Unheard, Shown: Here,
			Make: &attack.Attempt{Kind: "inject", From: "{pod4}:40005", To: "{pod4}:9000", Segment: syn, Count: 3}, Uncontrolled: "no kernel takes it"},
		{ID: "loopback-source", What: "a SYN from 127.0.0.1", By: outsiders, Where: Both, Verdict: Unheard, Shown: Here,
			Make: &attack.Attempt{Kind: "inject", From: "127.0.0.1:40006", To: "{pod4}:9000", Segment: syn, Count: 3}, Uncontrolled: "no kernel takes it"},
	}
	for _, family := range []string{"4", "6"} {
		how := map[string]string{"4": "ARP", "6": "neighbour discovery"}[family]
		all = append(all,
			own("stack-unused"+family, "a whole TCP connection past the attacker's kernel, from an address that nobody has, IPv"+family, SameNode, Closed, Stranger),
			own("stack-allowed"+family, "the same from the allowed pod's address, which "+how+" spoofing takes from it", SameNode, Closed, Stranger),
			own("stack-barred"+family, "the same by a pod of the mesh, past its own capture, IPv"+family, SameNode, Closed, Barred),
			own("inject-request"+family, "data with the right numbers into an allowed pod's connection, towards the server, IPv"+family, SameNode, Broken, Stranger),
			own("inject-answer"+family, "the same towards the client, IPv"+family, SameNode, Broken, Stranger),
			own("inject-reset"+family, "a reset with the right numbers, IPv"+family, SameNode, Broken, Stranger),
			own("claim-server"+family, "to be the server for an allowed pod, by "+how+" spoofing", SameNode, Ciphertext, Stranger),
			own("claim-gateway"+family, "to be the gateway for a pod of the mesh, by "+how+" spoofing", SameNode, Ciphertext, Stranger),
		)
	}
	return append(all,
		own("inject-across4", "data with the right numbers into an allowed pod's connection, IPv4", Across, Broken, Stranger),
		own("sniff", "to see other pods' traffic with AF_PACKET in the namespace of a pod whose Envoy is theirs too", Both, Unheard, Barred),
		own("inject-wrong", "data with numbers beyond the window", Across, Ignored, Stranger),
		Attempt{ID: "probe-arp", What: "ARP spoofing between a node and its pod during kubelet's probe (not tried)", By: []Attacker{Stranger}, Where: SameNode, Verdict: Open, Shown: byHand},
		Attempt{ID: "dns", What: "to take a mesh pod's DNS and what it calls outside the mesh, on a bridge without filters", By: []Attacker{Stranger}, Where: SameNode, Verdict: Open, Shown: byHand},
	)
}

// byHand: no test shows it; docs/SECURITY.md says so under "What is open".
const byHand = ""

func identity() []Attempt {
	return []Attempt{
		alone("reuse-stranger", "a stranger gets the addresses of an allowed pod that was deleted, and dials", SameNode, Closed, Stranger),
		alone("reuse-barred", "a pod of another account gets them, and dials", SameNode, Closed, Barred),
		alone("reuse-server", "a stranger gets the addresses of a server that was deleted, and waits for its clients", Both, Unheard, Stranger),
		own("nest-dial4", "dial the server from a user and network namespace of its own, IPv4", Inside, Closed, Stranger, Barred),
		own("nest-dial6", "dial the server from such namespaces, IPv6", Inside, Closed, Stranger, Barred),
		own("nest-steer", "dial a steering address from such namespaces", Inside, Closed, Stranger, Barred),
		own("nest-ports", "bind the proxy ports in such namespaces", Inside, Harmless, Stranger, Barred),
		own("nest-cgroup", "mount the control groups in such namespaces and join Envoy's", Inside, Closed, Stranger, Barred),
		elsewhere("identities", "to be shown to Envoy with another's SPIFFE ID", Both, Closed, "e2e.TestIdentities", Barred),
		elsewhere("sandbox", "a new sandbox of the pod goes on as the old one", Nowhere, Ignored, "barrier.TestLosses/a new sandbox voids the old one's standing"),
		elsewhere("other-netns", "to be enrolled with another pod's network namespace", Nowhere, Closed, "netns.TestHooks/Enrol refuses what cannot be a pod"),
		elsewhere("new-sandbox-netns", "another sandbox at the path of an enrolled one", Nowhere, Ignored, "netns.TestHooks/a pod's new sandbox is another pod"),
		elsewhere("contested", "a pod of the host's network, labelled", Nowhere, Closed, "e2e.TestRefusedPods/the host's network"),
		elsewhere("completed", "the identity of a pod that has ended", Nowhere, Closed, "ca.TestSign/a pod past its deletion and grace"),
		elsewhere("left-behind", "the SVID of an account whose last pod has left", Nowhere, Closed, "svid.TestNoSVIDStaysBehind"),
		elsewhere("long-id", "a SPIFFE ID that begins as the allowed one", Both, Closed, "e2e.TestAccessPolicy/allow a longer SPIFFE ID", Barred),
		elsewhere("keys-disk", "keys on disk, in logs, in objects, in Envoy's config dump", Nowhere, Closed, "e2e.TestSecrets"),
		elsewhere("app-envoy-uid", "an app under Envoy's user", Nowhere, Permission, "netns.TestHooks/nobody but Envoy binds a proxy port", Barred),
	}
}

func exhaustion() []Attempt {
	return []Attempt{
		alone("scan-stranger", "scan ports of the Strict pod from outside the mesh (make soak: all 65,535); Envoy's memory stays", Both, Bounded, Stranger),
		alone("scan-barred", "the same from a pod of the mesh, which its own Envoy captures", Both, Bounded, Barred),
		alone("hold-out", "20,000 connections from a pod of the mesh: 4,000 are made, the rest get EAGAIN and are counted", Both, Bounded, Barred),
		alone("hold-in", "20,000 silent connections from one stranger to one Permissive pod: 4,000 at a time are held", Both, Bounded, Stranger),
		alone("hold-fds", "to take all of Envoy's descriptors by them: fewer than its limit are open", Both, Bounded, Barred),
		alone("hosts", "2,000 requests with a Host and path of their own each: Envoy's memory and statistics stay", Both, Bounded, Barred),
		alone("slow-heads", "500 requests whose heads never end", Both, Bounded, Barred),
		elsewhere("limit-out", "more connections than the pod may make", Inside, Bounded, "e2e.TestConnectionLimit/outbound", Barred),
		elsewhere("limit-in", "more connections than a pod may take", Both, Bounded, "e2e.TestConnectionLimit/inbound", Stranger),
		elsewhere("eagain", "more than the limit, as the kernel counts", Inside, Bounded, "netns.TestHooks/a pod at its connection limit gets EAGAIN, others do not", Barred),
		elsewhere("accepts", "more accepted ones than the limit", Both, Bounded, "netns.TestHooks/a pod that accepts too many is closed until some end", Stranger),
		elsewhere("handovers", "a full map of connections on their way", Inside, Bounded, "netns.TestHooks/a full map of hand-overs refuses with EAGAIN", Barred),
		elsewhere("legs", "more local legs than twice the limit", Inside, Bounded, "netns.TestHooks/a pod's local legs are bounded", Stranger),
		elsewhere("clients", "12,000 client addresses, one request each", Both, Bounded, "datapath.TestManyClients", Stranger),
		elsewhere("source-ports", "more connections than there are source ports", Inside, Bounded, "netns.TestHooks/a pod holds more connections than it has source ports", Barred),
		elsewhere("backlog", "a full backlog of Envoy's", Inside, Bounded, "netns.TestHooks/a full backlog delays and loses nothing", Barred),
		elsewhere("crash-loop", "an Envoy that crashes again and again", Nowhere, Bounded, "envoy.TestCrashLoopBacksOff"),
		elsewhere("memory", "an Envoy that takes more memory than it may", Nowhere, Bounded, "envoy.TestMemoryLimit"),
		elsewhere("shortcut-full", "all places of the short circuit", Inside, Bounded, "netns.TestHooks/sockets that find no room in the short circuit stay on TCP", Barred),
		elsewhere("shortcut-others", "the short circuit of other pods", SameNode, Closed, "netns.TestHooks/only pods that have the short circuit are in it", Barred),
		elsewhere("fill-in", "to keep one pod's places for connections taken", Both, Open, byHand, Stranger),
		elsewhere("slow-readers", "connections that ask for much and read nothing", Both, Open, byHand, Barred),
	}
}

func crashes() []Attempt {
	return []Attempt{
		alone("theft4", "bind the proxy ports again and again while Envoy is killed, IPv4", Inside, Permission, Barred),
		alone("theft6", "the same, IPv6 with SO_REUSEPORT", Inside, Permission, Barred),
		alone("theft-dial", "dial the Strict pod all the time while its Envoy is killed", Both, Closed, Stranger, Barred),
		elsewhere("killed-banner", "wait for the banner of a server that speaks first while Envoy is killed", Both, Closed, "e2e.TestEnvoyKilled", Stranger),
		elsewhere("killed-kernel", "dial while no listener of Envoy's is there", Both, Closed, "netns.TestHooks/Strict without Envoy is closed", Stranger),
		elsewhere("killed-peer", "dial a Permissive pod without Envoy, from the mesh", Both, Closed, "netns.TestHooks/Permissive without Envoy is open, but not to enrolled peers", Barred),
		elsewhere("killed-supervisor", "dial while Envoy and its supervisor are killed", Both, Closed, "envoy.TestKilledSupervisorRefusesNobody", Stranger),
		elsewhere("killed-broker", "use an Envoy whose broker is killed", Nowhere, Closed, "envoy.TestBrokerKilled"),
		elsewhere("agent-killed", "dial while the agent is killed", Both, Closed, "e2e.TestFailures/AgentKilled", Stranger),
		elsewhere("agent-away", "dial while the agent is away", Both, Closed, "e2e.TestAgentAway", Stranger),
		elsewhere("controller-away", "use a Service for the first time while the controller is away", Both, Closed, "e2e.TestControllerAway", Barred),
		elsewhere("weft-gone", "dial a Strict pod of a node that weft is gone from", Both, Closed, "netns.TestHooks/where weft is gone from the node Permissive is open to all, and Strict to nobody", Stranger),
		elsewhere("new-pod", "dial a pod before it is enrolled", Both, Closed, "netns.TestHooks/a gated pod is closed until it is captured", Stranger),
		elsewhere("policy-change", "dial while a policy changes 1,000 times", Both, Denied, "e2e.TestHammer", Barred),
		elsewhere("narrowing", "go on with a connection that a narrower policy no longer allows", Both, Closed, "e2e.TestNarrowing", Barred),
		elsewhere("strict-cuts", "go on in plaintext after the pod became Strict", Both, Closed, "e2e.TestStrictCuts", Stranger),
		elsewhere("broken-policy", "a policy that cannot be compiled, to void the last", Both, Denied, "e2e.TestLastGoodForm", Barred),
		elsewhere("no-good-form", "a policy that never could be compiled", Both, Closed, "e2e.TestBadInput/invalid regex", Barred),
		elsewhere("unheld", "start while the node's agent is away", Nowhere, Open, byHand, Barred),
	}
}

func escapes() []Attempt {
	test := "envoy.TestEscapes"
	line := func(id, what string) Attempt { return elsewhere("escape-"+id, what, Nowhere, Permission, test) }
	return []Attempt{
		line("outside", "a socket in the namespace of a pod outside the mesh"),
		line("packet", "packet, raw, UDP, MPTCP and netlink sockets in a pod of the mesh"),
		line("families", "vsock, XDP, crypto and netlink sockets of its own"),
		line("namespaces", "enter a mount or user namespace, or make any"),
		line("supervisor", "read the supervisor's memory, environment and files, trace or signal it"),
		line("descriptors", "take another process's descriptors by pidfd"),
		line("processes", "fork, clone, clone3, another program"),
		line("kernel", "bpf, io_uring, perf, userfaultfd, keys"),
		line("confinement", "another filter, be dumped, outlive the supervisor"),
		line("mounts", "mount, change the root, make a device"),
		line("root", "become root, write the kernel's settings, read shadow"),
		elsewhere("escape-filter", "system calls by another architecture or with bits above 32", Nowhere, Closed, "envoy.TestFilter"),
		elsewhere("escape-key", "send the private keys that it holds", Nowhere, Closed, "envoy.TestNoKeyLeavesEnvoy"),
		elsewhere("escape-pods", "TCP sockets in the node's pods of the mesh", Nowhere, Open, byHand),
	}
}

func objects() []Attempt {
	return []Attempt{
		own("forged-enrolled", "conditions that say a stranger's pod is in the mesh", Both, Ignored, Stranger),
		own("forged-enforced", "conditions that say a pod of the mesh enforces what it does not, or not any more", Both, Ignored, Stranger),
		own("forged-other", "conditions that say the server's pod is not in the mesh", Both, Ignored, Stranger),
		elsewhere("forged-conditions", "the same, as the controller judges it", Nowhere, Ignored, "engine.TestForgedConditions"),
		own("slice-bare", "a slice of the attacker's namespace that names the server, called by a pod of the mesh", Both, Closed, Allowed),
		elsewhere("cluster-ip", "an externalIP that is another's ClusterIP", Both, Ignored, "e2e.TestAddressHijack", Stranger),
		elsewhere("route-namespace", "a route to a backend of another namespace", Both, Closed, "e2e.TestBadInput/backend in another namespace", Barred),
		elsewhere("meshconfig", "a second MeshConfig", Nowhere, Ignored, "e2e.TestBadInput/another MeshConfig"),
		elsewhere("opt-out", "leave the mesh by a label where the administrator forbids it", Both, Ignored, "e2e.TestPodOptOut", Barred),
		elsewhere("istio", "another sidecar in the pod", Nowhere, Closed, "enrol.TestNoOtherSidecarIsMade"),
		elsewhere("regex", "a regular expression of 300 characters", Nowhere, Closed, "e2e.TestBadInput/oversized value"),
		elsewhere("lists", "lists without end", Nowhere, Closed, "e2e.TestBadInput/oversized list"),
		elsewhere("bounds", "any field without a bound", Nowhere, Closed, "v1alpha1.TestEverythingIsBoundedAndDocumented"),
		elsewhere("duplicate", "two Services with the same key, to have all nodes refuse everything", Nowhere, Bounded, "resolve.TestServices"),
		elsewhere("probe-host", "a probe of its own pod with `host:` set to the Strict pod", SameNode, Open, byHand, Stranger),
	}
}

func processes() []Attempt {
	return []Attempt{
		own("unix", "Unix sockets of weft, Envoy, the runtime, by every path and name that a pod sees", Inside, Closed, Stranger, Barred),
		own("proxy-pod", "the node pod's own ports by TCP: but the metrics none answers", Both, Closed, Stranger, Barred),
		own("admin", "Envoy's admin interface and Go's profiles by the metrics port", Both, Closed, Stranger, Barred),
		own("controller-port", "the controller's port in plaintext, and by TLS without certificate", Both, Closed, Stranger, Barred),
		elsewhere("sockets", "files and sockets of weft on the node that everybody may use", Nowhere, Closed, "e2e.TestSockets"),
		elsewhere("agent-token", "the agent's token at the API server", Nowhere, Closed, "e2e.TestAgentRights"),
		elsewhere("node-rights", "capabilities that the node pod does not need", Nowhere, Closed, "e2e.TestNodeRights"),
		elsewhere("report-other", "an agent that reports on another node's pod", Nowhere, Ignored, "barrier.TestOnlyThePodsOwnNodeSpeaksForIt"),
		elsewhere("report-condition", "the same, in conditions", Nowhere, Ignored, "status.TestPodConditions"),
		elsewhere("report-as", "an agent that reports as another node, or without an identity", Nowhere, Closed, "reports.TestReports"),
		elsewhere("report-many", "an agent that reports pods or texts without end", Nowhere, Bounded, "reports.TestANodeIsBounded"),
		elsewhere("index-other", "an agent that asks for another node's pods", Nowhere, Closed, "serve.TestANodeGetsNoOtherNodesPods"),
		elsewhere("no-certificate", "discovery, reports and signatures without a certificate", Nowhere, Closed, "controlplane.TestStrangersMayOnlyBootstrap"),
		elsewhere("token-audience", "a pod's token of another audience for an SVID", Nowhere, Closed, "ca.TestBootstrap/wrong audience"),
		elsewhere("token-account", "a pod's own token for an agent's SVID", Nowhere, Closed, "ca.TestBootstrap/wrong service account"),
		elsewhere("token-name", "an account of the agent's name in another namespace", Nowhere, Closed, "ca.TestBootstrap/same account name in another namespace"),
		elsewhere("token-gone", "the token of an agent that is gone", Nowhere, Closed, "ca.TestBootstrap/a pod that is gone"),
		elsewhere("token-node", "an agent's token for another node", Nowhere, Closed, "ca.TestBootstrap/the pod lives on another node"),
		elsewhere("sign-node", "an agent that asks for an account whose pods are elsewhere", Nowhere, Closed, "ca.TestSign/the account's pods are on another node"),
		elsewhere("sign-out", "an agent that asks for an account outside the mesh", Nowhere, Closed, "ca.TestSign/the account's pod is not in the mesh"),
		elsewhere("sign-system", "an agent that asks for kube-system's or weft's own accounts", Nowhere, Closed, "ca.TestSign/an account of kube-system"),
		elsewhere("sign-path", "an account whose name would leave its path", Nowhere, Closed, "ca.TestSign/an account that would escape its path"),
		elsewhere("sign-key", "a request for a key that another holds", Nowhere, Closed, "ca.TestSign/a request whose key somebody else holds"),
		elsewhere("sign-workload", "a workload's SVID that signs", Nowhere, Closed, "ca.TestOnlyAgentsSign"),
		elsewhere("follow", "to follow the leader as a replica", Nowhere, Closed, "replica.TestOnlyReplicasFollow"),
		elsewhere("replica", "to be a replica by another SVID", Nowhere, Closed, "ca.TestOnlyReplicasAreReplicas"),
		elsewhere("behind", "a detached hook, from the node", Nowhere, Ignored, "netns.TestHooks/what is detached or replaced behind the agent's back shows, and is repaired"),
		elsewhere("kubelet-shared", "a process in kubelet's control group, to be taken for its probe", Nowhere, Closed, "netns.TestHooks/kubelet's probes pass only while nobody shares its cgroup"),
		elsewhere("kubelet-port", "kubelet's own connection to a port that is no probe's", Nowhere, Closed, "netns.TestHooks/kubelet reaches probe ports under Strict, nobody else does"),
		elsewhere("bootstrap-flood", "Bootstrap requests without end", Nowhere, Open, byHand, Stranger),
	}
}
