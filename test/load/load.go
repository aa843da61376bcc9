// Package load is the traffic generator of demo, tests and benchmarks. It never retries and never reconnects
// silently: every request carries a sequence number that the answer must repeat, every connection that ends without
// its server having said so counts as broken, and a server's own "Connection: close" counts apart.
package load

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"
)

// Kind is one way of using connections.
type Kind string

const (
	// KeepAlive sends one request after the other on one HTTP/1.1 connection that is never given up.
	KeepAlive Kind = "http-keepalive"
	// Hundred opens a new HTTP/1.1 connection after 100 requests.
	Hundred Kind = "http-100"
	// New opens a new HTTP/1.1 connection for each request.
	New Kind = "http-new"
	// GRPCStream sends messages on one bidirectional gRPC stream.
	GRPCStream Kind = "grpc-stream"
	// GRPCUnary calls on one HTTP/2 connection.
	GRPCUnary Kind = "grpc-unary"
	// Redis pipelines INCR on one connection and checks every number.
	Redis Kind = "redis"
)

// fixed are the kinds whose name says how many requests a connection carries.
var fixed = map[Kind]int{Hundred: 100, New: 1}

// Target is one client, run Count times side by side.
type Target struct {
	Name string `json:"name"`
	Kind Kind   `json:"kind"`
	// Address is host:port.
	Address string `json:"address"`
	// Path and Host of HTTP requests; Headers are added.
	Path    string            `json:"path,omitempty"`
	Host    string            `json:"host,omitempty"`
	Headers map[string]string `json:"headers,omitempty"`
	Count   int               `json:"count,omitempty"`
	// Pause between two requests of one client.
	Pause Duration `json:"pause,omitempty"`
	// PerConnection is how many requests, messages or commands go over one connection. Then the client ends it cleanly,
	// a stream by half-close and the server's status, and opens a new one. 0: a connection is kept as long as the server
	// keeps it; http-100 and http-new have their own.
	PerConnection int `json:"perConnection,omitempty"`
	// Expect is the HTTP status that counts as success. 0: 200.
	Expect int `json:"expect,omitempty"`
}

// Duration is a time.Duration that reads "10ms" in JSON.
type Duration time.Duration

// UnmarshalJSON reads a duration string.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("read duration: %w", err)
	}
	v, err := time.ParseDuration(s)
	*d = Duration(v)
	return err
}

// MarshalJSON writes a duration string.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(time.Duration(d).String()) }

