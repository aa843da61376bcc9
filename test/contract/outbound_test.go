package contract

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/test/contract/ads"
)

// TestOutboundChains comes to the steering ports and looks what Envoy asks for. Without the hooks the original
// destination is the address dialled, port and all.
func TestOutboundChains(t *testing.T) {
	const ipv4, ipv6 = "10.77.0.1", "fd77::1:0:0:a:1" // as both Go and Envoy write it
	for _, c := range []struct {
		port uint32
		send string
		// asked is the cluster that Envoy asks for, by IPv4 and by IPv6; none for HTTP.
		asked4, asked6 string
		reply          string
	}{
		{names.PortOutTCP, "hello\n", "tcp/10.77.0.1:15002", "tcp/[fd77::1:0:0:a:1]:15002", refused},
		{names.PortOutTCP, request, "tcp/10.77.0.1:15002", "tcp/[fd77::1:0:0:a:1]:15002", refused},
		{names.PortOutPod, "hello\n", "pod/10.77.0.1", "pod/fd77::1:0:0:a:1", refused},
		{names.PortOutAuto, "hello\n", "tcp/10.77.0.1:15003", "tcp/[fd77::1:0:0:a:1]:15003", refused},
		{names.PortOutAuto, request, "", "", "404"},
		{names.PortOutHTTP, request, "", "", "404"},
		{names.PortOutHTTP + 4, "hello\n", "", "", refused}, // no class
	} {
		t.Run(fmt.Sprintf("%d %s", c.port, strings.Fields(c.send)[0]), func(t *testing.T) {
			b := start(t)
			b.refuseClusters()
			space, path := b.netns(t)
			for _, args := range [][]string{{"addr", "add", ipv4 + "/32", "dev", "lo"}, {"addr", "add", ipv6 + "/128", "dev", "lo", "nodad"}} {
				if out, err := exec.Command("ip", append([]string{"-n", space}, args...)...).CombinedOutput(); err != nil {
					t.Fatalf("ip %v: %v: %s", args, err, out)
				}
			}
			l := move(load(t, "nodeproxy/internal/lds")["captured"].Listeners[0], "out", path)
			l.GetAddress().GetSocketAddress().PortSpecifier = &core.SocketAddress_PortValue{PortValue: c.port}
			b.Set(ads.Listeners, "out", l)
			b.acked(t, ads.Listeners, "out")
			b.listening(t, path, c.port)
			for host, want := range map[string]string{ipv4: c.asked4, "[" + ipv6 + "]": c.asked6} {
				conn, err := dialIn(path, fmt.Sprintf("%s:%d", host, c.port))
				if err != nil {
					t.Fatal(err)
				}
				if got := reply(conn, c.send); got != c.reply {
					t.Errorf("%s: %s, want %s", host, got, c.reply)
				}
				conn.Close()
				if asked := b.Asked(ads.Clusters); want != "" && !slices.Contains(asked, want) {
					t.Errorf("%s: Envoy asked for %q, not for %s", host, asked, want)
				}
			}
			if want := (c.asked4 != ""); want != (len(b.Asked(ads.Clusters)) > 0) {
				t.Errorf("Envoy asked for %q", b.Asked(ads.Clusters))
			}
			before := b.Asked(ads.Clusters)
			for _, host := range []string{"127.0.0.1", "127.64.0.9", "[::1]"} {
				conn, err := dialIn(path, fmt.Sprintf("%s:%d", host, c.port))
				if err != nil {
					t.Fatal(err)
				}
				if got := reply(conn, c.send); got != refused {
					t.Errorf("%s, whose original destination is unknown: %s", host, got)
				}
				conn.Close()
			}
			if after := b.Asked(ads.Clusters); !slices.Equal(before, after) {
				t.Errorf("an unknown destination made Envoy ask for %q", after)
			}
		})
	}
}

// refuseClusters answers every name as the controller answers an unknown one.
func (b *bench) refuseClusters() {
	secret := b.secret
	b.Answer(func(typeURL, name string) proto.Message {
		if typeURL == ads.Clusters {
			return &cluster.Cluster{Name: name, ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC},
				LoadAssignment: &endpoint.ClusterLoadAssignment{ClusterName: name}}
		}
		return secret(typeURL, name)
	})
}

