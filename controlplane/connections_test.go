package main

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc/peer"
)

// TestHangUp ends one caller's connection and leaves the others.
func TestHangUp(t *testing.T) {
	table := newConnectionTable()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener := table.listen(inner)
	t.Cleanup(func() { _ = listener.Close() })
	var clients, servers []net.Conn
	for range 2 {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		s, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		clients, servers = append(clients, c), append(servers, s)
	}
	table.hangUp(peer.NewContext(t.Context(), &peer.Peer{Addr: servers[0].RemoteAddr()}))
	table.hangUp(context.Background()) // a call without a peer
	if err := clients[0].SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := clients[0].Read(make([]byte, 1)); err == nil || n != 0 {
		t.Errorf("read %d, %v: want the end", n, err)
	}
	if _, err := servers[1].Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if n, err := clients[1].Read(make([]byte, 1)); err != nil || n != 1 {
		t.Errorf("the other one: %d, %v", n, err)
	}
	table.mu.Lock()
	defer table.mu.Unlock()
	if len(table.open) != 1 {
		t.Errorf("%d connections are known, want 1", len(table.open))
	}
}
