// Package datapath proves the whole path without Kubernetes: real hooks, real Envoys, the resources of both builders.
package datapath

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/test/datapath/lab"
)

func TestDataPath(t *testing.T) {
	m := enrolled(t)
	client, other, stranger := m.Pod("client"), m.Pod("other"), m.Pod("stranger")

	t.Run("every protocol", func(t *testing.T) {
		everywhere(t, func(t *testing.T, server string, ipv6 bool) {
			for name, call := range map[string]struct {
				to    string
				http2 bool
				want  string
			}{
				"HTTP":                {m.Address(server, 80, ipv6), false, "HTTP/1.1 /items 0"},
				"HTTP/2":              {m.Address(server, 90, ipv6), true, "HTTP/2.0 /items 0"},
				"undeclared":          {m.Address(server, 81, ipv6), false, "HTTP/1.1 /items 0"},
				"HTTP declared TCP":   {m.Address(server, 82, ipv6), false, "HTTP/1.1 /items 0"},
				"HTTP, pod address":   {m.direct(server, httpPort, ipv6), false, "HTTP/1.1 /items 0"},
				"HTTP/2, pod address": {m.direct(server, h2Port, ipv6), true, "HTTP/2.0 /items 0"},
			} {
				status, body, err := get(client, call.to, "/items", call.http2)
				if err != nil || status != 200 || body != call.want {
					t.Errorf("%s: %d %q %v", name, status, body, err)
				}
			}
			for name, to := range map[string]string{"service": m.Address(server, echoPort, ipv6), "pod": m.direct(server, echoPort, ipv6)} {
				if got, err := line(client, to, "hello\n"); err != nil || got != "hello" {
					t.Errorf("echo by %s: %q %v", name, got, err)
				}
			}
			for name, to := range map[string]string{"service": m.Address(server, bannerPort, ipv6), "pod": m.direct(server, bannerPort, ipv6)} {
				if got, err := line(client, to, ""); err != nil || got != "banner of "+server {
					t.Errorf("banner by %s: %q %v", name, got, err)
				}
			}
		})
	})

	t.Run("calls share connections", m.pooled)
	t.Run("routes", m.routed)
	t.Run("gRPC routes", m.called)

	t.Run("a client stays at its endpoint where the service says so", func(t *testing.T) {
		for service, want := range map[string]int{"both": 2, "sticky": 1} {
			http, tcp := map[string]bool{}, map[string]bool{}
			for range 40 {
				status, header, err := header(client, m.Address(service, 80, false))
				if err != nil || status != 200 {
					t.Fatalf("%s: %d %v", service, status, err)
				}
				http[header.Get("X-Pod")] = true
				banner, err := line(client, m.Address(service, bannerPort, false), "")
				if err != nil {
					t.Fatalf("%s: %v", service, err)
				}
				tcp[banner] = true
			}
			if len(http) != want || len(tcp) != want {
				t.Errorf("%s: HTTP reached %v, TCP %v, want %d", service, http, tcp, want)
			}
		}
	})

	t.Run("peers' certificates name both sides", func(t *testing.T) {
		for _, server := range []string{"near", "far"} {
			m.logged(t, server, object{"kind": "connection", "direction": "in", "peer": client.ID(), "local": m.Pod(server).ID(), "chain": "any/weft-l4"})
		}
	})

	t.Run("a stranger's plaintext", func(t *testing.T) {
		everywhere(t, func(t *testing.T, server string, ipv6 bool) {
			before := m.apps[server].total()
			if status, _, err := get(stranger, m.direct(server, httpPort, ipv6), "/", false); err == nil {
				t.Errorf("HTTP was answered %d", status)
			}
			if got, err := line(stranger, m.direct(server, bannerPort, ipv6), ""); err == nil {
				t.Errorf("the banner came: %q", got)
			}
			if got, err := line(stranger, m.direct(server, echoPort, ipv6), "hello\n"); err == nil {
				t.Errorf("the echo came: %q", got)
			}
			if after := m.apps[server].total(); after != before {
				t.Errorf("the apps saw %d connections", after-before)
			}
		})
	})

	t.Run("an app's own TLS", func(t *testing.T) {
		everywhere(t, func(t *testing.T, server string, ipv6 bool) {
			for _, to := range []string{m.Address(server, 443, ipv6), m.Address(server, 444, ipv6), m.direct(server, tlsPort, ipv6)} {
				if err := echoTLS(client, to); err != nil {
					t.Errorf("a peer to %s: %v", to, err)
				}
			}
			before := m.apps[server].total()
			if err := echoTLS(stranger, m.direct(server, tlsPort, ipv6)); err == nil {
				t.Error("a stranger's TLS reached a Strict pod")
			}
			if after := m.apps[server].total(); after != before {
				t.Errorf("the apps saw %d connections", after-before)
			}
		})
	})

	t.Run("a client that is silent or never ends its hello", func(t *testing.T) {
		everywhere(t, func(t *testing.T, server string, ipv6 bool) {
			before, refused := m.apps[server].total(), m.refused(t, server)
			for name, send := range map[string]io.Reader{"silent": strings.NewReader(""), "oversized ClientHello": oversizedHello()} {
				if err := closedAfter(stranger, m.direct(server, httpPort, ipv6), send); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				eventually(t, func() error {
					if now := m.refused(t, server); now <= refused {
						return fmt.Errorf("%s: refusals counted: %d, %d before", name, now, refused)
					}
					return nil
				})
				refused = m.refused(t, server)
			}
			if after := m.apps[server].total(); after != before {
				t.Errorf("the apps saw %d connections", after-before)
			}
		})
	})

	t.Run("an identity that is not allowed, before the app sees a connection", func(t *testing.T) {
		m.policy(strict(only(bannerPort, false, other.ID()), only(echoPort, false, other.ID())))
		everywhere(t, func(t *testing.T, server string, ipv6 bool) {
			before := m.apps[server].total()
			for _, to := range []string{m.Address(server, bannerPort, ipv6), m.direct(server, bannerPort, ipv6)} {
				if got, err := line(client, to, ""); err == nil {
					t.Errorf("%s: the banner came: %q", to, got)
				}
			}
			if got, err := line(client, m.Address(server, echoPort, ipv6), "hello\n"); err == nil {
				t.Errorf("the echo came: %q", got)
			}
			if after := m.apps[server].total(); after != before {
				t.Errorf("the apps saw %d connections", after-before)
			}
			if got, err := line(other, m.Address(server, bannerPort, ipv6), ""); err != nil || got != "banner of "+server {
				t.Errorf("the allowed one: %q %v", got, err)
			}
			m.logged(t, server, object{"kind": "connection", "direction": "in", "failure": regexp.MustCompile("CERTIFICATE_VERIFY_FAILED")})
			if denied, err := m.Stat(node(server), "listener.in-uid-"+server+".ssl.fail_verify_san"); err != nil || denied == 0 {
				t.Errorf("denials counted: %d %v", denied, err)
			}
		})
		m.policy(strict())
		if got, err := line(client, m.Address("far", bannerPort, false), ""); err != nil || got != "banner of far" {
			t.Errorf("after the rule went: %q %v", got, err)
		}
	})

	t.Run("a request that is not allowed", func(t *testing.T) {
		m.policy(strict(noAdmin(httpPort), only(h2Port, true, other.ID())))
		everywhere(t, func(t *testing.T, server string, ipv6 bool) {
			for name, c := range map[string]struct {
				from  *lab.Pod
				to    string
				path  string
				http2 bool
				want  int
			}{
				"denied path":                  {client, m.Address(server, 80, ipv6), "/admin", false, 403},
				"another path":                 {client, m.Address(server, 80, ipv6), "/items", false, 200},
				"denied path, TCP service":     {client, m.Address(server, 82, ipv6), "/admin", false, 403},
				"denied path, pod address":     {client, m.direct(server, httpPort, ipv6), "/admin", false, 403},
				"another, pod address":         {client, m.direct(server, httpPort, ipv6), "/items", false, 200},
				"denied path, undeclared":      {client, m.Address(server, 81, ipv6), "/admin", false, 403},
				"HTTP/2 of who is not allowed": {client, m.Address(server, 90, ipv6), "/", true, 403},
				"HTTP/2 of who is":             {other, m.Address(server, 90, ipv6), "/", true, 200},
			} {
				status, body, err := get(c.from, c.to, c.path, c.http2)
				// Bytes of HTTP/2 for a port that declares nothing cannot be parsed: not tried here.
				if err != nil || status != c.want {
					t.Errorf("%s: %d %q %v, want %d", name, status, body, err, c.want)
				}
			}
			m.logged(t, server, object{"kind": "request", "direction": "in", "status": 403.0, "peer": client.ID(), "path": "/admin",
				"details": regexp.MustCompile(`^rbac_access_denied_matched_policy\[shop/no-admin\[0\]\]$`)})
			if denied, err := m.Stat(node(server), fmt.Sprintf("http.in-uid-%s-%d.rbac.denied", server, httpPort)); err != nil || denied == 0 {
				t.Errorf("denials counted: %d %v", denied, err)
			}
		})
		m.policy(strict())
	})

	t.Run("a connection that outlives its permission is cut", func(t *testing.T) {
		for _, server := range []string{"near", "far"} {
			held := hold(t, client, m.Address(server, echoPort, false))
			spared := hold(t, other, m.Address(server, echoPort, false))
			m.begin(strict(only(echoPort, false, other.ID())), 1)
			if _, err := line(client, m.Address(server, echoPort, false), "x\n"); err == nil {
				t.Errorf("%s: a new connection was accepted", server)
			}
			if err := held.echo(); err != nil {
				t.Errorf("%s: the rule alone cut the old connection: %v", server, err)
			}
			moved := hold(t, other, m.Address(server, echoPort, false))
			m.end()
			begin := time.Now()
			eventually(t, func() error {
				if held.echo() == nil {
					return errors.New("the old connection lives")
				}
				return nil
			})
			if took := time.Since(begin); took > 10*time.Second {
				t.Errorf("%s: the old connection was cut after %v", server, took)
			}
			if err := moved.echo(); err != nil {
				t.Errorf("%s: a connection that was made under the new rule was cut: %v", server, err)
			}
			moved.conn.Close()
			spared.conn.Close()
			m.policy(strict())
		}
	})

	t.Run("L4 to L7 and back under load", func(t *testing.T) {
		for _, c := range []struct {
			server string
			port   uint16
			http2  bool
		}{{"near", 80, false}, {"far", 80, false}, {"near", 90, true}, {"far", 90, true}} {
			m.policy(strict(asBytes(httpPort), asBytes(h2Port)))
			load := start(client, m.Address(c.server, c.port, false), c.http2, 16, 10*time.Millisecond)
			judged := func() uint64 {
				n, err := m.Stat(node(c.server), fmt.Sprintf("http.in-uid-%s-%d.rbac.allowed", c.server, map[bool]int{false: httpPort, true: h2Port}[c.http2]))
				if err != nil {
					t.Error(err)
				}
				return n
			}
			before := judged()
			for range 2 {
				load.more(t, 200)
				m.policy(strict(allowAll(httpPort), allowAll(h2Port)))
				load.more(t, 200)
				m.policy(strict(asBytes(httpPort), asBytes(h2Port)))
			}
			load.more(t, 200)
			total, failed := load.stop()
			t.Logf("%s:%d: %d requests, %d of them judged one by one", c.server, c.port, total, judged()-before)
			if failed != nil {
				t.Errorf("%s:%d: %v", c.server, c.port, failed)
			}
			if judged() == before {
				t.Errorf("%s:%d: no request went through the L7 chain", c.server, c.port)
			}
		}
	})

	t.Run("without moving the pools the load sees losses", func(t *testing.T) {
		m.policy(strict(asBytes(httpPort)))
		load := start(client, m.Address("far", 80, false), false, 16, 0)
		load.more(t, 200)
		m.Pod("far").Policy = strict(allowAll(httpPort))
		m.apply()
		eventually(t, func() error {
			if load.failed() == nil {
				return errors.New("no request has failed")
			}
			return nil
		})
		_, _ = load.stop()
		m.policy(strict())
	})

	t.Run("bodies, upgrades, halves", func(t *testing.T) {
		for _, judged := range []bool{false, true} {
			if judged {
				m.policy(strict(allowAll(httpPort)))
			}
			for _, server := range []string{"near", "far"} {
				if err := upload(client, m.Address(server, 80, false), 64<<20); err != nil {
					t.Errorf("%s, judged %v: 64 MiB: %v", server, judged, err)
				}
				if err := download(client, m.Address(server, 80, false)); err != nil {
					t.Errorf("%s, judged %v: 64 MiB back: %v", server, judged, err)
				}
				if err := stream(client, m.Address(server, 80, false)); err != nil {
					t.Errorf("%s, judged %v: events: %v", server, judged, err)
				}
				if err := upgrade(client, m.Address(server, 80, false)); err != nil {
					t.Errorf("%s, judged %v: WebSocket: %v", server, judged, err)
				}
				if err := trailer(client, m.Address(server, 80, false)); err != nil {
					t.Errorf("%s, judged %v: trailers: %v", server, judged, err)
				}
				if err := halfClose(client, m.Address(server, echoPort, false)); err != nil {
					t.Errorf("%s, judged %v: half-close: %v", server, judged, err)
				}
				if err := serverHalfClose(client, m.Address(server, halfPort, false)); err != nil {
					t.Errorf("%s, judged %v: half-close by the server: %v", server, judged, err)
				}
			}
		}
		m.policy(strict())
	})

	t.Run("a stream that is silent for longer than a route may take", func(t *testing.T) {
		// One server passes bytes, the other parses.
		m.Pod("near").Policy, m.Pod("far").Policy = strict(), strict(allowAll(httpPort))
		m.apply()
		m.Bump()
		m.apply()
		var wait sync.WaitGroup
		for _, server := range []string{"near", "far"} {
			wait.Go(func() {
				if err := silent(client, m.Address(server, 80, false), 17*time.Second); err != nil {
					t.Errorf("%s: %v", server, err)
				}
			})
		}
		wait.Wait()
		m.policy(strict())
	})

	t.Run("Permissive", func(t *testing.T) {
		m.policy(&meshv1.InboundPolicy{DefaultPort: &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_PERMISSIVE}, Ports: []*meshv1.PortPolicy{{Port: h2Port, Mode: meshv1.Mode_MODE_STRICT}}})
		everywhere(t, func(t *testing.T, server string, ipv6 bool) {
			if status, _, err := get(stranger, m.direct(server, httpPort, ipv6), "/", false); err != nil || status != 200 {
				t.Errorf("a stranger's HTTP: %d %v", status, err)
			}
			if got, err := line(stranger, m.direct(server, echoPort, ipv6), "hello\n"); err != nil || got != "hello" {
				t.Errorf("a stranger's bytes: %q %v", got, err)
			}
			if err := echoTLS(stranger, m.direct(server, tlsPort, ipv6)); err != nil {
				t.Errorf("a stranger's own TLS: %v", err)
			}
			if status, _, err := get(stranger, m.direct(server, h2Port, ipv6), "/", true); err == nil {
				t.Errorf("a stranger on the Strict port: %d", status)
			}
			if status, _, err := get(client, m.Address(server, 80, ipv6), "/", false); err != nil || status != 200 {
				t.Errorf("a peer: %d %v", status, err)
			}
			fastest := time.Hour
			for range 5 {
				begin := time.Now()
				if got, err := line(stranger, m.direct(server, bannerPort, ipv6), ""); err != nil || got != "banner of "+server {
					t.Errorf("a stranger's banner: %q %v", got, err)
				}
				fastest = min(fastest, time.Since(begin))
			}
			if fastest > 500*time.Millisecond {
				t.Errorf("the banner took %v: an inspector waited for the client", fastest)
			}
		})
		m.policy(strict())
	})
}
