package datapath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"testing"
	"time"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/test/datapath/lab"
)

// Bytes by the short circuit, through real Envoys: both legs, HTTP and TCP, both placements, IPv4 and IPv6; then switched
// under load.
func TestShortcut(t *testing.T) {
	m := echoing(t)
	if err := m.Shortcut(true); err != nil {
		t.Fatal(err)
	}
	client := m.Pod("client")
	body := make([]byte, 16<<20)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(body)
	for _, server := range []string{"near", "far"} {
		for _, ipv6 := range []bool{false, true} {
			for name, echo := range map[string]func(*lab.Pod, string, []byte) ([]byte, error){"HTTP": echoHTTP, "TCP": echoTCP} {
				before := m.redirected()
				port := map[string]uint16{"HTTP": 80, "TCP": echoPort}[name]
				got, err := echo(client, m.Address(server, port, ipv6), body)
				if err != nil || !bytes.Equal(got, body) {
					t.Errorf("%s, %s, IPv6 %v: %d bytes, they are those sent: %v, %v", server, name, ipv6, len(got), bytes.Equal(got, body), err)
				}
				after := m.redirected()
				if after[0] == before[0] {
					t.Errorf("%s, %s, IPv6 %v: no byte went past TCP at the client's node", server, name, ipv6)
				}
				if server == "far" && after[1] == before[1] {
					t.Errorf("%s, %s, IPv6 %v: no byte went past TCP at the server's node", server, name, ipv6)
				}
			}
		}
	}

	loads := map[string]*load{}
	for _, server := range []string{"near", "far"} {
		loads[server] = start(client, m.Address(server, 80, server == "far"), false, 4, 0)
	}
	for i := range 20 {
		on := i%2 == 1
		before, off := m.redirected(), m.passedOff()
		if err := m.Shortcut(on); err != nil {
			t.Fatal(err)
		}
		for _, l := range loads {
			l.more(t, 50)
		}
		if on && m.redirected()[0] == before[0] || !on && m.passedOff() == off {
			t.Errorf("switched to %v, and no byte went that way", on)
		}
	}
	for server, l := range loads {
		if n, err := l.stop(); err != nil {
			t.Errorf("%s: %d requests while it was switched: %v", server, n, err)
		}
	}
}

// redirected is what each node has moved past TCP.
func (m *mesh) redirected() (n [2]uint64) {
	m.t.Helper()
	for i := range n {
		n[i] = m.kernel(i, "shortcut_redirected_bytes")
	}
	return n
}

// passedOff is what stayed on TCP for it was switched off.
func (m *mesh) passedOff() uint64 {
	m.t.Helper()
	return m.kernel(0, "shortcut_passed_off_bytes")
}

func (m *mesh) kernel(node int, counter string) uint64 {
	m.t.Helper()
	counters, err := m.Kernel(node)
	if err != nil {
		m.t.Fatal(err)
	}
	return counters[counter]
}

// echoing is a mesh of a client and two servers that send back what they get, by HTTP and by TCP.
func echoing(t *testing.T) *mesh {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	ports := []lab.PortSpec{
		{Port: 80, Target: httpPort, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP1},
		{Port: echoPort, Target: echoPort, Class: meshv1.Class_CLASS_TCP, Protocol: meshv1.Protocol_PROTOCOL_TCP},
	}
	l, err := lab.New(ctx, lab.Spec{Module: "../..",
		Pods: []lab.PodSpec{{Name: "client", Account: "client", Node: 0, Last: 2}, {Name: "near", Account: "server", Node: 0, Last: 5},
			{Name: "far", Account: "server", Node: 1, Last: 6}},
		Services: []lab.ServiceSpec{{Name: "near", Last: 1, Ports: ports, Pods: []string{"near"}}, {Name: "far", Last: 2, Ports: ports, Pods: []string{"far"}}},
	})
	t.Cleanup(func() {
		if t.Failed() {
			for i := range 2 {
				t.Logf("Envoy of node %d:\n%s", i, tail(l.Log(i), 60))
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"near", "far"} {
		echoApps(t, l.Pod(name))
	}
	for _, name := range []string{"client", "near", "far"} {
		l.Pod(name).Policy = strict()
	}
	if err := l.Enrol(ctx); err != nil {
		t.Fatal(err)
	}
	return &mesh{Lab: l, t: t}
}

func echoApps(t *testing.T, pod *lab.Pod) {
	t.Helper()
	for port, serve := range map[uint16]func(net.Listener){httpPort: serveEchoHTTP, echoPort: serveEchoTCP} {
		listener, err := pod.Listen(port)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		go serve(listener)
	}
}

func serveEchoHTTP(l net.Listener) {
	_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			fmt.Fprint(w, "here")
			return
		}
		body, err := io.ReadAll(r.Body)
		if err == nil {
			_, _ = w.Write(body)
		}
	}))
}

// serveEchoTCP does not use io.Copy, which between two TCP connections splices.
func serveEchoTCP(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			b := make([]byte, 64<<10)
			for {
				n, err := conn.Read(b)
				if _, failed := conn.Write(b[:n]); err != nil || failed != nil {
					return
				}
			}
		}()
	}
}

func echoHTTP(pod *lab.Pod, address string, body []byte) ([]byte, error) {
	client := client(pod, false)
	defer client.CloseIdleConnections()
	response, err := client.Post("http://"+address+"/", "application/octet-stream", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	return io.ReadAll(response.Body)
}

func echoTCP(pod *lab.Pod, address string, body []byte) ([]byte, error) {
	conn, err := pod.Dial(context.Background(), address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(body)
		sent <- err
	}()
	got := make([]byte, len(body))
	n, err := io.ReadFull(conn, got)
	return got[:n], errors.Join(err, <-sent)
}
