package datapath

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/test/datapath/lab"
)

type object = map[string]any

// withRoutes adds the services that have routes, and testdata/routes.yaml.
func withRoutes(t testing.TB, spec lab.Spec) lab.Spec {
	t.Helper()
	http1 := lab.PortSpec{Port: 80, Target: httpPort, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP1}
	other := http1
	other.Port = 8080
	spec.Services = append(spec.Services,
		lab.ServiceSpec{Name: "routed", Last: 3, Ports: []lab.PortSpec{http1, other}, Pods: []string{"near"}},
		lab.ServiceSpec{Name: "foreign", Namespace: "elsewhere", Last: 6, Ports: []lab.PortSpec{http1}, Pods: []string{"near"}},
		lab.ServiceSpec{Name: "calls", Last: 7, Ports: []lab.PortSpec{{Port: 91, Target: grpcPort, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP2}}, Pods: []string{"near"}})
	content, err := os.ReadFile("testdata/routes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range strings.Split(string(content), "\n---\n") {
		var kind struct{ Kind string }
		var route gwv1.HTTPRoute
		var call gwv1.GRPCRoute
		if err := yaml.Unmarshal([]byte(text), &kind); err != nil {
			t.Fatal(err)
		}
		switch kind.Kind {
		case "HTTPRoute":
			err, spec.HTTPRoutes = yaml.UnmarshalStrict([]byte(text), &route), append(spec.HTTPRoutes, &route)
		case "GRPCRoute":
			err, spec.GRPCRoutes = yaml.UnmarshalStrict([]byte(text), &call), append(spec.GRPCRoutes, &call)
		default:
			err = fmt.Errorf("kind %q", kind.Kind)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return spec
}

// ask sends one request from the client's pod and follows no redirect.
func (m *mesh) ask(t *testing.T, method, address, path string, change func(*http.Request)) (*http.Response, string) {
	t.Helper()
	client := client(m.Pod("client"), false)
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	defer client.CloseIdleConnections()
	request, err := http.NewRequest(method, "http://"+address+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(request)
	}
	response, err := client.Do(request)
	if err != nil {
		t.Errorf("%s %s: %v", method, path, err)
		return &http.Response{Header: http.Header{}}, ""
	}
	defer response.Body.Close()
	body := make([]byte, 200)
	n, _ := response.Body.Read(body)
	return response, string(body[:n])
}

// routed asks the routed service in every way, through the real route, cluster and endpoints.
func (m *mesh) routed(t *testing.T) {
	routed, foreign := m.Address("routed", 80, false), m.Address("foreign", 80, false)
	set := func(name, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(name, value) }
	}
	for name, c := range map[string]struct {
		method, to, path string
		change           func(*http.Request)
		status           int
		pod              string
	}{
		"consumer":                {"GET", foreign, "/consumer", nil, 200, "far"},
		"consumer, otherwise":     {"GET", foreign, "/", nil, 200, "near"},
		"another's consumer":      {"GET", routed, "/elsewhere", nil, 404, ""},
		"forged source namespace": {"GET", routed, "/elsewhere", set("x-weft-src-ns", "elsewhere"), 404, ""},
		"forged destination":      {"GET", routed, "/near", set("x-weft-dst", m.Address("far", 80, false)), 200, "near"},
		"method":                  {"POST", routed, "/method", nil, 200, "far"},
		"another method":          {"GET", routed, "/method", nil, 404, ""},
		"header":                  {"GET", routed, "/", set("x-version", "2"), 200, "far"},
		"header, regex":           {"GET", routed, "/", set("x-version", "45"), 200, "far"},
		"header, regex, in part":  {"GET", routed, "/", set("x-version", "456"), 404, ""},
		"query":                   {"GET", routed, "/?version=2", nil, 200, "far"},
		"host":                    {"GET", routed, "/host", func(r *http.Request) { r.Host = "far.example" }, 200, "far"},
		"another host":            {"GET", routed, "/host", func(r *http.Request) { r.Host = "other.example" }, 404, ""},
		"path, regex":             {"GET", routed, "/v12/items?a=b", nil, 200, "far"},
		"path, regex, in part":    {"GET", routed, "/v12/items/3", nil, 404, ""},
		"whole path elements":     {"GET", routed, "/nearly", nil, 404, ""},
		"below":                   {"GET", routed, "/near/by", nil, 200, "near"},
		"nothing matches":         {"GET", routed, "/", nil, 404, ""},
		"in time":                 {"GET", routed, "/slow", nil, 200, "near"},
		"too slow":                {"GET", routed, "/slow", set("Delay", "1h"), 504, ""},
	} {
		response, body := m.ask(t, c.method, c.to, c.path, c.change)
		if response.StatusCode != c.status || response.Header.Get("X-Pod") != c.pod {
			t.Errorf("%s: %d from %q: %s", name, response.StatusCode, response.Header.Get("X-Pod"), body)
		}
	}
	m.rewritten(t, routed)
	for _, c := range [][3]string{
		{routed, "/moved/x", "https://shop.example/there/x"},
		{routed, "/secure", "https://shop:443/secure"},
		{m.Address("routed", 8080, false), "/secure", "https://shop:443/secure"},
		{routed, "/renamed", "http://shop.example/renamed"},
		{m.Address("routed", 8080, false), "/renamed", "http://shop.example:8080/renamed"},
	} {
		_, port, _ := net.SplitHostPort(c[0])
		response, _ := m.ask(t, "GET", c[0], c[1], func(r *http.Request) { r.Host = strings.TrimSuffix("shop:"+port, ":80") })
		if got := response.Header.Get("Location"); response.StatusCode/100 != 3 || got != c[2] {
			t.Errorf("redirect of %s%s: %d %q, want %s", c[0], c[1], response.StatusCode, got, c[2])
		}
	}
	m.split(t, routed)
}

func (m *mesh) rewritten(t *testing.T, routed string) {
	response, body := m.ask(t, "GET", routed, "/old/x?y=z", func(r *http.Request) { r.Header.Set("X-Gone", "1") })
	if h := response.Header; body != "HTTP/1.1 /new/x 0" || h.Get("X-Back") != "1" || h.Get("X-Host") != "hidden" || h.Get("X-Path") != "" || h.Get("X-Seen") != "50% new.example" {
		t.Errorf("rewrite: %q %v", body, h)
	}
	for path, want := range map[string]string{"/strip/x": "/x", "/strip": "/", "/full/of/it?x=y": `/one\1two`} {
		if _, body := m.ask(t, "GET", routed, path, nil); body != "HTTP/1.1 "+want+" 0" {
			t.Errorf("%s became %q, want %s", path, body, want)
		}
	}
}

func (m *mesh) split(t *testing.T, routed string) {
	seen, status := map[string]int{}, map[int]int{}
	for i := range 400 {
		response, _ := m.ask(t, "GET", routed, fmt.Sprintf("/split/%d", i), nil)
		seen[response.Header.Get("X-Pod")]++
		response, _ = m.ask(t, "GET", routed, "/partly", nil)
		status[response.StatusCode]++
	}
	// 400 draws at 10 %: 40, and beyond five standard deviations once in a million runs.
	if seen["far"] < 10 || seen["far"] > 70 || seen["near"]+seen["far"] != 400 {
		t.Errorf("split 90/10: %v", seen)
	}
	if status[500] < 150 || status[500] > 250 || status[200]+status[500] != 400 {
		t.Errorf("a half of the backends is invalid: %v", status)
	}
	own := map[string]bool{}
	for range 100 { // one of two never drawn: once in 2^99 runs
		response, _ := m.ask(t, "GET", routed, "/own", nil)
		set, _, _ := strings.Cut(response.Header.Get("X-Seen"), " ")
		if pod := response.Header.Get("X-Pod"); pod == "" || set != pod {
			t.Fatalf("%s got the header of %q", pod, set)
		}
		own[set] = true
	}
	if len(own) != 2 {
		t.Errorf("backends with filters of their own: only %v", own)
	}
}

// called calls by gRPC, through GRPCRoutes.
func (m *mesh) called(t *testing.T) {
	client := m.Pod("client")
	conn, err := grpc.NewClient("passthrough:///"+m.Address("calls", 91, false), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return client.Dial(ctx, address) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	call := func(method string, header ...string) (string, error) {
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), header...), patience)
		defer cancel()
		var answer wrapperspb.StringValue
		err := conn.Invoke(ctx, method, wrapperspb.String("x"), &answer)
		return answer.GetValue(), err
	}
	for _, c := range []struct{ method, header, want string }{
		{"/shop.Cart/Add", "", "far /shop.Cart/Add x"},
		{"/shop.Cart/Remove", "", "near /shop.Cart/Remove x"},
		{"/shop.Stock/GetAll", "", "far /shop.Stock/GetAll x"},
		{"/shop.Price/List", "", "far /shop.Price/List x"},
		{"/shop.Other/Call", "1", "near /shop.Other/Call x"},
		{"/shop.Stock/List2", "", ""},
		{"/shop.Other/List", "", ""},
		{"/shop.CartOld/Add", "", ""},
	} {
		var header []string
		if c.header != "" {
			header = []string{"x-canary", c.header}
		}
		got, err := call(c.method, header...)
		switch {
		case c.want == "" && status.Code(err) != codes.Unimplemented: // gRPC's word for 404
			t.Errorf("%s: %q %v, want no route", c.method, got, err)
		case c.want != "" && (err != nil || got != c.want):
			t.Errorf("%s: %q %v, want %q", c.method, got, err, c.want)
		}
	}
	seen := map[string]int{}
	for range 200 {
		got, err := call("/shop.Split/Draw")
		if err != nil {
			t.Fatal(err)
		}
		pod, _, _ := strings.Cut(got, " ")
		seen[pod]++
	}
	// 200 draws at 20 %: 40, and beyond five standard deviations once in a million runs.
	if seen["far"] < 12 || seen["far"] > 70 || seen["near"]+seen["far"] != 200 {
		t.Errorf("split 80/20: %v", seen)
	}
}
