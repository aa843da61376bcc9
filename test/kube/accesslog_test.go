package kube

import (
	"net/netip"
	"testing"
	"time"
)

func TestMeetings(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)
	cases := []struct {
		name, line string
		want       Meeting
		ok         bool
	}{
		{"a connection with a certificate",
			`{"kind":"connection","direction":"in","time":"2026-01-02T03:04:05.678Z","remote":"10.0.0.1:5","destination":"10.0.0.2:6379","peer":"spiffe://x/a","local":"spiffe://x/b","received":12}`,
			Meeting{At: at, Caller: netip.MustParseAddr("10.0.0.1"), Callee: netip.MustParseAddrPort("10.0.0.2:6379"), Peer: "spiffe://x/a", Local: "spiffe://x/b"}, true},
		{"a plaintext request over IPv6",
			`{"kind":"request","direction":"in","time":"2026-01-02T03:04:05.678Z","path":"/one","remote":"[fd00::1]:5","destination":"[::ffff:10.0.0.2]:80","peer":"-","local":"-"}`,
			Meeting{At: at, Request: true, Path: "/one", Caller: netip.MustParseAddr("fd00::1"), Callee: netip.MustParseAddrPort("10.0.0.2:80")}, true},
		{"a plaintext connection whose fields are null",
			`{"kind":"connection","direction":"in","time":"2026-01-02T03:04:05.678Z","path":null,"remote":"10.0.0.1:5","destination":"10.0.0.2:80","peer":null}`,
			Meeting{At: at, Caller: netip.MustParseAddr("10.0.0.1"), Callee: netip.MustParseAddrPort("10.0.0.2:80")}, true},
		{"a caller's line", `{"kind":"request","direction":"out","time":"2026-01-02T03:04:05.678Z","remote":"10.0.0.1:5","destination":"10.0.0.2:80"}`, Meeting{}, false},
		{"Envoy's own log", `[info] all clusters initialized`, Meeting{}, false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if got, ok := meeting([]byte(c.line)); ok != c.ok || got != c.want {
				t.Errorf("got %+v %v, want %+v %v", got, ok, c.want, c.ok)
			}
		})
	}
}
