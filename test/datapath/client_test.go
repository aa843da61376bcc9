package datapath

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/wrapperspb"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/test/datapath/lab"
)

// permissive takes everybody.
func permissive(ports ...*meshv1.PortPolicy) *meshv1.InboundPolicy {
	for _, p := range ports {
		p.Mode, p.Identity = meshv1.Mode_MODE_PERMISSIVE, false
		for _, rule := range p.Allow {
			rule.Peers = nil
			rule.Requests = []*meshv1.Request{{Paths: []*meshv1.StringMatch{{Match: &meshv1.StringMatch_Prefix{Prefix: "/"}}}}}
		}
	}
	return &meshv1.InboundPolicy{DefaultPort: &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_PERMISSIVE}, Ports: ports}
}

// asker asks the apps of a server again and again, by connections that are kept, who they take it for.
type asker struct {
	pod  *lab.Pod
	name string
	ask  func(ctx context.Context) (client string, err error)
	done func()
}

// is tells whether an address is the asker's own: of the family that was dialled, or behind a VIP, whose endpoints here have
// both, of either.
func (a asker) is(seen netip.Addr, ipv6 bool) bool {
	return slices.Contains(a.pod.Addresses, seen) && (seen.Is6() == ipv6 || strings.Contains(a.name, "VIP"))
}

func host(at string) (netip.Addr, error) {
	whole, err := netip.ParseAddrPort(at)
	return whole.Addr().Unmap(), err
}

func httpAsker(pod *lab.Pod, name, to string, http2 bool) asker {
	c := client(pod, http2)
	return asker{pod, name, func(ctx context.Context) (string, error) {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+to+"/items", nil)
		if err != nil {
			return "", err
		}
		// Nobody is believed about whose address it is.
		request.Header.Set("X-Forwarded-For", "203.0.113.7")
		response, err := c.Do(request)
		if err != nil {
			return "", err
		}
		defer response.Body.Close()
		if _, err := io.Copy(io.Discard, response.Body); err != nil || response.StatusCode != http.StatusOK {
			return "", fmt.Errorf("%s, %w", response.Status, err)
		}
		return response.Header.Get("X-Client"), nil
	}, c.CloseIdleConnections}
}

func grpcAsker(pod *lab.Pod, name, to string) asker {
	conn, err := grpc.NewClient("passthrough:///"+to, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return pod.Dial(ctx, address) }))
	return asker{pod, name, func(ctx context.Context) (string, error) {
		if err != nil {
			return "", err
		}
		var answer wrapperspb.StringValue
		var header metadata.MD
		if err := conn.Invoke(ctx, "/shop.Catalogue/Get", wrapperspb.String("x"), &answer, grpc.Header(&header)); err != nil {
			return "", err
		}
		if from := header.Get("client"); len(from) == 1 {
			return from[0], nil
		}
		return "", fmt.Errorf("no client in %v", header)
	}, func() { _ = conn.Close() }}
}

// bytesAsker asks by one connection that is kept, or where the server speaks first by a new one each time.
func bytesAsker(pod *lab.Pod, name, to string, banner bool) asker {
	var conn net.Conn
	var reader *bufio.Reader
	end := func() {
		if conn != nil {
			conn.Close()
			conn = nil
		}
	}
	return asker{pod, name, func(ctx context.Context) (string, error) {
		if banner {
			end()
		}
		if conn == nil {
			var err error
			if conn, err = pod.Dial(ctx, to); err != nil {
				return "", err
			}
			reader = bufio.NewReader(conn)
		}
		deadline, _ := ctx.Deadline()
		_ = conn.SetDeadline(deadline)
		if banner {
			if _, err := reader.ReadString('\n'); err != nil {
				return "", err
			}
		} else if _, err := io.WriteString(conn, "who\n"); err != nil {
			return "", err
		}
		got, err := reader.ReadString('\n')
		return got[:max(0, len(got)-1)], err
	}, end}
}

