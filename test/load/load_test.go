package load_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/load"
)

// run drives one target until it has made some requests, then returns its counters.
func run(t *testing.T, target load.Target, enough func(load.Stats) bool) load.Stats {
	t.Helper()
	g, err := load.NewGenerator(load.Config{Targets: []load.Target{target}, Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	go func() {
		for ctx.Err() == nil && !enough(g.Stats()[target.Name]) {
			time.Sleep(time.Millisecond)
		}
		stop()
	}()
	g.Run(ctx)
	s := g.Stats()[target.Name]
	if !enough(s) {
		t.Fatalf("the run ended too early: %+v", s)
	}
	return s
}

func echoing(change func(n int64, w http.ResponseWriter, r *http.Request)) http.Handler {
	var n atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Sequence", r.Header.Get("X-Sequence"))
		w.Header().Set("X-Client", r.RemoteAddr)
		w.Header().Set("X-Server", r.Context().Value(http.LocalAddrContextKey).(net.Addr).String())
		w.Header().Set("X-Version", "v1")
		change(n.Add(1), w, r)
	})
}

func TestHTTPCounts(t *testing.T) {
	cases := []struct {
		name   string
		kind   load.Kind
		server func(n int64, w http.ResponseWriter, r *http.Request)
		want   func(load.Stats) bool
	}{
		{"one connection serves a keep-alive client", load.KeepAlive, func(int64, http.ResponseWriter, *http.Request) {},
			func(s load.Stats) bool {
				return s.Connections == 1 && s.Failed == 0 && s.Broken == 0 && s.Proxied == s.Requests && s.Versions["v1"] == s.Requests
			}},
		{"a connection for each request", load.New, func(int64, http.ResponseWriter, *http.Request) {},
			func(s load.Stats) bool { return s.Connections >= s.Requests && s.Failed == 0 }},
		{"an announced close is no failure", load.KeepAlive, func(n int64, w http.ResponseWriter, _ *http.Request) {
			if n%10 == 0 {
				w.Header().Set("Connection", "close")
			}
		}, func(s load.Stats) bool { return s.Failed == 0 && s.Broken == 0 && s.Closed >= 5 }},
		{"a cut connection is broken and failed", load.KeepAlive, func(n int64, w http.ResponseWriter, _ *http.Request) {
			if n == 10 {
				c, _, _ := w.(http.Hijacker).Hijack()
				_ = c.Close()
			}
		}, func(s load.Stats) bool { return s.Failed == 1 && s.Broken == 1 && s.Connections == 2 }},
		{"another request's answer is a failure", load.KeepAlive, func(n int64, w http.ResponseWriter, _ *http.Request) {
			if n == 10 {
				w.Header().Set("X-Sequence", "0-1")
			}
		}, func(s load.Stats) bool { return s.Failed == 1 }},
		{"a wrong status is a failure", load.KeepAlive, func(n int64, w http.ResponseWriter, _ *http.Request) {
			if n == 10 {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		}, func(s load.Stats) bool { return s.Failed == 1 && s.Statuses["503"] == 1 }},
		{"a truncated body is a failure", load.KeepAlive, func(n int64, w http.ResponseWriter, _ *http.Request) {
			if n == 10 {
				w.Header().Set("Content-Length", "100")
				_, _ = io.WriteString(w, "short")
			}
		}, func(s load.Stats) bool { return s.Failed == 1 && s.Broken == 1 }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := httptest.NewServer(echoing(c.server))
			defer s.Close()
			got := run(t, load.Target{Name: "x", Kind: c.kind, Address: strings.TrimPrefix(s.URL, "http://")}, func(s load.Stats) bool { return s.Requests >= 60 })
			if !c.want(got) {
				t.Errorf("counters %+v", got)
			}
		})
	}
}

func TestHTTPPerConnection(t *testing.T) {
	s := httptest.NewServer(echoing(func(int64, http.ResponseWriter, *http.Request) {}))
	defer s.Close()
	got := run(t, load.Target{Name: "x", Kind: load.KeepAlive, Address: strings.TrimPrefix(s.URL, "http://"), PerConnection: 20},
		func(s load.Stats) bool { return s.Connections >= 5 })
	if got.Failed+got.Broken+got.Closed > 0 || got.Requests > 20*got.Connections {
		t.Errorf("counters %+v, want 20 requests on a connection", got)
	}
}

func TestBadTargetsAreNamed(t *testing.T) {
	for _, c := range []struct {
		target load.Target
		want   string
	}{
		{load.Target{Kind: load.New}, "needs a name"},
		{load.Target{Name: "x", Kind: "udp"}, `kind "udp" is none of`},
		{load.Target{Name: "x", Kind: load.New, PerConnection: 2}, `leave perConnection out`},
	} {
		if _, err := load.NewGenerator(load.Config{Targets: []load.Target{c.target}}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("error %v, want %q", err, c.want)
		}
	}
}

func TestSumAddsWhatCalleesSaw(t *testing.T) {
	early, late := time.Unix(1, 0), time.Unix(2, 0)
	sum := load.Sum(map[string]load.Stats{
		"a": {At: late, Requests: 3, Callees: map[string]load.View{"10.0.0.1": {Direct: 1, Proxied: 2}}},
		"b": {At: early, Requests: 4, Callees: map[string]load.View{"10.0.0.1": {Direct: 4}}},
	})
	if want := (load.View{Direct: 5, Proxied: 2}); sum.Callees["10.0.0.1"] != want || sum.Requests != 7 || !sum.At.Equal(early) {
		t.Errorf("sum %+v, want %+v seen at 10.0.0.1, 7 requests, as of %v", sum, want, early)
	}
}
