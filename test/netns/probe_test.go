package netns

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/redirect"
)

func inProbes(t *testing.T) {
	var kubelet, other *hand
	var node *space
	w, p, _ := serving(t, func(c *redirect.Config) {
		kubelet = newHand(t, cgroupBase, unique("kubelet"))
		other = newHand(t, cgroupBase, unique("other"))
		node = newSpace(t, "probing")
		c.NodeNetns, c.KubeletCgroup = node.path, kubelet.cgroup
	})
	wire(t, node, p.space, "p", "probed", func(l netlink.Link) error {
		return errors.Join(address(l, "10.88.0.1/24"), address(l, "fd88::1/64"), route(l, podIPv4+"/32", "10.88.0.2"), route(l, podIPv6+"/128", "fd88::2"))
	}, func(l netlink.Link) error {
		return errors.Join(address(l, "10.88.0.2/24"), address(l, "fd88::2/64"))
	})
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true, Probes: []uint16{8080}}))
	who := func(h *hand, from *space, to string) string {
		r := h.dial(from, to, 0)
		if r.Error != "" {
			return r.Error
		}
		return r.Greeting.By
	}
	want := func(h *hand, from *space, to, by string) {
		t.Helper()
		if got := who(h, from, to); got != by {
			t.Errorf("%s dialled %s: %s, want %s", h.cgroup, to, got, by)
		}
	}
	for _, cookies := range []string{"1", "2"} {
		p.sysctl("ipv4/tcp_syncookies", cookies)
		for _, to := range appAddresses {
			want(kubelet, node, to, "app")
			want(other, node, to, "in")
		}
	}
	want(kubelet, node, podIPv4+":9090", "in")         // not a probe's port
	want(kubelet, w.node, podIPv4+":8080", "in")       // not the node's netns
	w.unlisten(w.envoy, p, 0)                          // Envoy is away
	want(kubelet, node, appAddresses[0], "app")        // the pod stays ready
	want(other, node, appAddresses[0], "ECONNREFUSED") // and closed
	want(kubelet, node, podIPv4+":9090", "ECONNREFUSED")
	w.listen(w.envoy, p, 0)
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true}))
	want(kubelet, node, appAddresses[0], "in") // no probe any more
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true, Probes: []uint16{8080}}))

	// kubelet starts again: its cgroup has the same name and another number.
	kubelet.kill()
	w.ok(os.Remove(kubelet.cgroup))
	again := newHand(t, cgroupBase, filepath.Base(kubelet.cgroup))
	want(again, node, appAddresses[0], "in") // the kernel counts on: no number comes twice
	_, err := w.redirect.Sweep(0)
	w.ok(err)
	want(again, node, appAddresses[0], "app")
}

func inProbesShared(t *testing.T) {
	dir := filepath.Join(cgroupBase, unique("kubelet"))
	w, p, stranger := serving(t, func(c *redirect.Config) { c.KubeletCgroup = dir })
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true, Probes: []uint16{8080}}))
	refused := func(shared bool) {
		t.Helper()
		if err := w.redirect.ProbesRefused(); err == nil || errors.Is(err, redirect.ErrKubeletShared) != shared {
			t.Errorf("probes are refused for %v", err)
		}
	}
	probe := func(h *hand, want string) {
		t.Helper()
		if r := h.dial(stranger.space, appAddresses[0], 0); r.Error != "" || r.Greeting.By != want {
			t.Errorf("dialled %s from kubelet's cgroup: %q %s, want %s", appAddresses[0], r.Greeting.By, r.Error, want)
		}
	}
	refused(false) // a cgroup that is not there yet is no fault
	w.ok(os.Mkdir(dir, 0o755))
	w.sweep()
	refused(false) // nor is one without a process
	kubelet := newHand(t, cgroupBase, filepath.Base(dir))
	probe(kubelet, "in")
	w.sweep()
	probe(kubelet, "app")
	w.ok(w.redirect.ProbesRefused())

	other := newHand(t, cgroupBase, filepath.Base(dir))
	w.sweep() // it may be a child of kubelet's that ends at once
	probe(kubelet, "app")
	w.sweep()
	refused(true)
	probe(kubelet, "in")
	probe(other, "in")
	w.ok(w.redirect.Close())
	w.load()
	refused(true) // an agent that starts opens nothing that is shared
	probe(kubelet, "in")
	other.kill()
	w.sweep()
	w.ok(w.redirect.ProbesRefused())
	probe(kubelet, "app")

	// The agent's container sees no process of the host, and counts them all the same.
	inside := newHandIn(t, cgroupBase, unique("inside"), unix.CLONE_NEWPID)
	look := order{Do: "probes", To: cgroupBase, Netns: filepath.Join(scratch, "bpf", unique("inside")), Kubelet: dir}
	inside.must(look)
	newHand(t, cgroupBase, filepath.Base(dir))
	if r := inside.do(look); !strings.Contains(r.Error, redirect.ErrKubeletShared.Error()) {
		t.Errorf("seen from another PID namespace: %q", r.Error)
	}
}

func inProbesOfTheRoot(t *testing.T) {
	root, err := findCgroup2()
	if err != nil {
		t.Fatal(err)
	}
	w, p, stranger := serving(t, func(c *redirect.Config) { c.KubeletCgroup = root })
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true, Probes: []uint16{8080}}))
	if err := w.redirect.ProbesRefused(); !errors.Is(err, redirect.ErrKubeletShared) {
		t.Errorf("kubelet in the root cgroup: %v", err)
	}
	host := newHand(t, root, cgroupPrefix+unique("host"))
	w.ok(os.WriteFile(filepath.Join(root, "cgroup.procs"), []byte(strconv.Itoa(host.cmd.Process.Pid)), 0))
	for range 2 {
		if r := host.dial(stranger.space, appAddresses[0], 0); r.Error != "" || r.Greeting.By != "in" {
			t.Errorf("a process of the root cgroup dialled a probe's port: %q %s, want in", r.Greeting.By, r.Error)
		}
		w.sweep()
	}
}

func inProbesByCgroup(t *testing.T) {
	var kubelet, other *hand
	w, p, stranger := serving(t, func(c *redirect.Config) {
		kubelet = newHand(t, cgroupBase, unique("kubelet"))
		other = newHand(t, cgroupBase, unique("other"))
		c.KubeletCgroup = kubelet.cgroup
	})
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true, Probes: []uint16{8080}}))
	for _, c := range []struct {
		h        *hand
		to, want string
	}{{kubelet, appAddresses[0], "app"}, {kubelet, appAddresses[1], "app"}, {kubelet, podIPv4 + ":9090", "in"}, {other, appAddresses[0], "in"}} {
		if r := c.h.dial(stranger.space, c.to, 0); r.Error != "" || r.Greeting.By != c.want {
			t.Errorf("%s dialled %s: %q %s, want %s", c.h.cgroup, c.to, r.Greeting.By, r.Error, c.want)
		}
	}
}
