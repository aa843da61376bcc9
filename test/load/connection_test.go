package load_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"github.com/weftmesh/weft/examples/shop/shoppb"
	"github.com/weftmesh/weft/test/load"
)

// redisServer answers CLIENT INFO, and INCR by the numbers of one connection or of all.
type redisServer struct {
	skip   int  // this number is never given
	silent bool // a half-closed connection is cut, not ended
	total  int
}

func (r *redisServer) serve(c net.Conn) {
	defer c.Close()
	lines := bufio.NewReader(c)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			if tcp, ok := c.(*net.TCPConn); ok && r.silent {
				_ = tcp.SetLinger(0)
			}
			return
		}
		answer := ""
		if strings.HasPrefix(line, "CLIENT INFO") {
			view := fmt.Sprintf("id=1 addr=%s laddr=%s fd=8\n", c.RemoteAddr(), c.LocalAddr())
			answer = fmt.Sprintf("$%d\r\n%s\r\n", len(view), view)
		} else {
			if r.total++; r.total == r.skip {
				r.total++
			}
			answer = fmt.Sprintf(":%d\r\n", r.total)
		}
		if _, err := io.WriteString(c, answer); err != nil {
			return
		}
	}
}

// listen serves connections one after the other and returns the address.
func listen(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(c)
		}
	}()
	return l.Addr().String()
}

func TestRedisCounts(t *testing.T) {
	cases := []struct {
		name   string
		server redisServer
		each   int
		until  func(load.Stats) bool
		want   func(load.Stats) bool
	}{
		{"one connection, seen by redis", redisServer{}, 0, func(s load.Stats) bool { return s.Requests >= 200 },
			func(s load.Stats) bool {
				return s.Connections == 1 && s.Failed == 0 && s.Proxied == s.Requests && s.Callees["127.0.0.1"].Proxied == s.Requests
			}},
		{"a new connection after each 16 commands", redisServer{}, 16, func(s load.Stats) bool { return s.Connections >= 5 },
			func(s load.Stats) bool { return s.Failed == 0 && s.Broken == 0 && s.Requests <= 16*s.Connections }},
		{"a lost answer", redisServer{skip: 100}, 0, func(s load.Stats) bool { return s.Failed > 0 },
			func(s load.Stats) bool { return s.Broken > 0 && strings.Contains(s.Errors[0], "want :100") }},
		{"a half-close answered by a reset", redisServer{silent: true}, 16, func(s load.Stats) bool { return s.Failed > 0 },
			func(s load.Stats) bool { return s.Broken > 0 && strings.Contains(s.Errors[0], "other half") }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got := run(t, load.Target{Name: "x", Kind: load.Redis, Address: listen(t, c.server.serve), PerConnection: c.each}, c.until)
			if !c.want(got) {
				t.Errorf("counters %+v", got)
			}
		})
	}
}

// priceServer can cut a stream at one of its messages, and end one with an error.
type priceServer struct {
	shoppb.UnimplementedPricesServer
	cut  uint64
	last error
}

func (p *priceServer) Watch(s shoppb.Prices_WatchServer) error {
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return p.last
		}
		if err != nil {
			return err
		}
		if r.Sequence == p.cut {
			return errors.New("cut")
		}
		from, _ := peer.FromContext(s.Context())
		if err := s.Send(&shoppb.Price{Sequence: r.Sequence, Client: from.Addr.String(), Server: from.LocalAddr.String()}); err != nil {
			return err
		}
	}
}

func TestStreamCounts(t *testing.T) {
	cases := []struct {
		name   string
		server priceServer
		each   int
		until  func(load.Stats) bool
		want   func(load.Stats) bool
	}{
		{"one stream that does not end", priceServer{}, 0, func(s load.Stats) bool { return s.Requests >= 200 },
			func(s load.Stats) bool { return s.Connections == 1 && s.Failed == 0 && s.Proxied == s.Requests }},
		{"a new stream after each 20 messages", priceServer{}, 20, func(s load.Stats) bool { return s.Connections >= 5 },
			func(s load.Stats) bool { return s.Failed == 0 && s.Broken == 0 && s.Requests <= 20*s.Connections }},
		{"a cut stream", priceServer{cut: 30}, 20, func(s load.Stats) bool { return s.Failed > 0 },
			func(s load.Stats) bool { return s.Broken > 0 && strings.Contains(s.Errors[0], "message 30") }},
		{"a stream that ends with an error", priceServer{last: errors.New("late")}, 20, func(s load.Stats) bool { return s.Failed > 0 },
			func(s load.Stats) bool { return s.Broken > 0 && strings.Contains(s.Errors[0], "stream's end") }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			s := grpc.NewServer()
			shoppb.RegisterPricesServer(s, &c.server)
			go func() { _ = s.Serve(l) }()
			defer s.Stop()
			got := run(t, load.Target{Name: "x", Kind: load.GRPCStream, Address: l.Addr().String(), PerConnection: c.each}, c.until)
			if !c.want(got) {
				t.Errorf("counters %+v", got)
			}
		})
	}
}
