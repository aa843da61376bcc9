package contract

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/test/contract/ads"
	"github.com/weftmesh/weft/test/contract/proxy"
)

const (
	front   = "spiffe://cluster.local/ns/shop/sa/front"
	reports = "spiffe://cluster.local/ns/shop/sa/reports"
	batch   = "spiffe://cluster.local/ns/batch/sa/job"
)

// date is what the app says; Envoy adds one where none is.
const date = "Mon, 01 Jan 2024 00:00:00 GMT"

// withoutHooks lets the last hop come from where Envoy is: without the hooks, and to the one address of these tests' app, it
// cannot come from a client's.
func withoutHooks(l *listener.Listener) *listener.Listener {
	l.ListenerFilters = slices.DeleteFunc(l.ListenerFilters, func(f *listener.ListenerFilter) bool { return f.Name == "envoy.filters.listener.original_src" })
	return l
}

// app answers requests with what it was sent, and anything else with "BYTES".
func app(t *testing.T) (address *net.TCPAddr, seen func() int) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	counted := make(chan int, 1)
	counted <- 0
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			counted <- 1 + <-counted
			go func() {
				defer conn.Close()
				reader := bufio.NewReader(conn)
				for {
					line, err := reader.ReadString('\n')
					if !strings.Contains(line, " HTTP/1.") {
						if len(line) > 0 {
							fmt.Fprint(conn, "BYTES\n")
						}
						return
					}
					request := line
					for err == nil && line != "\r\n" {
						line, err = reader.ReadString('\n')
						request += line
					}
					fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nServer: app\r\nDate: "+date+"\r\nContent-Length: %d\r\n\r\n%s", len(request), request)
				}
			}()
		}
	}()
	return listener.Addr().(*net.TCPAddr), func() int { n := <-counted; counted <- n; return n }
}

// localAt stands in for the last hop, which needs the kernel's hooks.
func localAt(address *net.TCPAddr) *cluster.Cluster {
	return &cluster.Cluster{
		Name: names.ClusterLocalH1, ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC},
		LoadAssignment: &endpoint.ClusterLoadAssignment{ClusterName: names.ClusterLocalH1, Endpoints: []*endpoint.LocalityLbEndpoints{{
			LbEndpoints: []*endpoint.LbEndpoint{{HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{
				Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
					Address: address.IP.String(), PortSpecifier: &core.SocketAddress_PortValue{PortValue: uint32(address.Port)}}}}}}}}}}},
	}
}

