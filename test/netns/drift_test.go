package netns

import (
	"encoding/binary"
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
)

// foreign loads a program that does nothing, to stand in for one of another version.
func foreign(t testing.TB, kind ebpf.ProgramType, attach ebpf.AttachType) *ebpf.Program {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: kind, AttachType: attach, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return program
}

// pinned opens a link of the instance.
func (w *world) pinned(parts ...string) link.Link {
	w.t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(append([]string{w.pins}, parts...)...), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
	return l
}

func (w *world) cookie(p *pod) string {
	w.t.Helper()
	state, err := w.redirect.Verify(p.uid)
	if err != nil {
		w.t.Fatal(err)
	}
	return strconv.FormatUint(state.Pod.Cookie, 10)
}

// hook is the pin of a link, and of what kind its program is.
type hook struct {
	pin    []string
	kind   ebpf.ProgramType
	attach ebpf.AttachType
}

// hooksOf are one hook of every place: the cgroup root, the pod, Envoy's cgroup.
func (w *world) hooksOf(p *pod) map[string]hook {
	return map[string]hook{
		"connect4":         {[]string{"hooks", "connect4"}, ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect},
		"lookup":           {[]string{"pods", w.cookie(p)}, ebpf.SkLookup, ebpf.AttachSkLookup},
		"proxy_getsockopt": {[]string{"proxies", "0", "proxy_getsockopt"}, ebpf.CGroupSockopt, ebpf.AttachCGroupGetsockopt},
	}
}

// supplanted gives a link somebody else's program.
func (w *world) supplanted(h hook) {
	w.t.Helper()
	w.ok(w.pinned(h.pin...).Update(foreign(w.t, h.kind, h.attach)))
}

// program is the number of the program that a link runs.
func (w *world) program(pin ...string) ebpf.ProgramID {
	w.t.Helper()
	info, err := w.pinned(pin...).Info()
	w.ok(err)
	return info.Program
}

func lifeProgramReplaced(t *testing.T) {
	w, p, stranger := serving(t)
	for _, pin := range w.hooksOf(p) {
		w.supplanted(pin)
	}
	state, err := w.redirect.Verify(p.uid)
	if err != nil || state.Captured() || len(state.Drift) != 3 {
		t.Errorf("with programs of others: drift %q, %v", state.Drift, err)
	}
	wantBy(t, stranger, appAddresses[0], "app")
	if _, err := p.dial(serviceIPv4); err == nil {
		t.Error("captured without the program")
	}
	w.ok(w.redirect.Close())
	w.load()
	p.reaches(t, serviceIPv4)
	relayed(t, stranger, appAddresses[0])
}

