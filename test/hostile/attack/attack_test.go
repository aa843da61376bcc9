package attack

import (
	"bytes"
	"encoding/json"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// serving is a target on the loopback, at free ports.
func serving(t *testing.T) (*target, [4]string) {
	t.Helper()
	var ports [4]string
	seen := &target{}
	for i, talk := range []func(*recorded){seen.web, seen.echo, seen.greet, seen.echo} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		ports[i] = l.Addr().String()
		go seen.accept(l, i, talk)
	}
	return seen, ports
}

// TestAttempts: the program says what happened, and the target what it saw.
func TestAttempts(t *testing.T) {
	seen, ports := serving(t)
	first := netip.MustParseAddrPort(ports[1]).Port()
	attempts := []Attempt{
		{ID: "request", Kind: "dial", To: ports[0], Send: []byte("GET /ok?mark-a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")},
		{ID: "no request", Kind: "dial", To: ports[0], Send: []byte("\x16\x03mark-b\r\n\r\n")},
		{ID: "line", Kind: "dial", To: ports[1], Send: []byte("mark-c\n")},
		{ID: "mapped", Kind: "dial", To: ports[1], Mapped: true, Send: []byte("mark-d\n")},
		{ID: "pieces", Kind: "dial", To: ports[1], Pieces: true, Send: []byte("mark-e\n")},
		{ID: "greeting", Kind: "dial", To: ports[2]},
		{ID: "TLS", Kind: "dial", To: ports[0], TLS: &TLS{ALPN: []string{"weft-l4"}, ID: "spiffe://x/y", Issuer: "z", Name: "mark-f.test"}},
		{ID: "fast open", Kind: "dial", To: ports[1], Options: []string{"fastopen"}, Send: []byte("mark-g\n")},
		{ID: "held", Kind: "hold", To: ports[1], Count: 10, Millis: 200, Send: []byte("mark-h\n")},
		{ID: "scan", Kind: "scan", To: "127.0.0.1", First: int(first), Last: int(first), Count: 4, Send: []byte("mark-i\n")},
		{ID: "refused", Kind: "dial", To: "127.0.0.1:1"},
		{ID: "taken", Kind: "bind", To: "127.0.0.1", First: int(first), Last: int(first)},
	}
	in, err := json.Marshal(attempts)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := Main(bytes.NewReader(in), &out, 4); err != nil {
		t.Fatal(err)
	}
	var outcomes []Outcome
	if err := json.Unmarshal(out.Bytes(), &outcomes); err != nil {
		t.Fatal(err)
	}
	for i, o := range outcomes {
		got := string(o.Got)
		good := strings.Contains(got, "app: ")
		switch attempts[i].ID {
		case "held":
			good = o.Counts["open"] == 10 && o.Counts["answered"] == 10 && o.Counts["still open"] == 10
		case "scan":
			good = o.Counts["answered"] == 1
		case "refused":
			good = o.Stage == "connect" && o.Errno == "ECONNREFUSED"
		case "taken":
			good = o.Counts["EADDRINUSE"] == 1
		}
		if !good {
			t.Errorf("%s: %+v, got %q", attempts[i].ID, o, got)
		}
	}
	all := seen.since(0).All
	for _, mark := range []string{"mark-a", "mark-b", "mark-c", "mark-d", "mark-e", "mark-f", "mark-g", "mark-h", "mark-i"} {
		if !slices.ContainsFunc(all, func(s Sight) bool { return bytes.Contains(s.Bytes, []byte(mark)) }) {
			t.Errorf("the target did not see %s", mark)
		}
	}
	if !slices.ContainsFunc(all, func(s Sight) bool { return s.Request == "GET /ok?mark-a" }) {
		t.Error("the target did not see the request")
	}
}

// TestPackets: what is made is read back, and its sums are right.
func TestPackets(t *testing.T) {
	for _, ends := range [][2]string{{"10.0.0.1:1", "10.0.0.2:2"}, {"[fd00::1]:1", "[fd00::2]:2"}} {
		p := packet{from: netip.MustParseAddrPort(ends[0]), to: netip.MustParseAddrPort(ends[1]), Segment: Segment{Seq: 7, Ack: 8, Flags: PSH | ACK}, payload: []byte("odd")}
		b := p.bytes()
		got, ok := readPacket(b)
		if !ok || got.from != p.from || got.to != p.to || got.Segment != p.Segment || string(got.payload) != "odd" {
			t.Errorf("%v: read back %+v", ends, got)
		}
		segment := b[len(b)-23:]
		if n := sum(pseudo(p.from.Addr(), p.to.Addr(), protocolTCP, len(segment)), segment); n != 0 {
			t.Errorf("%v: the segment sums up to %#x", ends, n)
		}
		if p.from.Addr().Is4() && sum(b[:20]) != 0 {
			t.Errorf("%v: the head's sum is wrong", ends)
		}
	}
}