// dialIn connects from inside a network namespace.
func dialIn(path, address string) (net.Conn, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := netns.Get()
	if err != nil {
		return nil, err
	}
	defer own.Close()
	there, err := netns.GetFromPath(path)
	if err != nil {
		return nil, err
	}
	defer there.Close()
	if err := netns.Set(there); err != nil {
		return nil, err
	}
	defer netns.Set(own)
	conn, err := (&net.Dialer{Timeout: 10 * time.Second, FallbackDelay: -1}).Dial("tcp", address)
	if err == nil {
		err = conn.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return conn, err
}

const refused = "refused"

// reply says what came back: a status code, "bytes" or refused. The app answers with the request that it got, which says the
// same of the client's connection whether it came by TLS or not.
func reply(conn io.ReadWriter, send string) string {
	if _, err := io.WriteString(conn, send); err != nil {
		return refused
	}
	r := bufio.NewReader(conn)
	line, err := r.ReadString('\n')
	switch fields := strings.Fields(line); {
	case strings.HasPrefix(line, "HTTP/1.") && len(fields) > 1:
		response, err := http.ReadResponse(bufio.NewReader(io.MultiReader(strings.NewReader(line), r)), nil)
		if err != nil {
			return err.Error()
		}
		defer response.Body.Close()
		if seen, _ := io.ReadAll(response.Body); bytes.Contains(bytes.ToLower(seen), []byte("x-forwarded-proto: https")) {
			return fields[1] + ", and the app takes the connection for TLS"
		}
		return fields[1]
	case line == "BYTES\n":
		return "bytes"
	case err != nil:
		return refused
	}
	return fmt.Sprintf("%q", line)
}

// listening waits until the listener accepts.
func (b *bench) listening(t *testing.T, netns string, port uint32) {
	t.Helper()
	ctx, cancel := ads.Deadline(t.Context())
	defer cancel()
	err := proxy.Until(ctx, func() error {
		conn, err := dialIn(netns, fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			conn.Close()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// caller is one way to come to a port.
type caller func(t *testing.T, b *bench, conn net.Conn) string

func plaintext(send string) caller {
	return func(_ *testing.T, _ *bench, conn net.Conn) string { return reply(conn, send) }
}

const request = "GET /items HTTP/1.1\r\nHost: shop\r\n\r\n"

// ownTLS is an app's own TLS: "bytes" when it reaches the app (which does not speak it).
func ownTLS(protocols ...string) caller {
	return func(_ *testing.T, _ *bench, conn net.Conn) string {
		err := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: "shop", NextProtos: protocols}).Handshake()
		if err != nil && strings.Contains(err.Error(), "first record does not look like a TLS handshake") {
			return "bytes"
		}
		return refused
	}
}

// meshTLS is mesh mTLS as an identity ("": without certificate), offering protocols: what was agreed, and the reply.
func meshTLS(id, send string, offer ...string) caller {
	return func(t *testing.T, b *bench, conn net.Conn) string {
		cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: offer}
		if id != "" {
			pair, err := b.authority.KeyPair(id)
			if err != nil {
				t.Fatal(err)
			}
			cfg.Certificates = []tls.Certificate{pair}
		}
		secure := tls.Client(conn, cfg)
		if err := secure.Handshake(); err != nil {
			return refused
		}
		agreed := secure.ConnectionState().NegotiatedProtocol
		if agreed == names.ALPNH2 {
			// HTTP/2 speaks here: its settings come as soon as the certificate is accepted.
			if _, err := io.WriteString(secure, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
				return refused
			}
			if n, _ := secure.Read(make([]byte, 64)); n == 0 {
				return refused
			}
			return agreed
		}
		got := reply(secure, send)
		if got == refused {
			return refused
		}
		return agreed + " " + got
	}
}

// pipe keeps what is written, and has nothing to read.
type pipe struct {
	net.Conn
	wrote *bytes.Buffer
}

func (p pipe) Write(b []byte) (int, error) { return p.wrote.Write(b) }
func (p pipe) Read([]byte) (int, error)    { return 0, io.EOF }

// stalled sends the ClientHello of mesh mTLS, then waits: refused, when the other side ends the connection.
func stalled(offer ...string) caller {
	return func(t *testing.T, _ *bench, conn net.Conn) string {
		if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
			t.Fatal(err)
		}
		var hello bytes.Buffer
		_ = tls.Client(pipe{conn, &hello}, &tls.Config{InsecureSkipVerify: true, NextProtos: offer}).Handshake()
		if _, err := conn.Write(hello.Bytes()); err != nil {
			t.Fatal(err)
		}
		var late net.Error
		if _, err := io.Copy(io.Discard, conn); errors.As(err, &late) && late.Timeout() {
			return "still open"
		}
		return refused
	}
}

func stranger(t *testing.T) *ads.Authority {
	other, err := ads.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	return other
}

// foreignCA has the right name from the wrong CA.
func foreignCA(id string, offer ...string) caller {
	return func(t *testing.T, b *bench, conn net.Conn) string {
		return meshTLS(id, request, offer...)(t, &bench{authority: stranger(t)}, conn)
	}
}

// TestInboundChains comes to ports in every way, through the listeners of the golden files, and looks which chain
// answers. The last hop is a stand-in.
func TestInboundChains(t *testing.T) {
	h1, h2, tcp := names.ALPNOfferH1, names.ALPNOfferH2, names.ALPNOfferTCP
	get, admin := request, "GET /admin/x HTTP/1.1\r\nHost: shop\r\n\r\n"
	meshRefused := map[string]struct {
		call caller
		want string
	}{
		"mesh without certificate":  {meshTLS("", get, h1...), refused},
		"certificate of another CA": {foreignCA(front, h1...), refused},
	}
	type attempt = struct {
		call caller
		want string
	}
	for _, c := range []struct {
		golden   string
		port     uint32
		attempts map[string]attempt
	}{
		{"permissive", 8080, map[string]attempt{
			"HTTP":                       {plaintext(get), "200"},
			"HTTP/1.0":                   {plaintext("GET / HTTP/1.0\r\n\r\n"), "200"},
			"bytes":                      {plaintext("hello\n"), "bytes"},
			"own TLS":                    {ownTLS(), "bytes"},
			"own TLS offering http/1.1":  {ownTLS("http/1.1"), "bytes"},
			"own TLS offering h2 and h1": {ownTLS("h2", "http/1.1"), "bytes"},
			"mesh h1":                    {meshTLS(front, get, h1...), "weft-l4 200"},
			"mesh h2":                    {meshTLS(front, "hello\n", h2...), "weft-l4 bytes"},
			"mesh tcp":                   {meshTLS(front, "hello\n", tcp...), "weft-l4 bytes"},
		}},
		{"strict", 8080, map[string]attempt{
			"HTTP":                    {plaintext(get), refused},
			"bytes":                   {plaintext("hello\n"), refused},
			"own TLS":                 {ownTLS(), refused},
			"own TLS offering h1":     {ownTLS("http/1.1"), refused},
			"a wrong mesh offer":      {meshTLS(front, get, "weft-l4"), refused},
			"an offer in wrong order": {meshTLS(front, get, "weft-h1", "weft-l4"), refused},
			"a handshake that stops":  {stalled(tcp...), refused},
			"mesh h1":                 {meshTLS(front, get, h1...), "weft-l4 200"},
			"mesh tcp":                {meshTLS(front, "hello\n", tcp...), "weft-l4 bytes"},
		}},
		{"strict-allow-l4", 6379, map[string]attempt{
			"the allowed one": {meshTLS(front, "hello\n", tcp...), "weft-l4 bytes"},
			"another":         {meshTLS(reports, "hello\n", tcp...), refused},
			"plain":           {plaintext("hello\n"), refused},
		}},
		{"strict-allow-l4", 7000, map[string]attempt{"another port": {meshTLS(reports, "hello\n", tcp...), "weft-l4 bytes"}}},
		{"strict-deny-l4", 7000, map[string]attempt{
			"not denied":          {meshTLS(front, "hello\n", tcp...), "weft-l4 bytes"},
			"longer than denied":  {meshTLS(reports+"x", "hello\n", tcp...), "weft-l4 bytes"},
			"denied by name":      {meshTLS(reports, "hello\n", tcp...), refused},
			"denied by namespace": {meshTLS(batch, get, h1...), refused},
		}},
		{"permissive-identity", 6379, map[string]attempt{
			"not denied":            {meshTLS(front, "hello\n", tcp...), "weft-l4 bytes"},
			"denied":                {meshTLS(batch, "hello\n", tcp...), refused},
			"denied, in plaintext":  {plaintext("hello\n"), refused},
			"denied, with own TLS":  {ownTLS(), refused},
			"denied, in plain HTTP": {plaintext(get), refused},
		}},
		{"nobody", 7000, map[string]attempt{
			"mesh":  {meshTLS(front, "hello\n", tcp...), refused},
			"plain": {plaintext("hello\n"), refused},
			"HTTP":  {plaintext(get), refused},
		}},
		{"closed-port", 8080, map[string]attempt{"mesh": {meshTLS(front, get, h1...), refused}, "plain": {plaintext(get), refused}}},
		{"closed-port", 8081, map[string]attempt{"mesh": {meshTLS(front, get, h1...), "weft-l4 200"}}},
		{"policy-missing", 8080, map[string]attempt{"mesh": {meshTLS(front, get, h1...), refused}, "plain": {plaintext(get), refused}}},
		{"mode-missing", 8080, map[string]attempt{"mesh": {meshTLS(front, get, h1...), refused}, "plain": {plaintext(get), refused}}},
		{"port-twice", 80, map[string]attempt{"mesh": {meshTLS(front, get, h1...), refused}, "plain": {plaintext(get), refused}}},
		{"server-first-http-rule", 3306, map[string]attempt{"mesh": {meshTLS(front, get, tcp...), refused}, "plain": {plaintext(get), refused}}},
		{"strict-http", 8080, map[string]attempt{
			"allowed":                  {meshTLS(front, get, h1...), "weft-h1 200"},
			"allowed, forwarded bytes": {meshTLS(front, get, tcp...), "weft-h1 200"},
			"another method":           {meshTLS(front, "PUT /items HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", h1...), "weft-h1 403"},
			"a header missing":         {meshTLS(front, "POST /x HTTP/1.1\r\nHost: a\r\nx-tier: gold\r\nContent-Length: 0\r\n\r\n", h1...), "weft-h1 403"},
			"both headers":             {meshTLS(front, "POST /x HTTP/1.1\r\nHost: a\r\nx-tier: gold\r\nX-Reason: y\r\nContent-Length: 0\r\n\r\n", h1...), "weft-h1 200"},
			"denied by namespace":      {meshTLS(batch, get, h1...), "weft-h1 403"},
			"denied by name":           {meshTLS(reports, get, h1...), "weft-h1 403"},
			"a namespace by prefix":    {meshTLS("spiffe://cluster.local/ns/team/sa/x", get, h1...), "weft-h1 200"},
			"not allowed":              {meshTLS("spiffe://cluster.local/ns/other/sa/x", get, h1...), "weft-h1 403"},
			"a denied path":            {meshTLS(front, admin, h1...), "weft-h1 403"},
			"it with dots":             {meshTLS(front, "GET /items/../admin HTTP/1.1\r\nHost: a\r\n\r\n", h1...), "weft-h1 403"},
			"it with two slashes":      {meshTLS(front, "GET //admin HTTP/1.1\r\nHost: a\r\n\r\n", h1...), "weft-h1 403"},
			"it with an escaped slash": {meshTLS(front, "GET /items%2F..%2Fadmin HTTP/1.1\r\nHost: a\r\n\r\n", h1...), "weft-h1 400"},
			"a denied pattern":         {meshTLS(front, "GET /v1/internal HTTP/1.1\r\nHost: a\r\n\r\n", h1...), "weft-h1 403"},
			"a header twice":           {meshTLS(front, "POST /x HTTP/1.1\r\nHost: a\r\nx-tier: gold\r\nX-TIER: silver\r\nX-Reason: y\r\nContent-Length: 0\r\n\r\n", h1...), "weft-h1 403"},
			"it first and last":        {meshTLS(front, "POST /x HTTP/1.1\r\nHost: a\r\nx-tier: silver\r\nx-tier: gold\r\nX-Reason: y\r\nContent-Length: 0\r\n\r\n", h1...), "weft-h1 403"},
			"it with more behind":      {meshTLS(front, "POST /x HTTP/1.1\r\nHost: a\r\nx-tier: gold, silver\r\nX-Reason: y\r\nContent-Length: 0\r\n\r\n", h1...), "weft-h1 403"},
			"it empty":                 {meshTLS(front, "POST /x HTTP/1.1\r\nHost: a\r\nx-tier:\r\nX-Reason: y\r\nContent-Length: 0\r\n\r\n", h1...), "weft-h1 403"},
			"a denied header":          {meshTLS(front, "GET /items HTTP/1.1\r\nHost: a\r\nx-debug: on\r\n\r\n", h1...), "weft-h1 403"},
			"it among others":          {meshTLS(front, "GET /items HTTP/1.1\r\nHost: a\r\nx-debug: off\r\nX-DEBUG: on\r\nx-debug: off\r\n\r\n", h1...), "weft-h1 403"},
			"another value of it":      {meshTLS(front, "GET /items HTTP/1.1\r\nHost: a\r\nx-debug: off\r\n\r\n", h1...), "weft-h1 200"},
			"escaped dots, parameter":  {meshTLS(front, "GET /items/%2e%2e;/admin HTTP/1.1\r\nHost: a\r\n\r\n", h1...), "weft-h1 403"},
			"dots with a parameter":    {meshTLS(front, "GET /items/..;v=1/admin HTTP/1.1\r\nHost: a\r\n\r\n", h1...), "weft-h1 403"},
			"escaped dots in Allow":    {meshTLS(front, "GET /items/.%2E;x/secret HTTP/1.1\r\nHost: a\r\n\r\n", h1...), "weft-h1 403"},
			"a dot with a parameter":   {meshTLS(front, "GET /items/%2e;/x HTTP/1.1\r\nHost: a\r\n\r\n", h1...), "weft-h1 403"},
			"a parameter":              {meshTLS(front, "GET /items/a..;v=1/b HTTP/1.1\r\nHost: a\r\n\r\n", h1...), "weft-h1 200"},
			"an underscore header":     {meshTLS(front, "GET /items HTTP/1.1\r\nHost: a\r\nx_reason: y\r\n\r\n", h1...), "weft-h1 400"},
			"h2":                       {meshTLS(front, "", h2...), "weft-h2"},
			"plain":                    {plaintext(get), refused},
		}},
		{"strict-http", 9090, map[string]attempt{"forwarded bytes of an HTTP/2 port": {meshTLS(front, "", tcp...), "weft-h2"}}},
		{"permissive-http", 8080, map[string]attempt{
			"plain HTTP":                 {plaintext(get), "200"},
			"plain HTTP, denied":         {plaintext(admin), "403"},
			"plain bytes past the rules": {plaintext("hello\n"), refused},
			"own TLS past the rules":     {ownTLS(), refused},
			"mesh":                       {meshTLS(front, get, h1...), "weft-h1 200"},
			"mesh, denied":               {meshTLS(front, admin, h1...), "weft-h1 403"},
		}},
		{"permissive-http", 8443, map[string]attempt{"plain on the Strict port": {plaintext(get), refused}, "mesh": {meshTLS(front, get, h1...), "weft-l4 200"}}},
		{"permissive-http", 7000, map[string]attempt{"plain on another": {plaintext(admin), "200"}}},
	} {
		t.Run(fmt.Sprintf("%s:%d", c.golden, c.port), func(t *testing.T) {
			b := start(t)
			address, seen := app(t)
			b.Set(ads.Clusters, names.ClusterLocalH1, localAt(address))
			b.acked(t, ads.Clusters, names.ClusterLocalH1)
			file := load(t, "nodeproxy/internal/lds")[c.golden]
			b.rules(file)
			_, netns := b.netns(t)
			l := withoutHooks(move(file.Listeners[1], "in", netns))
			l.GetAddress().GetSocketAddress().PortSpecifier = &core.SocketAddress_PortValue{PortValue: c.port}
			b.Set(ads.Listeners, "in", l)
			b.acked(t, ads.Listeners, "in")
			b.listening(t, netns, c.port)
			for name, a := range meshRefused {
				c.attempts[name] = a
			}
			for name, a := range c.attempts {
				for _, host := range []string{"127.0.0.1", "[::1]"} {
					before := seen()
					conn, err := dialIn(netns, fmt.Sprintf("%s:%d", host, c.port))
					if err != nil {
						t.Fatal(err)
					}
					if got := a.call(t, b, conn); got != a.want {
						t.Errorf("%s, %s: %s, want %s", name, host, got, a.want)
					}
					conn.Close()
					if a.want == refused && seen() != before {
						t.Errorf("%s, %s: the app saw a connection", name, host)
					}
				}
			}
		})
	}
}

// TestRequestsStayAsTheyAre: what the client must not say is removed, everything else reaches the app untouched, and the
// answer comes back untouched.
func TestRequestsStayAsTheyAre(t *testing.T) {
	b := start(t)
	address, _ := app(t)
	b.Set(ads.Clusters, names.ClusterLocalH1, localAt(address))
	b.acked(t, ads.Clusters, names.ClusterLocalH1)
	file := load(t, "nodeproxy/internal/lds")["permissive"]
	b.rules(file)
	_, netns := b.netns(t)
	l := withoutHooks(move(file.Listeners[1], "in", netns))
	l.GetAddress().GetSocketAddress().PortSpecifier = &core.SocketAddress_PortValue{PortValue: 8080}
	b.Set(ads.Listeners, "in", l)
	b.acked(t, ads.Listeners, "in")
	b.listening(t, netns, 8080)
	conn, err := dialIn(netns, "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	kept := []string{"Host: Shop.example", "X-MixedCase: Value", "X-Forwarded-For: 192.0.2.7", "X-Forwarded-Proto: https", "x-request-id: mine", "User-Agent: test"}
	gone := []string{"x-envoy-retry-on: 5xx", "X-Envoy-Original-Path: /admin", "x-envoy-external-address: 1.2.3.4", "x-forwarded-client-cert: By=x",
		"X-Weft-Dst: 10.96.0.10:80", "x-weft-src-ns: kube-system"}
	fmt.Fprintf(conn, "GET /a//b?c=%%2F HTTP/1.1\r\n%s\r\n\r\n", strings.Join(append(kept, gone...), "\r\n"))
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(strings.TrimSpace(string(body)), "\r\n")
	want := append([]string{"GET /a//b?c=%2F HTTP/1.1"}, kept...)
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the app saw another request (-sent +seen):\n%s", diff)
	}
	if diff := cmp.Diff(http.Header{"Server": {"app"}, "Date": {date}, "Content-Length": {fmt.Sprint(len(body))}}, response.Header); diff != "" {
		t.Errorf("the answer changed (-app +client):\n%s", diff)
	}
}