// TestDestinationPicksTheRoute: the scope is the address that was dialled, whatever Host and forged headers say.
func TestDestinationPicksTheRoute(t *testing.T) {
	b := start(t)
	space, path := b.netns(t)
	for _, args := range [][]string{{"addr", "add", "10.77.0.1/32", "dev", "lo"}} {
		if out, err := exec.Command("ip", append([]string{"-n", space}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
	for key, status := range map[string]uint32{"10.77.0.1:15001": 201, "10.77.0.2:15001": 202} {
		b.Offer(ads.Routes, "route "+key, &route.RouteConfiguration{Name: "route " + key, VirtualHosts: []*route.VirtualHost{{Name: "x", Domains: []string{"*"}, Routes: []*route.Route{{
			Match:  &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
			Action: &route.Route_DirectResponse{DirectResponse: &route.DirectResponseAction{Status: status}}}}}}})
		b.Set(ads.Scopes, key, &route.ScopedRouteConfiguration{Name: key, OnDemand: true, RouteConfigurationName: "route " + key,
			Key: &route.ScopedRouteConfiguration_Key{Fragments: []*route.ScopedRouteConfiguration_Key_Fragment{{
				Type: &route.ScopedRouteConfiguration_Key_Fragment_StringKey{StringKey: key}}}}})
	}
	b.Set(ads.Listeners, "out", move(load(t, "nodeproxy/internal/lds")["captured"].Listeners[0], "out", path))
	b.acked(t, ads.Listeners, "out")
	b.acked(t, ads.Scopes, "10.77.0.2:15001")
	b.listening(t, path, names.PortOutHTTP)
	if asked := b.Asked(ads.Routes); len(asked) != 0 {
		t.Errorf("Envoy asked for routes %q before any request", asked)
	}
	for name, headers := range map[string]string{
		"plain":           "Host: a\r\n",
		"another Host":    "Host: 10.77.0.2:15001\r\n",
		"forged":          "Host: a\r\nx-weft-dst: 10.77.0.2:15001\r\n",
		"forged twice":    "Host: a\r\nX-Weft-Dst: 10.77.0.2:15001\r\nx-weft-dst: 10.77.0.2:15001\r\n",
		"named to remove": "Host: a\r\nConnection: x-weft-dst, keep-alive\r\nx-weft-dst: 10.77.0.2:15001\r\n",
	} {
		conn, err := dialIn(path, "10.77.0.1:15001")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\n"+headers+"\r\n")
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		conn.Close()
		if err != nil || response.StatusCode != 201 {
			t.Errorf("%s: %v %v", name, response, err)
		}
	}
	if asked := b.Asked(ads.Routes); !slices.Equal(asked, []string{"route 10.77.0.1:15001"}) {
		t.Errorf("Envoy asked for routes %q", asked)
	}
}

// TestFirstUseWithoutAgent: who uses a Service for the first time while nobody gives Envoy its routes is told so.
func TestFirstUseWithoutAgent(t *testing.T) {
	b := start(t)
	space, path := b.netns(t)
	if out, err := exec.Command("ip", "-n", space, "addr", "add", "10.77.0.1/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("ip: %v: %s", err, out)
	}
	const key = "10.77.0.1:15001"
	b.Set(ads.Scopes, key, &route.ScopedRouteConfiguration{Name: key, OnDemand: true, RouteConfigurationName: "route " + key,
		Key: &route.ScopedRouteConfiguration_Key{Fragments: []*route.ScopedRouteConfiguration_Key_Fragment{{
			Type: &route.ScopedRouteConfiguration_Key_Fragment_StringKey{StringKey: key}}}}})
	l := move(load(t, "nodeproxy/internal/lds")["captured"].Listeners[0], "out", path)
	for _, chain := range l.FilterChains {
		if chain.Name != "http" {
			continue
		}
		var manager hcm.HttpConnectionManager
		if err := chain.Filters[0].GetTypedConfig().UnmarshalTo(&manager); err != nil {
			t.Fatal(err)
		}
		manager.StreamIdleTimeout = durationpb.New(500 * time.Millisecond) // of 15 s
		if err := chain.Filters[0].GetTypedConfig().MarshalFrom(&manager); err != nil {
			t.Fatal(err)
		}
	}
	b.Set(ads.Listeners, "out", l)
	b.acked(t, ads.Listeners, "out")
	b.acked(t, ads.Scopes, key)
	b.listening(t, path, names.PortOutHTTP)
	b.Stop()
	conn, err := dialIn(path, key)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != 503 || !strings.HasPrefix(string(text), "weft: ") {
		t.Errorf("%d %q, %v, want 503 and weft's reason", response.StatusCode, text, err)
	}
}
