package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
)

// world is one node: its namespace, an instance of the hooks, a stand-in for Envoy, and pods that reach each other
// through the node. Worlds use the same addresses: in one kernel they must not touch each other all the same.
type world struct {
	t        testing.TB
	name     string
	root     string // the cgroup where the hooks attach
	pins     string
	node     *space
	redirect *redirect.Redirect
	envoy    *hand
	settings []func(*redirect.Config)
}

// pod is a pod's namespace with what the agent knows of it.
type pod struct {
	*space
	uid       string
	addresses []netip.Addr
	mu        sync.Mutex
	open      []*stream // by greeted
}

// reset closes what greeted opened.
func (p *pod) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, st := range p.open {
		st.reset()
	}
	p.open = nil
}

const (
	nodeIPv4, nodeIPv6 = "10.99.0.1", "fd99::1"
	serviceIPv4        = "10.96.0.1:80" // HTTP
	serviceIPv6        = "[fd10::1]:80"
	otherIPv4          = "10.96.0.2:80" // TCP
	otherIPv6          = "[fd10::2]:80"
	autoIPv4           = "10.96.0.3:443"
)

// newWorld makes a node without pods. Settings change the instance's configuration.
func newWorld(t testing.TB, settings ...func(*redirect.Config)) *world {
	t.Helper()
	w := &world{t: t, name: unique("node")}
	w.pins = filepath.Join(scratch, "bpf", w.name)
	w.node = newSpace(t, "node")
	w.node.sysctl("ipv4/ip_forward", "1")
	w.node.sysctl("ipv6/conf/all/forwarding", "1")
	w.node.must(func() error {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = address(lo, nodeIPv4+"/32")
		}
		if err == nil {
			err = address(lo, nodeIPv6+"/128")
		}
		return err
	})
	w.settings = settings
	w.load()
	t.Cleanup(func() {
		if err := w.redirect.Release(true); err != nil {
			t.Error("release:", err)
		}
		if _, err := os.Stat(w.pins); !os.IsNotExist(err) {
			t.Error("release left", w.pins)
		}
	})
	w.envoy = newHand(t, w.root, w.name+"-envoy", unix.CAP_NET_ADMIN, unix.CAP_NET_RAW)
	if err := w.redirect.AttachProxy(0, w.envoy.cgroup); err != nil {
		t.Fatal(err)
	}
	return w
}