// askers are all ways to a server's apps, for the pods given; VIPs of services are for those in the mesh.
func (m *mesh) askers(server string, ipv6 bool, pods ...*lab.Pod) (all []asker) {
	for _, pod := range pods {
		for name, to := range map[string]string{"HTTP": m.direct(server, httpPort, ipv6), "HTTP by VIP": m.Address(server, 80, ipv6),
			"HTTP by an undeclared port of the VIP": m.Address(server, 81, ipv6), "HTTP as TCP by VIP": m.Address(server, 82, ipv6)} {
			if pod.Account != "" || to == m.direct(server, httpPort, ipv6) {
				all = append(all, httpAsker(pod, name, to, false))
			}
		}
		all = append(all, httpAsker(pod, "HTTP/2", m.direct(server, h2Port, ipv6), true), grpcAsker(pod, "gRPC", m.direct(server, grpcPort, ipv6)),
			bytesAsker(pod, "bytes", m.direct(server, whoPort, ipv6), false), bytesAsker(pod, "banner", m.direct(server, bannerPort, ipv6), true))
		if pod.Account != "" {
			all = append(all, httpAsker(pod, "HTTP/2 by VIP", m.Address(server, 90, ipv6), true), grpcAsker(pod, "gRPC by VIP", m.Address(server, 91, ipv6)),
				bytesAsker(pod, "bytes by VIP", m.Address(server, whoPort, ipv6), false), bytesAsker(pod, "banner by VIP", m.Address(server, bannerPort, ipv6), true))
		}
	}
	return all
}

// interleave lets all askers ask at once, each so often, and counts the answers that name somebody else.
func interleave(t *testing.T, askers []asker, rounds int, right func(a asker, seen netip.Addr) bool) {
	t.Helper()
	var wrong, asked atomic.Int64
	var wait sync.WaitGroup
	for _, a := range askers {
		wait.Go(func() {
			defer a.done()
			for range rounds {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				got, err := a.ask(ctx)
				cancel()
				asked.Add(1)
				if err != nil {
					t.Errorf("%s asks by %s: %v", a.pod.Name, a.name, err)
					return
				}
				if client, err := host(got); err != nil || !right(a, client) {
					if wrong.Add(1) < 10 {
						t.Errorf("%s asks by %s: the app sees %s", a.pod.Name, a.name, got)
					}
				}
			}
		})
	}
	wait.Wait()
	t.Logf("%d asked by %d ways, %d wrong", asked.Load(), len(askers), wrong.Load())
}

// TestClientAddress: every request and connection is seen by the app as its client's own.
func TestClientAddress(t *testing.T) {
	m := enrolled(t)
	client, other, stranger := m.Pod("client"), m.Pod("other"), m.Pod("stranger")
	peers := []*lab.Pod{client, other}

	for chains, policy := range map[string]func() *meshv1.InboundPolicy{
		"L4 chains": func() *meshv1.InboundPolicy { return strict() },
		"L7 chains": func() *meshv1.InboundPolicy {
			return strict(allowAll(httpPort), allowAll(h2Port), allowAll(grpcPort))
		},
		"Permissive, with strangers": func() *meshv1.InboundPolicy { return permissive() },
		"Permissive with rules, with strangers": func() *meshv1.InboundPolicy {
			return permissive(allowAll(httpPort), allowAll(h2Port), allowAll(grpcPort))
		},
	} {
		t.Run(chains, func(t *testing.T) {
			m.policy(policy())
			everywhere(t, func(t *testing.T, server string, ipv6 bool) {
				pods := append([]*lab.Pod{m.Pod(server)}, peers...) // a pod that calls itself, too
				if policy().DefaultPort.Mode == meshv1.Mode_MODE_PERMISSIVE {
					pods = append(pods, stranger)
				}
				interleave(t, m.askers(server, ipv6, pods...), 50, func(a asker, seen netip.Addr) bool { return a.is(seen, ipv6) })
			})
		})
	}

	t.Run("no privilege is used", func(t *testing.T) {
		for node := range 2 {
			counters, err := m.Kernel(node)
			if err != nil || counters["client_unknown"]+counters["leg_refused_limit"]+counters["refused_leg_address"] != 0 {
				t.Errorf("node %d: %v, %v", node, counters, err)
			}
		}
	})

	t.Run("the setting changes under load and loses nothing", func(t *testing.T) {
		defer func() { _ = m.ClientAddress(false) }()
		for chains, policy := range map[string]*meshv1.InboundPolicy{"L4 chains": strict(), "L7 chains": strict(allowAll(httpPort), allowAll(h2Port))} {
			m.policy(policy)
			for _, server := range []string{"near", "far"} {
				loads := []*load{start(client, m.Address(server, 80, false), false, 8, time.Millisecond), start(other, m.Address(server, 90, true), true, 8, time.Millisecond)}
				held := hold(t, client, m.Address(server, echoPort, false))
				for _, own := range []bool{true, false, true, false} {
					if err := m.ClientAddress(own); err != nil {
						t.Fatal(err)
					}
					ask := bytesAsker(client, "bytes", m.direct(server, whoPort, false), false)
					interleave(t, []asker{ask}, 1, func(a asker, seen netip.Addr) bool {
						return own && seen == m.Pod(server).Addresses[0] || !own && a.is(seen, false)
					})
					for _, l := range loads {
						l.more(t, 100)
					}
				}
				if err := held.echo(); err != nil {
					t.Errorf("%s, %s: an open connection: %v", chains, server, err)
				}
				for _, l := range loads {
					if total, failed := l.stop(); failed != nil {
						t.Errorf("%s, %s: of %d requests: %v", chains, server, total, failed)
					}
				}
			}
		}
		m.policy(strict())
	})
}

