package envoy

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weftmesh/weft/nodeproxy/internal/relay"
)

// space is a network namespace with its loopback up; the far end of its link is gone when it is.
type space struct{ path, link string }

var spaces atomic.Int32

func newSpace(t *testing.T) space {
	t.Helper()
	n := spaces.Add(1)
	name := fmt.Sprintf("weft-broker-%d-%d", os.Getpid(), n)
	s := space{filepath.Join("/run/netns", name), fmt.Sprintf("wb%d-%d", os.Getpid(), n)}
	command(t, "ip", "netns", "add", name)
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "delete", name).Run() })
	command(t, "ip", "-n", name, "link", "set", "lo", "up")
	command(t, "ip", "link", "add", s.link, "type", "veth", "peer", "name", "far", "netns", name)
	t.Cleanup(func() { _ = exec.Command("ip", "link", "delete", s.link).Run() })
	return s
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

// allow lets Envoy's broker into namespaces.
func (b *bench) allow(t *testing.T, spaces ...space) {
	t.Helper()
	var cookies []uint64
	for _, s := range spaces {
		conn, err := s.dial(t.Context(), "udp", "127.0.0.1:9")
		if err != nil {
			t.Fatal(err)
		}
		file, err := conn.(*net.UDPConn).File()
		if err != nil {
			t.Fatal(err)
		}
		cookie, err := unix.GetsockoptUint64(int(file.Fd()), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		if err != nil {
			t.Fatal(err)
		}
		cookies = append(cookies, cookie)
		_, _ = conn.Close(), file.Close()
	}
	if err := AllowNamespaces(b.config.RunDir, cookies); err != nil {
		t.Fatal(err)
	}
}

// dial connects from within the namespace.
func (s space) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends in the namespace
		var h netns.NsHandle
		if h, err = netns.GetFromPath(s.path); err != nil {
			return
		}
		defer h.Close()
		if err = netns.Set(h); err == nil {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		}
	}()
	<-done
	return conn, err
}

// get asks for a page over a new connection; "": 200.
func (s space) get(port uint32) string {
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: s.dial}}
	r, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
	if err != nil {
		return err.Error()
	}
	_ = r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return r.Status
	}
	return ""
}

// address of a port of loopback, in the namespace.
func (s space) address(port uint32) *core.SocketAddress {
	return &core.SocketAddress{Address: "127.0.0.1", NetworkNamespaceFilepath: s.path, PortSpecifier: &core.SocketAddress_PortValue{PortValue: port}}
}

// relayed gives Envoy a greeter in a namespace and a listener there that passes each request on to it over a connection of its own.
func (s space) relayed(t *testing.T, b *bench, at, to uint32) {
	t.Helper()
	b.allow(t, s)
	target := &cluster.Cluster{
		Name: "there", ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC}, ConnectTimeout: durationpb.New(5 * time.Second),
		MaxRequestsPerConnection: wrapperspb.UInt32(1),
		UpstreamBindConfig:       &core.BindConfig{SourceAddress: s.address(0)},
		LoadAssignment: &endpoint.ClusterLoadAssignment{ClusterName: "there", Endpoints: []*endpoint.LocalityLbEndpoints{{LbEndpoints: []*endpoint.LbEndpoint{{
			HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: &core.Address{Address: &core.Address_SocketAddress{
				SocketAddress: &core.SocketAddress{Address: "127.0.0.1", PortSpecifier: &core.SocketAddress_PortValue{PortValue: to}}}}}},
		}}}}},
	}
	b.set(t, target.Name, target)
	for port, action := range map[uint32]*route.Route{to: nil, at: {
		Match:  &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
		Action: &route.Route_Route{Route: &route.RouteAction{ClusterSpecifier: &route.RouteAction_Cluster{Cluster: "there"}}},
	}} {
		l := greeter(t, port, nil)
		l.Address = &core.Address{Address: &core.Address_SocketAddress{SocketAddress: s.address(port)}}
		if action != nil {
			filter := l.FilterChains[0].Filters[0]
			var m hcm.HttpConnectionManager
			if err := filter.ConfigType.(*listener.Filter_TypedConfig).TypedConfig.UnmarshalTo(&m); err != nil {
				t.Fatal(err)
			}
			m.GetRouteConfig().VirtualHosts[0].Routes = []*route.Route{action}
			filter.ConfigType = &listener.Filter_TypedConfig{TypedConfig: wrap(t, &m)}
		}
		b.set(t, l.Name, l)
	}
}