func lifeDrift(t *testing.T) {
	w, p, stranger := serving(t)
	repair := func() { w.ok(w.redirect.Enrol(p.description())) }
	attach := func() { w.ok(w.redirect.AttachProxy(0, w.envoy.cgroup)) }
	steer := func(prefix netip.Prefix) {
		for _, r := range p.steeringRoutes() {
			if r.Dst.String() == prefix.String() {
				p.must(func() error { return netlink.RouteDel(&r) })
			}
		}
	}
	for _, c := range []struct {
		what, says string
		harm       func()
		repair     func()
	}{
		{"the pod's hook detached", "lookup", func() { w.ok(w.pinned("pods", w.cookie(p)).Detach()) }, repair},
		{"the pod's pin removed", "lookup", func() { w.ok(os.Remove(filepath.Join(w.pins, "pods", w.cookie(p)))) }, repair},
		{"connect4 detached", "connect4", func() { w.ok(w.pinned("hooks", "connect4").Detach()) }, repair},
		{"connect6's pin removed", "connect6", func() { w.ok(os.Remove(filepath.Join(w.pins, "hooks", "connect6"))) }, w.sweep},
		{"sockops detached", "socket_ops", func() { w.ok(w.pinned("hooks", "socket_ops").Detach()) }, func() {
			w.ok(w.redirect.Close())
			w.load()
		}},
		{"Envoy's getsockopt detached", "proxy_getsockopt", func() { w.ok(w.pinned("proxies", "0", "proxy_getsockopt").Detach()) }, attach},
		{"another program in connect4", "connect4 at the cgroup root runs another program", func() { w.supplanted(w.hooksOf(p)["connect4"]) }, repair},
		{"another program in connect4, swept", "connect4", func() { w.supplanted(w.hooksOf(p)["connect4"]) }, w.sweep},
		{"another program in the pod's hook", "lookup at the network namespace runs another program", func() { w.supplanted(w.hooksOf(p)["lookup"]) }, repair},
		{"another program in Envoy's getsockopt", "proxy_getsockopt at the cgroup of Envoy's generation 0 runs another program", func() {
			w.supplanted(w.hooksOf(p)["proxy_getsockopt"])
		}, attach},
		{"the proxy ports no longer reserved", "ip_local_reserved_ports", func() { p.sysctl("ipv4/ip_local_reserved_ports", "8000") }, func() {
			repair()
			if got := p.readSysctl("ipv4/ip_local_reserved_ports"); got != "8000,15000-15019" {
				t.Errorf("reserved ports are %q", got)
			}
		}},
		{"one proxy port no longer reserved", "ip_local_reserved_ports", func() { p.sysctl("ipv4/ip_local_reserved_ports", "15000-15005,15007-15019") }, repair},
		{"half-open connections no longer moved", "tcp_migrate_req is 0", func() { p.sysctl("ipv4/tcp_migrate_req", "0") }, repair},
		{"the IPv4 route deleted", podIPv4, func() { steer(names.SteerIPv4) }, repair},
		{"the IPv6 route deleted", podIPv6, func() { steer(names.SteerIPv6) }, repair},
		{"an address added", "10.77.0.1", func() {
			p.must(func() error {
				link, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				return address(link, "10.77.0.1/32")
			})
		}, repair},
	} {
		c.harm()
		state, err := w.redirect.Verify(p.uid)
		if err != nil || state.Captured() || len(state.Drift) != 1 || !strings.Contains(state.Drift[0], c.says) {
			t.Errorf("%s: drift %q, %v", c.what, state.Drift, err)
		}
		c.repair()
		if state, err = w.redirect.Verify(p.uid); err != nil || !state.Captured() {
			t.Errorf("%s, repaired: drift %q, %v", c.what, state.Drift, err)
		}
		p.reaches(t, serviceIPv4)
		p.reaches(t, serviceIPv6)
		relayed(t, stranger, appAddresses[0])
	}
}