// TestManyClients: each client has connections of its own to the app, and Envoy keeps none of them for long.
func TestManyClients(t *testing.T) {
	const clients, rounds = 2000, 2
	m := enrolled(t)
	stranger := m.Pod("stranger")
	if err := stranger.Claim("fd88:0::1:0/112"); err != nil {
		t.Fatal(err)
	}
	m.policy(permissive(allowAll(httpPort)))
	var wait sync.WaitGroup
	for i, server := range []string{"near", "far"} {
		wait.Go(func() {
			next := netip.MustParseAddr(fmt.Sprintf("fd88::1:%x", 1+i*clients*rounds))
			before, _ := m.Memory(node(server))
			more := func() int64 {
				now, err := m.Memory(node(server))
				if err != nil || before == 0 {
					t.Errorf("%s: read Envoy's memory: %v", server, err)
				}
				return (int64(now) - int64(before)) >> 10
			}
			kept := func() uint64 {
				n, err := m.Stat(node(server), "cluster."+names.ClusterLocalH1+".upstream_cx_active")
				if err != nil {
					t.Errorf("%s: %v", server, err)
				}
				return n
			}
			for round := range rounds {
				wrong := m.manyAsk(stranger, server, next, clients)
				for range clients {
					next = next.Next()
				}
				open := kept()
				if open == 0 {
					t.Errorf("%s: no connection to the app is kept for its client's next request", server)
				}
				t.Logf("%s, round %d: %d clients, %d wrong; %d connections to the app are kept; Envoy holds %d KiB more than before", server, round, clients, wrong, open, more())
				eventually(t, func() error {
					if n := kept(); n > 0 {
						return fmt.Errorf("%d connections to the app are kept", n)
					}
					return nil
				})
			}
			t.Logf("%s: in the end Envoy holds %d KiB more than before", server, more())
		})
	}
	wait.Wait()
}

// manyAsk lets each of n clients ask once, 16 at a time, and counts those whom the app did not see as themselves.
func (m *mesh) manyAsk(pod *lab.Pod, server string, first netip.Addr, n int) int64 {
	var wrong atomic.Int64
	var wait sync.WaitGroup
	work := make(chan netip.Addr)
	for range 16 {
		wait.Go(func() {
			for from := range work {
				if err := askFrom(pod, from, m.direct(server, httpPort, true)); err != nil && wrong.Add(1) < 10 {
					m.t.Errorf("%s: %v", server, err)
				}
			}
		})
	}
	for range n {
		work <- first
		first = first.Next()
	}
	close(work)
	wait.Wait()
	return wrong.Load()
}

// askFrom asks once from an address, and fails unless the app sees that one.
func askFrom(pod *lab.Pod, from netip.Addr, to string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := pod.DialFrom(ctx, from, to)
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	if _, err := fmt.Fprintf(conn, "GET /items HTTP/1.1\r\nHost: shop\r\n\r\n"); err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if seen, err := host(response.Header.Get("X-Client")); err != nil || seen != from {
		return errors.Join(err, fmt.Errorf("%s asks: the app sees %s", from, seen))
	}
	return nil
}