// others are the processes in Envoy's cgroup besides Envoy.
func (b *bench) others(t *testing.T) (pids []int) {
	t.Helper()
	s := b.states.last()
	procs, err := os.ReadFile(filepath.Join(b.config.CgroupRoot, s.Cgroup, "cgroup.procs"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range strings.Fields(string(procs)) {
		if pid, err := strconv.Atoi(f); err == nil && pid != s.PID {
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestBroker: an Envoy without a capability listens and connects in another network namespace, and keeps nothing of it. Others on
// the machine may: whoever copies its mounts in that moment. So the namespace of one of three has to go.
func TestBroker(t *testing.T) {
	b := start(t, nil)
	b.live(t, 0)
	const at, to = 20001, 20002
	for range 3 {
		s := newSpace(t)
		s.relayed(t, b, at, to)
		until(t, patience, "the listener answers in its namespace", func() bool { return s.get(at) == "" })
		if answers(at) || answers(to) {
			t.Error("it answers outside the namespace")
		}
		b.cache.Delete(relay.Key{TypeURL: relay.TypeListener, Name: fmt.Sprint("greeter-", at)})
		b.cache.Delete(relay.Key{TypeURL: relay.TypeListener, Name: fmt.Sprint("greeter-", to)})
		b.cache.Delete(relay.Key{TypeURL: relay.TypeCluster, Name: "there"})
		command(t, "ip", "netns", "delete", filepath.Base(s.path))
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if _, err := net.InterfaceByName(s.link); err != nil {
				return
			}
		}
	}
	t.Error("no namespace is gone that the listeners had left")
}

// TestBrokerKilled: while brokers die under load no request is lost, and Envoy lives.
func TestBrokerKilled(t *testing.T) {
	b := start(t, nil)
	envoy := b.live(t, 0).PID
	s := newSpace(t)
	const at, to = 20001, 20002
	s.relayed(t, b, at, to)
	until(t, patience, "the listener answers in its namespace", func() bool { return s.get(at) == "" })
	load := s.ask(t, at, 4)
	for range 30 {
		var pids []int
		until(t, patience, "a broker", func() bool { pids = b.others(t); return len(pids) == 1 })
		before := load.asked.Load()
		until(t, patience, "requests", func() bool { return load.asked.Load() > before+5 })
		time.Sleep(brokerLives) // else Envoy is ended for want of a broker that lives
		if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		until(t, patience, "another broker", func() bool { now := b.others(t); return len(now) == 1 && now[0] != pids[0] })
	}
	problems := load.stop()
	t.Logf("30 brokers killed: %d requests, failed: %v", load.asked.Load(), problems)
	if now := b.states.last(); now.PID != envoy || now.Restarts != 0 || len(problems) > 0 {
		t.Errorf("state after the kills: %+v", now)
	}
}

// asking is load on a port.
type asking struct {
	asked atomic.Int64
	stop  func() (problems []string)
}

// ask asks for pages over new connections, some at a time.
func (s space) ask(t *testing.T, port uint32, clients int) *asking {
	t.Helper()
	a := &asking{}
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	var mu sync.Mutex
	var problems []string
	for range clients {
		done.Go(func() {
			last := ""
			for ctx.Err() == nil {
				problem := s.get(port)
				if problem != "" {
					if last != "" {
						problem = "twice in a row: " + problem
					}
					mu.Lock()
					problems = append(problems, problem)
					mu.Unlock()
				}
				last = problem
				a.asked.Add(1)
			}
		})
	}
	a.stop = func() []string { cancel(); done.Wait(); return problems }
	t.Cleanup(func() { a.stop() })
	return a
}

// TestKilledEnvoyRefusesNobody: connections that come while Envoy is away wait for the next one; those that it had are reset.
func TestKilledEnvoyRefusesNobody(t *testing.T) {
	b := start(t, nil)
	last := b.live(t, 0).PID
	s := newSpace(t)
	command(t, "ip", "netns", "exec", filepath.Base(s.path), "sh", "-c", "echo 1 >/proc/sys/net/ipv4/tcp_migrate_req")
	const at, to = 20001, 20002
	s.relayed(t, b, at, to)
	until(t, patience, "the listener answers in its namespace", func() bool { return s.get(at) == "" })
	const clients, kills = 4, quickRestarts + 1
	load := s.ask(t, at, clients)
	for range kills {
		before := load.asked.Load()
		until(t, patience, "requests", func() bool { return load.asked.Load() > before+20 })
		if err := syscall.Kill(last, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		last = b.live(t, last).PID
	}
	problems := load.stop()
	t.Logf("%d Envoys killed: %d requests, %d failed: %v", kills, load.asked.Load(), len(problems), problems)
	for _, p := range problems {
		if strings.Contains(p, "refused") || strings.Contains(p, "Timeout") || strings.Contains(p, "twice") {
			t.Error(p)
		}
	}
	if len(problems) > kills*clients {
		t.Errorf("%d requests failed, want those alone that an Envoy had: %v", len(problems), problems)
	}
	until(t, patience, "the killed ones' sockets to be closed", func() bool {
		out, err := exec.Command("ip", "netns", "exec", filepath.Base(s.path), "ss", "-Hltn", "sport = :20001").Output()
		return err == nil && strings.Count(string(out), "\n") == 1
	})
}

// TestEscapes runs a program in Envoy's place that tries to get out.
func TestEscapes(t *testing.T) {
	s, other := newSpace(t), newSpace(t)
	program := filepath.Join(t.TempDir(), "escape")
	command(t, "gcc", "-O1", "-w", "-static", "-DPOD=\""+s.path+"\"", "-DOTHER=\""+other.path+"\"", "-o", program, "testdata/escape.c")
	public := filepath.Join(filepath.Dir(binary), "escape") // the test's own folder is closed to Envoy's user
	command(t, "install", "-m", "0111", program, public)
	t.Cleanup(func() { _ = os.Remove(public) })
	b := start(t, func(c *Config) {
		c.Binary = public
		if err := os.MkdirAll(folderOf(c.RunDir, 0), 0o755); err != nil {
			t.Fatal(err)
		}
		(&bench{config: *c}).allow(t, s)
	})
	until(t, patience, "all attempts", func() bool { return strings.Contains(b.log.String(), "attempts end") })
	first, _, _ := strings.Cut(b.log.String(), "attempts end")
	tried := 0
	for _, m := range regexp.MustCompile(`attempt (.+?): ([^"\n]+)`).FindAllStringSubmatch(first, -1) {
		tried++
		_, control := strings.CutPrefix(m[1], "control ")
		if control != (m[2] == "allowed") {
			t.Errorf("%s: %s", m[1], m[2])
		}
	}
	if tried < 58 {
		t.Errorf("%d attempts, want all", tried)
	}
}

// TestLaunchThatFails: a process that ends before it is Envoy is told of and tried again.
func TestLaunchThatFails(t *testing.T) {
	b := start(t, func(c *Config) { c.Launcher = "/bin/false" })
	until(t, patience, "two failures", func() bool { _, ok := b.states.reached(2); return ok })
	if s := b.states.last(); s.Live || !strings.Contains(s.Exit, "before it was Envoy") {
		t.Errorf("state: %+v", s)
	}
}
