package netns

import "testing"

// cases is the whole table; every case makes worlds of its own. The names are what must hold.
var cases = []struct {
	name string
	run  func(t *testing.T)
}{
	// out_test.go, handshake_test.go, many_test.go: what apps dial
	{"an app's connection to a service reaches Envoy with its destination", outReachesEnvoy},
	{"an IPv4-mapped destination is captured like IPv4", outMapped},
	{"an IPv6-only pod is captured", outIPv6Only},
	{"an IPv4-only pod is captured", outIPv4Only},
	{"a pod whose lo lacks ::1 is captured", outLoopbackWithoutAddress},
	{"a pod with lo.disable_ipv6 is captured, and gets it back", outLoopbackWithoutIPv6},
	{"TCP fast open carries its data to Envoy", outFastOpen},
	{"MPTCP falls back and shows the address dialled", outMultipath},
	{"a non-blocking connect behaves as ever", outNonBlocking},
	{"a socket refused once connects elsewhere", outAfterRefusal},
	{"connect to AF_UNSPEC clears what was before", outUnspec},
	{"one source port reaches two services", outOneSourcePort},
	{"a pod holds more connections than it has source ports", outMany},
	{"a source address of the app's choice stays", outSourceAddress},
	{"SO_BINDTODEVICE is cleared and counted", outDevice},
	{"a destination that is no service is left alone", outUntouched},
	{"UDP to a service address is left alone", outUDP},
	{"an enrolled pod's address is captured as TCP", outPodAddress},
	{"the steering port is the class", outClass},
	{"without a listener of Envoy a captured connect is refused", outNoListener},
	{"what waits for Envoy goes on where its container is another", outOtherContainer},
	{"where weft is gone from the node a captured connect goes as without weft, but not a Strict pod's", outAbandoned},
	{"a client that closes before Envoy accepts leaves nothing", outClosedEarly},
	{"SYN cookies do not lose the destination", outSynCookies},
	{"a full backlog delays and loses nothing", outFullBacklog},
	{"a lost SYN-ACK delays and loses nothing", outLostSynAck},
	{"another namespace of the node is left alone", outForeignNetns},

	// in_test.go, probe_test.go: what others dial
	{"every address of the pod leads to Envoy, and by the local leg to the app", inReachesEnvoy},
	{"fe80:: addresses and second interfaces lead to Envoy", inEveryAddress},
	{"SYN cookies and a full backlog do not open the pod", inSynCookies},
	{"Strict without Envoy is closed", inStrictWithoutEnvoy},
	{"Permissive without Envoy is open, but not to enrolled peers", inPermissiveWithoutEnvoy},
	{"where weft is gone from the node Permissive is open to all, and Strict to nobody", inAbandoned},
	{"a server that speaks first gets the listener without inspectors", inServerFirst},
	{"proxy ports are refused to everybody", inProxyPortsDialled},
	{"nobody but Envoy binds a proxy port", inProxyPortsBound},
	{"steering addresses lead nowhere without a connect", inSteeringAddresses},
	{"Envoy's legs are judged by their tag", inTags},
	{"kubelet reaches probe ports under Strict, nobody else does", inProbes},
	{"where the node's netns is not named, kubelet is known by its cgroup alone", inProbesByCgroup},
	{"kubelet's probes pass only while nobody shares its cgroup", inProbesShared},
	{"a kubelet in the root cgroup gets no probe through", inProbesOfTheRoot},

	// client_test.go: whom the app sees
	{"the app sees its client's address, whichever family it listens in", clientShown},
	{"where apps are to see their own address they do, from the next connection on", clientOwn},
	{"local legs come from one address per client, and from no other port twice", clientLegs},
	{"nobody but Envoy's local legs has a leg's address", clientLegAddresses},
	{"a client's address that no local leg brought counts for nothing", clientForged},
	{"a local leg that lost its hand-over is dropped, and nobody else", clientLost},
	{"a client that could not be noted is shown as the pod, never as the loopback", clientUnknown},
	{"a pod's local legs are bounded", clientLimit},

	// limit_test.go: full maps
	{"a full map of hand-overs refuses with EAGAIN", fullHandovers},
	{"a map that fills up between two hooks loses a connection, never loops it", fullBetweenHooks},
	{"a pod at its connection limit gets EAGAIN, others do not", fullConnections},
	{"a pod that accepts too many is closed until some end", fullIncoming},
	{"services beyond the limit are refused by name", fullServices},
	{"addresses beyond the limit are refused by name", fullAddresses},
	{"a pod beyond the limit is refused and untouched", fullPods},
	{"every other full map is named", fullOthers},
	{"a listener that finds no room, or cannot be held, is counted and closed", fullListeners},
	{"a service that finds no room for its steering id is refused", fullServiceIDs},

	// life_test.go, drift_test.go, release_test.go, load_test.go: enrolment and its end
	{"a gated pod is closed until it is captured", lifeGate},
	{"Enrol refuses what cannot be a pod", lifeRefusals},
	{"two generations of Envoy listen and one map update flips", lifeFlip},
	{"a pod enters and leaves under load and loses nothing", lifeUnderLoad},
	{"a killed Envoy closes, a new one opens", lifeEnvoyKilled},
	{"an agent that starts again finds everything", lifeAgentRestart},
	{"a changed program is replaced in place", lifeProgramReplaced},
	{"what is detached or replaced behind the agent's back shows, and is repaired", lifeDrift},
	{"what is changed in the maps shows", lifeMapsChanged},
	{"services changed behind the agent's back are put back", lifeServicesChanged},
	{"Withdraw lets open connections end", lifeWithdraw},
	{"Withdraw leaves reserved what the pod had reserved itself", lifeReservedPorts},
	{"a pod's new sandbox is another pod", lifeNewSandbox},
	{"Release needs the pins alone and leaves no BPF object", lifeRelease},
	{"Release lets open connections go on in Envoy", lifeReleaseInUse},
	{"Release spares nothing when no Envoy is left", lifeReleaseAfterEnvoy},
	{"pins of another boot are released", lifeBoot},
	{"a failed Load leaves the node untouched", lifeLoadFails},
	{"a Load that fails half-way gives replaced programs back", lifeLoadUndone},

	// shortcut*_test.go: payload past TCP
	{"the short circuit keeps every byte in order, both ways at once", shortcutBothWays},
	{"the short circuit is switched under load and loses nothing", shortcutSwitched},
	{"without what keeps order in the short circuit these tests fail", shortcutControl},
	{"only pods that have the short circuit are in it", shortcutOthers},
	{"what TCP brings twice is read once", shortcutAgain},
	{"a slow reader of the short circuit holds its sender back", shortcutSlowReader},
	{"half-closed connections stay in the short circuit", shortcutHalfClose},
	{"a reset comes after what was sent by the short circuit", shortcutReset},
	{"a reader that closes on unread bytes of the short circuit shows as an end", shortcutClosedUnread},
	{"a killed Envoy loses nothing that it had sent by the short circuit", shortcutKilled},
	{"an agent that starts again keeps the short circuit", shortcutRestart},
	{"the short circuit's programs are taken off under load, which shows and is repaired", shortcutDetached},
	{"sockets that find no room in the short circuit stay on TCP", shortcutFull},
	{"nothing that waits in the short circuit is lost when a pod leaves it", shortcutReleased},
	{"FIONREAD, MSG_PEEK, MSG_WAITALL and epoll work in the short circuit", shortcutCalls},
	{"splice finds nothing in the short circuit", shortcutSplice},
	{"sends by MSG_ZEROCOPY never end in the short circuit", shortcutZerocopy},
	{"a read in the short circuit that a signal interrupts ends with EAGAIN", shortcutSignal},
	{"what an MPTCP listener accepts joins the short circuit", shortcutMultipath},
}

// TestHooks: two nodes of one kernel, with the same addresses and the same cgroup root, run the table side by side, which contains
// what one alone shows.
func TestHooks(t *testing.T) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			for _, side := range []string{"left", "right"} {
				t.Run(side, func(t *testing.T) {
					t.Parallel()
					c.run(t)
				})
			}
		})
	}
}