// Config is what a Generator runs.
type Config struct {
	Targets []Target
	// Timeout of one request. 0: 10 s.
	Timeout time.Duration
	// Dial opens connections. Nil: the system's.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Stats are the counters of one target since the start. Requests are answered ones.
type Stats struct {
	// At is when the counters were read.
	At       time.Time `json:"at"`
	Requests uint64    `json:"requests"`
	// Failed: no answer, a wrong status or a wrong sequence number.
	Failed uint64 `json:"failed"`
	// Connections opened.
	Connections uint64 `json:"connections"`
	// Broken connections: ended by the other side, not announced.
	Broken uint64 `json:"broken"`
	// Closed connections: the server said "Connection: close", or GOAWAY.
	Closed uint64 `json:"closed"`
	// Direct and Proxied requests by the callee's view: it saw the caller's address, or its own (kube.OwnClientAddress).
	Direct  uint64 `json:"direct"`
	Proxied uint64 `json:"proxied"`
	// Callees splits both by the address of the callee.
	Callees map[string]View `json:"callees,omitempty"`
	// Versions counts answers by the header X-Version, or X-Catalogue.
	Versions map[string]uint64 `json:"versions,omitempty"`
	// Statuses counts HTTP statuses and gRPC codes.
	Statuses map[string]uint64 `json:"statuses,omitempty"`
	// Oldest is the age of the oldest open connection in seconds.
	Oldest float64 `json:"oldest,omitempty"`
	// Errors holds the last few of each target, with the time of day.
	Errors []string `json:"errors,omitempty"`
}

// View counts answers by what the callee saw: its caller's address, or its own, which is how its Envoy reaches it.
type View struct {
	Direct  uint64 `json:"direct"`
	Proxied uint64 `json:"proxied"`
}

// Generator runs targets until its context ends.
type Generator struct {
	config  Config
	targets []*target
}

type target struct {
	Target
	config *Config

	requests, failed, connections, broken, closed, direct, proxied atomic.Uint64

	mu       sync.Mutex
	callees  map[string]View
	versions map[string]uint64
	statuses map[string]uint64
	errors   []string
	open     map[*client]time.Time
}

// NewGenerator checks the targets.
func NewGenerator(c Config) (*Generator, error) {
	if c.Timeout == 0 {
		c.Timeout = 10 * time.Second
	}
	if c.Dial == nil {
		c.Dial = (&net.Dialer{}).DialContext
	}
	g := &Generator{config: c}
	seen := map[string]bool{}
	for _, t := range c.Targets {
		if seen[t.Name] || t.Name == "" {
			return nil, fmt.Errorf("read target %q: every target needs a name of its own", t.Name)
		}
		seen[t.Name] = true
		if _, ok := clients[t.Kind]; !ok {
			return nil, fmt.Errorf("read target %q: kind %q is none of %v", t.Name, t.Kind, kinds())
		}
		if t.Count == 0 {
			t.Count = 1
		}
		if t.Expect == 0 {
			t.Expect = 200
		}
		if t.Path == "" {
			t.Path = "/"
		}
		if n := fixed[t.Kind]; n != 0 {
			if t.PerConnection != 0 {
				return nil, fmt.Errorf("read target %q: kind %q has %d requests per connection; leave perConnection out, or use %s", t.Name, t.Kind, n, KeepAlive)
			}
			t.PerConnection = n
		}
		g.targets = append(g.targets, &target{Target: t, config: &g.config, callees: map[string]View{},
			versions: map[string]uint64{}, statuses: map[string]uint64{}, open: map[*client]time.Time{}})
	}
	return g, nil
}

func kinds() []string {
	var l []string
	for k := range clients {
		l = append(l, string(k))
	}
	sort.Strings(l)
	return l
}

// client is one running client of a target.
type client struct {
	*target
	index    int
	sequence uint64
}

var clients = map[Kind]func(context.Context, *client){
	KeepAlive:  func(ctx context.Context, c *client) { c.http(ctx) },
	Hundred:    func(ctx context.Context, c *client) { c.http(ctx) },
	New:        func(ctx context.Context, c *client) { c.http(ctx) },
	GRPCStream: func(ctx context.Context, c *client) { c.grpc(ctx, c.stream) },
	GRPCUnary:  func(ctx context.Context, c *client) { c.grpc(ctx, c.unary) },
	Redis:      func(ctx context.Context, c *client) { c.redis(ctx) },
}

// Run runs all clients until ctx ends and each has finished its request in flight.
func (g *Generator) Run(ctx context.Context) {
	var wait sync.WaitGroup
	for _, t := range g.targets {
		for i := range t.Count {
			wait.Go(func() { clients[t.Kind](ctx, &client{target: t, index: i}) })
		}
	}
	wait.Wait()
}

// Stats returns the counters by target name.
func (g *Generator) Stats() map[string]Stats {
	all := make(map[string]Stats, len(g.targets))
	for _, t := range g.targets {
		all[t.Name] = t.stats()
	}
	return all
}

func (t *target) stats() Stats {
	s := Stats{
		At:       time.Now(),
		Requests: t.requests.Load(), Failed: t.failed.Load(), Connections: t.connections.Load(), Broken: t.broken.Load(),
		Closed: t.closed.Load(), Direct: t.direct.Load(), Proxied: t.proxied.Load(),
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s.Callees, s.Versions, s.Statuses = maps.Clone(t.callees), maps.Clone(t.versions), maps.Clone(t.statuses)
	for _, since := range t.open {
		s.Oldest = max(s.Oldest, time.Since(since).Seconds())
	}
	s.Errors = append(s.Errors, t.errors...)
	return s
}

// Sum adds the counters of all targets; it is as old as the oldest.
func Sum(all map[string]Stats) Stats {
	sum := Stats{Callees: map[string]View{}, Versions: map[string]uint64{}, Statuses: map[string]uint64{}}
	for name, s := range all {
		if sum.At.IsZero() || s.At.Before(sum.At) {
			sum.At = s.At
		}
		sum.Requests += s.Requests
		sum.Failed += s.Failed
		sum.Connections += s.Connections
		sum.Broken += s.Broken
		sum.Closed += s.Closed
		sum.Direct += s.Direct
		sum.Proxied += s.Proxied
		sum.Oldest = max(sum.Oldest, s.Oldest)
		for k, v := range s.Callees {
			sum.Callees[k] = View{sum.Callees[k].Direct + v.Direct, sum.Callees[k].Proxied + v.Proxied}
		}
		for k, v := range s.Versions {
			sum.Versions[k] += v
		}
		for k, v := range s.Statuses {
			sum.Statuses[k] += v
		}
		for _, e := range s.Errors {
			sum.Errors = append(sum.Errors, name+": "+e)
		}
	}
	sort.Strings(sum.Errors)
	return sum
}

// dial opens a connection, or counts a failure and returns nil.
func (c *client) dial(ctx context.Context) net.Conn {
	limited, cancel := context.WithTimeout(ctx, c.config.Timeout)
	defer cancel()
	conn, err := c.config.Dial(limited, "tcp", c.Address)
	if err == nil {
		c.opened()
		return conn
	}
	if ctx.Err() == nil {
		c.fail(fmt.Sprintf("connect to %s: %v", c.Address, err))
		c.backOff(ctx)
	}
	return nil
}

func (c *client) opened() {
	c.connections.Add(1)
	c.mu.Lock()
	c.open[c] = time.Now()
	c.mu.Unlock()
}

func (c *client) ended() {
	c.mu.Lock()
	delete(c.open, c)
	c.mu.Unlock()
}

const errorsKept = 20

func (c *client) note(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.errors) == errorsKept {
		c.errors = slices.Delete(c.errors, 0, 1)
	}
	c.errors = append(c.errors, time.Now().Format("15:04:05.000")+" client "+fmt.Sprint(c.index)+": "+what)
}

func (c *client) fail(what string) {
	c.failed.Add(1)
	c.note(what)
}

func (c *client) status(s string) {
	c.mu.Lock()
	c.statuses[s]++
	c.mu.Unlock()
}

func (c *client) version(v string) {
	if v == "" {
		return
	}
	c.mu.Lock()
	c.versions[v]++
	c.mu.Unlock()
}

// seen counts one answer by the callee's view of its client.
func (c *client) seen(clientAddress, serverAddress string) {
	from, _, err1 := net.SplitHostPort(clientAddress)
	at, _, err2 := net.SplitHostPort(serverAddress)
	if err1 != nil || err2 != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	v := c.callees[at]
	if net.ParseIP(from).Equal(net.ParseIP(at)) {
		v.Proxied++
		c.proxied.Add(1)
	} else {
		v.Direct++
		c.direct.Add(1)
	}
	c.callees[at] = v
}

// pause waits between two requests; false: the run is over.
func (c *client) pause(ctx context.Context) bool {
	if c.Pause == 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(time.Duration(c.Pause))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// backOff waits after a failed connection, so that a dead callee is not a busy loop.
func (c *client) backOff(ctx context.Context) {
	t := time.NewTimer(50 * time.Millisecond)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