// load opens the instance, again if need be, as an agent that starts.
func (w *world) load(settings ...func(*redirect.Config)) {
	w.t.Helper()
	cfg := redirect.Config{CgroupRoot: cgroupBase, PinDir: w.pins}
	for _, set := range append(w.settings, settings...) {
		set(&cfg)
	}
	w.root = cfg.CgroupRoot
	r, err := redirect.Load(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.redirect = r
}

// pod makes a pod with the addresses, "" for a family that it lacks.
func (w *world) pod(name, ipv4, ipv6 string) *pod {
	w.t.Helper()
	p := &pod{space: newSpace(w.t, name), uid: w.name + "-" + name}
	wire(w.t, w.node, p.space, "v"+name, "eth0", func(l netlink.Link) error {
		return nodeEnd(l, ipv4, ipv6)
	}, func(l netlink.Link) error {
		return podEnd(l, ipv4, ipv6)
	})
	for _, a := range []string{ipv4, ipv6} {
		if a != "" {
			p.addresses = append(p.addresses, netip.MustParseAddr(a))
		}
	}
	w.t.Cleanup(p.reset)
	p.sysctl("ipv4/tcp_fastopen", "1027") // both ends, every listener; a client needs the cookie of a connection before
	return p
}

func nodeEnd(l netlink.Link, ipv4, ipv6 string) error {
	if ipv4 != "" {
		if err := address(l, "169.254.1.1/32"); err != nil {
			return err
		}
		if err := route(l, ipv4+"/32", ""); err != nil {
			return err
		}
	}
	if ipv6 != "" {
		if err := address(l, "fe80::1/64"); err != nil {
			return err
		}
		return route(l, ipv6+"/128", "")
	}
	return nil
}

func podEnd(l netlink.Link, ipv4, ipv6 string) error {
	if ipv4 != "" {
		if err := address(l, ipv4+"/32"); err != nil {
			return err
		}
		if err := route(l, "169.254.1.1/32", ""); err != nil {
			return err
		}
		if err := route(l, "0.0.0.0/0", "169.254.1.1"); err != nil {
			return err
		}
	}
	if ipv6 != "" {
		if err := address(l, ipv6+"/128"); err != nil {
			return err
		}
		return route(l, "::/0", "fe80::1")
	}
	return nil
}

func (p *pod) description() redirect.Pod {
	return redirect.Pod{UID: p.uid, Sandbox: "sandbox-of-" + p.uid, NetnsPath: p.path, Addresses: p.addresses}
}

// enrolled makes a pod, enrols it, lets the stand-in listen and captures both directions.
func (w *world) enrolled(name, ipv4, ipv6 string) *pod {
	w.t.Helper()
	p := w.pod(name, ipv4, ipv6)
	w.enrol(p)
	return p
}

func (w *world) enrol(p *pod) {
	w.t.Helper()
	w.ok(w.redirect.Enrol(p.description()))
	w.listen(w.envoy, p, 0)
	w.ok(w.redirect.Capture(p.uid, true, true))
}

func (w *world) ok(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// listen makes a hand listen in the pod as a generation of Envoy does, and waits until the kernel knows.
func (w *world) listen(envoy *hand, p *pod, generation uint32, settings ...func(*order)) {
	w.t.Helper()
	for _, l := range []struct {
		by   string
		port uint16
	}{{"out", names.PortOutHTTP}, {"in", names.PortIn}, {"in-first", names.PortInFirst}} {
		o := order{Do: "listen", Netns: p.path, Port: names.ListenPort(l.port, generation), By: l.by, Generation: generation, Sockets: 2}
		for _, set := range settings {
			set(&o)
		}
		envoy.must(o)
	}
	eventually(w.t, "three listeners", func() error {
		listeners, err := w.redirect.Listening(p.uid)
		found := 0
		for _, l := range listeners {
			if l.Generation == generation {
				found++
			}
		}
		if err == nil && found != 3 {
			err = fmt.Errorf("%d are known", found)
		}
		return err
	})
}

// services captures the addresses that the tests dial.
func (w *world) services() {
	w.t.Helper()
	var list []redirect.Service
	for at, class := range map[string]redirect.Class{
		serviceIPv4: redirect.ClassHTTP, serviceIPv6: redirect.ClassHTTP,
		otherIPv4: redirect.ClassTCP, otherIPv6: redirect.ClassTCP, autoIPv4: redirect.ClassAuto,
	} {
		list = append(list, redirect.Service{Addr: netip.MustParseAddrPort(at), Class: class})
	}
	refused, err := w.redirect.SetServices(list)
	if err != nil || len(refused) > 0 {
		w.t.Fatal("set services:", refused, err)
	}
}

func (w *world) counter(name string) uint64 {
	w.t.Helper()
	all, err := w.redirect.Counters()
	if err != nil {
		w.t.Fatal(err)
	}
	n, known := all[name]
	if !known {
		w.t.Fatalf("no counter %q", name)
	}
	return n
}

// counts runs f and fails unless it moves the counter.
func (w *world) counts(name string, f func()) {
	w.t.Helper()
	before := w.counter(name)
	f()
	// A socket that another instance's fork has for a moment is closed when that moment ends.
	eventually(w.t, "counter "+name, func() error {
		if w.counter(name) == before {
			return errors.New("it did not move")
		}
		return nil
	})
}

// eventually waits until check has no more complaint.
func eventually(t testing.TB, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// serve runs an app in the pod that greets by name on [::]:port (or IPv4 where there is no IPv6), until the test ends.
func (p *pod) serve(name string, port uint16) {
	p.t.Helper()
	st, err := p.socket(unix.AF_INET6, 0, intOption(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0),
		bound(netip.AddrPortFrom(netip.IPv6Unspecified(), port).String()))
	if err != nil {
		p.t.Fatal("serve:", err)
	}
	if err := unix.Listen(st.fd, 4096); err != nil {
		p.t.Fatal("serve:", err)
	}
	l := &listener{order: order{By: name, Netns: p.path, Port: port}, sockets: []int{st.fd}}
	l.accept()
	p.t.Cleanup(l.close)
}

// greeted dials and reads the greeting; the socket is returned open.
func (p *pod) greeted(to string, options ...option) (*stream, greeting, error) {
	st, err := p.dial(to, options...)
	if err != nil {
		return nil, greeting{}, err
	}
	g, err := st.greeting()
	if err != nil {
		st.close()
		return nil, g, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = append(p.open, st)
	return st, g, nil
}

// wantOut fails unless the greeting is the stand-in's, with the original destination.
func wantOut(t testing.TB, g greeting, err error, original string) {
	t.Helper()
	if err != nil {
		t.Fatalf("dial %s: %v", original, err)
	}
	if g.By != "out" || g.Error != "" || g.Original.String() != strings.Replace(original, "[::ffff:", "[", 1) {
		t.Fatalf("dialled %s: accepted by %q for %s (%s)", original, g.By, g.Original, g.Error)
	}
}

func wantErrno(t testing.TB, err error, want unix.Errno, what string) {
	t.Helper()
	if got := errorName(err); got != unix.ErrnoName(want) {
		t.Errorf("%s: got %q, want %s", what, got, unix.ErrnoName(want))
	}
}

// silent makes the agent one that has not been heard for longer than hooks wait.
func (w *world) silent() {
	w.t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(w.pins, "maps", "seen"), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	defer m.Close()
	var last uint64
	w.ok(m.Lookup(uint32(0), &last))
	w.ok(m.Put(uint32(0), last-uint64(31*time.Second)))
}

// unlisten takes listen back.
func (w *world) unlisten(envoy *hand, p *pod, generation uint32) {
	w.t.Helper()
	for _, port := range []uint16{names.PortOutHTTP, names.PortIn, names.PortInFirst} {
		envoy.must(order{Do: "unlisten", Netns: p.path, Port: names.ListenPort(port, generation)})
	}
	eventually(w.t, "no listener", func() error {
		listeners, err := w.redirect.Listening(p.uid)
		for _, l := range listeners {
			if l.Generation == generation {
				err = fmt.Errorf("still listening: %+v", l)
			}
		}
		return err
	})
}

// settled waits until the pod holds no captured connection.
func (w *world) settled(p *pod) {
	w.t.Helper()
	p.reset()
	eventually(w.t, "no captured connection", func() error {
		state, err := w.redirect.Verify(p.uid)
		if err == nil && state.Outgoing+state.Incoming > 0 {
			err = fmt.Errorf("%d outgoing, %d incoming", state.Outgoing, state.Incoming)
		}
		return err
	})
}

// withdrawn takes the pod out, to the last trace.
func (w *world) withdrawn(p *pod) {
	w.t.Helper()
	w.ok(w.redirect.Withdraw(p.uid))
	eventually(w.t, "the last connection's end", func() error {
		if _, err := w.redirect.Sweep(time.Hour); err != nil {
			return err
		}
		if p.readSysctl("ipv4/ip_local_reserved_ports") != "" {
			return errors.New("the proxy ports are still reserved")
		}
		return nil
	})
}

// pinnedMap opens one of the instance's maps.
func (w *world) pinnedMap(name string) *ebpf.Map {
	w.t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(w.pins, "maps", name), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { m.Close() })
	return m
}

// entries counts the entries of one of the instance's maps, as the kernel has them.
func (w *world) entries(name string) int {
	w.t.Helper()
	return len(w.keys(w.pinnedMap(name)))
}

func (w *world) keys(m *ebpf.Map) (keys [][]byte) {
	w.t.Helper()
	for key, err := []byte(nil), error(nil); ; keys = append(keys, key) {
		var last any
		if key != nil {
			last = key
		}
		if key, err = m.NextKeyBytes(last); err != nil {
			w.t.Fatal(err)
		} else if key == nil {
			return keys
		}
	}
}

// emptied deletes every entry of a map.
func (w *world) emptied(m *ebpf.Map) {
	w.t.Helper()
	for _, key := range w.keys(m) {
		w.ok(m.Delete(key))
	}
}

// unroutable counts the packets that the node's namespace got and had no route for.
func (w *world) unroutable() (n int) {
	w.t.Helper()
	return w.node.snmp6("Ip6InNoRoutes")
}

// sweep does what the agent does every few seconds.
func (w *world) sweep() {
	w.t.Helper()
	_, err := w.redirect.Sweep(time.Hour)
	w.ok(err)
}
