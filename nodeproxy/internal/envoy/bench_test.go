package envoy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/test/contract/proxy"
)

const (
	// testUID is Envoy's user and group in these tests.
	testUID = 15001
	// patience is ten times what Envoy's return may take.
	patience = time.Minute
)

// binary is a copy of Envoy as an image has it: executable for everyone, readable for nobody.
var binary string

// TestMain is the launcher as well: the supervisor starts this program again, as it starts nodeproxy.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "envoy-exec" {
		fmt.Fprintln(os.Stderr, Exec())
		os.Exit(1)
	}
	if len(os.Args) > 1 && os.Args[1] == "envoy-broker" {
		if err := Broker(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 2 && os.Args[1] == "supervise" {
		if err := superviseAlone(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	dir, err := os.MkdirTemp("", "weft-envoy-bin-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err == nil {
		binary, err = copyEnvoy(dir)
	}
	code := 1
	if err == nil {
		code = m.Run()
	} else {
		fmt.Fprintln(os.Stderr, err)
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

func copyEnvoy(dir string) (string, error) {
	path, err := proxy.Binary()
	if err != nil {
		return "", err
	}
	from, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer from.Close()
	to, err := os.OpenFile(filepath.Join(dir, "envoy"), os.O_CREATE|os.O_WRONLY, 0o111)
	if err != nil {
		return "", err
	}
	defer to.Close()
	if _, err := io.Copy(to, from); err != nil {
		return "", err
	}
	return to.Name(), nil
}

// journal collects the supervisor's log.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(b)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

// bench is a supervisor with an agent's socket beside it.
type bench struct {
	config Config
	cache  *relay.Cache
	log    *journal
	states *states
	// stop ends the supervisor and waits for it.
	stop func() error
}

// states are what Watch gave.
type states struct {
	mu  sync.Mutex
	all []State
	at  []time.Time
}

func (s *states) add(n State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all, s.at = append(s.all, n), append(s.at, time.Now())
}

func (s *states) last() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.all) == 0 {
		return State{}
	}
	return s.all[len(s.all)-1]
}

// reached is when a number of restarts was first told of.
func (s *states) reached(restarts uint32) (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, n := range s.all {
		if n.Restarts >= restarts {
			return s.at[i], true
		}
	}
	return time.Time{}, false
}

// start runs a supervisor, configured as change leaves it, and an agent.
func start(t *testing.T, change func(*Config)) *bench {
	t.Helper()
	b := prepare(t, change)
	b.run(t)
	return b
}

// prepare makes what start runs.
func prepare(t *testing.T, change func(*Config)) *bench {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("the supervisor needs root: it makes a cgroup and changes users")
	}
	dir, err := os.MkdirTemp("", "weft-envoy-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	launcher, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{log: &journal{}, states: &states{}}
	b.config = Config{
		Binary: binary, Launcher: launcher, RunDir: filepath.Join(dir, "run"), NodeID: "envoytest-" + filepath.Base(dir), PodUID: "pod",
		CgroupRoot: cgroupRoot(t), SelfCgroup: "/nonexistent", Concurrency: 1, DrainTimeout: 50 * time.Millisecond, UID: testUID, GID: testUID,
		LogLevel: "warning", Log: newLog(b.log),
	}
	if change != nil {
		change(&b.config)
	}
	b.cache = relay.NewCache(relay.Config{Want: func(relay.Key, bool) {}, Log: b.config.Log})
	for _, c := range lds.Clusters() {
		b.set(t, c.Name, c)
	}
	b.cache.Prime()
	return b
}

func (b *bench) run(t *testing.T) {
	t.Helper()
	if err := os.MkdirAll(b.config.RunDir, 0o755); err != nil {
		t.Fatal(err)
	}
	b.serve(t)
	b.supervise(t, 0)
}

func newLog(j *journal) *slog.Logger {
	return slog.New(slog.NewTextHandler(j, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// supervise runs the supervisor, and watches a generation for it.
func (b *bench) supervise(t *testing.T, generation uint32) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- New(b.config).Run(ctx) }()
	b.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-ended:
			return err
		case <-time.After(30 * time.Second):
			return fmt.Errorf("the supervisor did not end within 30 s")
		}
	})
	watching, stopWatching := context.WithCancel(context.Background())
	go Watch(watching, b.config.RunDir, generation, b.states.add)
	t.Cleanup(func() {
		stopWatching()
		if err := b.stop(); err != nil {
			t.Errorf("supervisor: %v", err)
		}
		if t.Failed() {
			t.Logf("log:\n%s", b.log)
		}
	})
}

// serve is the agent's side: ADS and SDS on a socket of Envoy's group.
func (b *bench) serve(t *testing.T) {
	t.Helper()
	socket := filepath.Join(b.config.RunDir, AgentSocket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(socket, 0, testUID); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(socket, 0o660); err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	(&relay.Service{Cache: b.cache}).Register(server)
	go server.Serve(l) // ends with Stop
	t.Cleanup(server.Stop)
}

func (b *bench) set(t *testing.T, name string, m proto.Message) {
	t.Helper()
	if _, err := b.cache.Set(name, m); err != nil {
		t.Fatal(err)
	}
}

// live waits until the supervisor tells of a serving Envoy that is not the given one.
func (b *bench) live(t *testing.T, butNot int) State {
	t.Helper()
	until(t, patience, "Envoy is live", func() bool {
		s := b.states.last()
		return s.Live && s.PID != 0 && s.PID != butNot
	})
	return b.states.last()
}

// admin asks Envoy's admin socket.
func (b *bench) admin(t *testing.T, path string) string {
	t.Helper()
	response, err := (&Supervisor{config: b.config}).admin().Get("http://envoy" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// greeter is a listener that answers 200 on a port of loopback; tls, if not nil, is its transport socket.
func greeter(t *testing.T, port uint32, tls *core.TransportSocket) *listener.Listener {
	t.Helper()
	manager := &hcm.HttpConnectionManager{
		StatPrefix:  "greeter",
		HttpFilters: []*hcm.HttpFilter{{Name: "envoy.filters.http.router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: wrap(t, &router.Router{})}}},
		RouteSpecifier: &hcm.HttpConnectionManager_RouteConfig{RouteConfig: &route.RouteConfiguration{VirtualHosts: []*route.VirtualHost{{
			Name: "all", Domains: []string{"*"}, Routes: []*route.Route{{
				Match:  &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
				Action: &route.Route_DirectResponse{DirectResponse: &route.DirectResponseAction{Status: 200}},
			}},
		}}}},
	}
	return &listener.Listener{
		Name: fmt.Sprint("greeter-", port),
		Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
			Address: "127.0.0.1", PortSpecifier: &core.SocketAddress_PortValue{PortValue: port}}}},
		FilterChains: []*listener.FilterChain{{TransportSocket: tls, Filters: []*listener.Filter{{
			Name: "http", ConfigType: &listener.Filter_TypedConfig{TypedConfig: wrap(t, manager)}}}}},
	}
}

func wrap(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	packed, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return packed
}

// answers tells whether a port of loopback gives 200 to a new connection.
func answers(port uint32) bool {
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
	if err != nil {
		return false
	}
	_ = r.Body.Close()
	return r.StatusCode == http.StatusOK
}

// freePort is one that nobody listens on.
func freePort(t *testing.T) uint32 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint32(l.Addr().(*net.TCPAddr).Port)
}

// until waits for a condition.
func until(t *testing.T, limit time.Duration, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !so(); {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// cgroupRoot is where cgroup v2 is mounted.
func cgroupRoot(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		before, after, _ := strings.Cut(line, " - ")
		if f := strings.Fields(before); strings.HasPrefix(after, "cgroup2 ") && len(f) > 4 {
			return f[4]
		}
	}
	t.Fatal("no cgroup v2 is mounted on this machine")
	return ""
}
