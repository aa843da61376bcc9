package netns

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/redirect"
)

// The cgroup of one node may lie inside another's: hooks of both run for the inner one's processes.
func TestOneInstanceBelowTheCgroupRootOfAnother(t *testing.T) {
	inner := filepath.Join(cgroupBase, unique("inner"))
	if err := os.Mkdir(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(inner) })
	below := func(c *redirect.Config) { c.CgroupRoot = inner }

	outerWorld, outerPod := capturing(t)
	innerWorld, innerPod := capturing(t, below)
	app := newHand(t, inner, "app") // a process of the inner node
	stranger := innerWorld.pod("x", strangerIPv4, strangerIPv6)
	app.must(order{Do: "listen", By: "app", Netns: innerPod.path, Port: 8080})

	for _, to := range []string{serviceIPv4, serviceIPv6} {
		for _, p := range []*pod{outerPod, innerPod} {
			// Each pod by its own instance: the outer root holds the inner one's processes too.
			if r := app.dial(p.space, to, 0); r.Error != "" || r.Greeting.By != "out" || r.Greeting.Original.String() != to || r.Peer.String() != to {
				t.Errorf("the inner node's app dialled %s in %s: %+v", to, p.uid, r)
			}
		}
		outerPod.reaches(t, to)
		// This process is not the inner node's: its hooks do not see it, the outer ones leave the pod alone.
		if _, err := innerPod.dial(to); err == nil {
			t.Errorf("a process outside the inner root was captured in its pod")
		}
	}
	relayed(t, stranger, appAddresses[0])
	before := outerWorld.counter("in_assigned")
	if before != 0 {
		t.Errorf("the outer instance assigned %d connections of the inner one's pod", before)
	}
	if err := innerWorld.redirect.AttachProxy(5, outerWorld.envoy.cgroup); err == nil {
		t.Error("an Envoy outside the cgroup root was attached")
	}
	outerPod.reset()
	if err := outerWorld.redirect.Release(true); err != nil {
		t.Fatal(err)
	}
	if r := app.dial(innerPod.space, serviceIPv4, 0); r.Greeting.By != "out" {
		t.Errorf("after the outer instance was released: %+v", r)
	}
	relayed(t, stranger, appAddresses[1])
	outerWorld.load()
}

// Load without rights says which, and attaches nothing.
func TestLoadWithoutRightsNamesThem(t *testing.T) {
	h := newHand(t, cgroupBase, unique("unprivileged"), unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN)
	pins := filepath.Join(scratch, "bpf", unique("unprivileged"))
	r := h.do(order{Do: "load", To: cgroupBase, Netns: pins})
	if !strings.Contains(r.Error, "lacks CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN") {
		t.Errorf("load without rights: %s", r.Error)
	}
	if _, err := os.Stat(pins); !os.IsNotExist(err) {
		t.Error("a failed load left", pins)
	}
}

// Container runtimes mount /proc/sys read-only; the agent's container is no exception.
func TestEnrolWhereProcSysIsReadOnly(t *testing.T) {
	w := newWorld(t)
	w.services()
	p := w.pod("a", podIPv4, podIPv6)
	if err := unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount("/proc/sys", unix.MNT_DETACH) })
	if err := unix.Mount("", "/proc/sys", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if err := p.run(func() error { return os.WriteFile("/proc/sys/net/ipv4/tcp_migrate_req", []byte("0"), 0) }); err == nil {
		t.Fatal("/proc/sys is writable: this test shows nothing")
	}
	w.enrol(p)
	if got := p.readSysctl("ipv4/ip_local_reserved_ports"); got != "15000-15019" {
		t.Errorf("reserved ports are %q", got)
	}
	p.reaches(t, serviceIPv6)
	p.reset()
	w.settled(p)
	w.withdrawn(p)
}