// lifeMapsChanged deletes and changes entries of the maps: the state tells, for it is read through the pins.
func lifeMapsChanged(t *testing.T) {
	w, p, stranger := serving(t)
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true}))
	state, err := w.redirect.Verify(p.uid)
	if err != nil || !state.Captured() || !state.Strict || len(state.Listeners) != 3 {
		t.Fatalf("before: %+v, %v", state, err)
	}
	cookie := binary.NativeEndian.AppendUint64(nil, state.Pod.Cookie)
	pods := w.pinnedMap("pods")
	clear := func(flag uint32) func() { // of struct pod in bpf/types.h, whose first word the flags are
		return func() {
			entry, err := pods.LookupBytes(cookie)
			w.ok(err)
			binary.NativeEndian.PutUint32(entry, binary.NativeEndian.Uint32(entry)&^flag)
			w.ok(pods.Put(cookie, entry))
		}
	}
	capture := func() { w.ok(w.redirect.Capture(p.uid, true, true)) }
	const inbound, outbound, strict = 2, 4, 8
	for _, c := range []struct {
		what   string
		harm   func()
		shows  func(redirect.State) bool
		repair func()
	}{
		{"inbound capture switched off", clear(inbound), func(s redirect.State) bool { return !s.Inbound && s.Outbound && !s.Captured() }, capture},
		{"outbound capture switched off", clear(outbound), func(s redirect.State) bool { return s.Inbound && !s.Outbound && !s.Captured() }, capture},
		{"Strict switched off", clear(strict), func(s redirect.State) bool { return !s.Strict }, func() {
			w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true}))
		}},
		{"Envoy's inbound listener deleted", func() {
			key := binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(cookie, 0), uint32(redirect.RoleIn))
			w.ok(w.pinnedMap("listeners").Delete(key))
		}, func(s redirect.State) bool { return len(s.Listeners) == 2 }, func() {
			w.unlisten(w.envoy, p, 0)
			w.listen(w.envoy, p, 0)
		}},
		{"Envoy's exemption deleted", func() { w.emptied(w.pinnedMap("proxies")) }, func(s redirect.State) bool { return len(s.Listeners) == 0 }, func() {
			w.ok(w.redirect.AttachProxy(0, w.envoy.cgroup))
		}},
	} {
		c.harm()
		if state, err := w.redirect.Verify(p.uid); err != nil || !c.shows(state) {
			t.Errorf("%s: %+v, %v", c.what, state, err)
		}
		c.repair()
		if state, err := w.redirect.Verify(p.uid); err != nil || !state.Captured() || !state.Strict || len(state.Listeners) != 3 {
			t.Errorf("%s, repaired: %+v, %v", c.what, state, err)
		}
		p.reaches(t, serviceIPv4)
		relayed(t, stranger, appAddresses[0])
	}
	for _, name := range []string{"pods", "usages"} {
		w.ok(w.pinnedMap(name).Delete(cookie))
		if state, err := w.redirect.Verify(p.uid); !errors.Is(err, redirect.ErrUnknownPod) {
			t.Errorf("without its entry in %s: %+v, %v", name, state, err)
		}
		w.ok(w.redirect.Enrol(p.description()))
		capture()
		if state, err := w.redirect.Verify(p.uid); err != nil || !state.Captured() {
			t.Errorf("without its entry in %s, repaired: %+v, %v", name, state, err)
		}
		p.reaches(t, serviceIPv6)
		relayed(t, stranger, appAddresses[1])
	}
}

// lifeServicesChanged takes services and addresses out behind the agent's back, and others in.
func lifeServicesChanged(t *testing.T) {
	w, p := capturing(t)
	if _, err := w.redirect.SetAddresses([]netip.Addr{netip.MustParseAddr(peerIPv4), netip.MustParseAddr(peerIPv6)}); err != nil {
		t.Fatal(err)
	}
	names := []string{"services", "addresses", "service_ids"}
	contents := func() map[string]string {
		all := map[string]string{}
		for _, name := range names {
			m := w.pinnedMap(name)
			for _, key := range w.keys(m) {
				value, err := m.LookupBytes(key)
				w.ok(err)
				all[name+" "+string(key)] = string(value)
			}
		}
		return all
	}
	before := contents()
	for what, harm := range map[string]func(*ebpf.Map){
		"deleted": w.emptied,
		"changed": func(m *ebpf.Map) {
			for _, key := range w.keys(m) {
				w.ok(m.Put(key, make([]byte, m.ValueSize())))
			}
		},
		"added to": func(m *ebpf.Map) {
			key := make([]byte, m.KeySize())
			key[0] = 0xaa
			w.ok(m.Put(key, make([]byte, m.ValueSize())))
		},
	} {
		for _, name := range names {
			harm(w.pinnedMap(name))
			if maps.Equal(contents(), before) {
				t.Errorf("%s %s: the maps are as before: this test shows nothing", name, what)
			}
			w.sweep()
			if after := contents(); !maps.Equal(after, before) {
				t.Errorf("%s %s: %d entries after a sweep, %d before", name, what, len(after), len(before))
			}
		}
	}
	for _, to := range []string{serviceIPv4, serviceIPv6, otherIPv4, peerIPv4 + ":1", "[" + peerIPv6 + "]:1"} {
		p.reaches(t, to)
	}
}
