package datapath

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/datapath/lab"
)

// held is an open echo connection.
type held struct {
	conn   net.Conn
	reader *bufio.Reader
}

func hold(t *testing.T, pod *lab.Pod, address string) *held {
	t.Helper()
	conn, err := pod.Dial(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	h := &held{conn, bufio.NewReader(conn)}
	if err := h.echo(); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *held) echo() error {
	_ = h.conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(h.conn, "still here\n"); err != nil {
		return err
	}
	_, err := h.reader.ReadString('\n')
	return err
}

// load asks over connections that are kept, with a pause after each request or none.
type load struct {
	done    chan struct{}
	wait    sync.WaitGroup
	count   atomic.Int64
	mu      sync.Mutex
	failure error
}

func start(pod *lab.Pod, address string, http2 bool, connections int, pause time.Duration) *load {
	l := &load{done: make(chan struct{})}
	for range connections {
		l.wait.Go(func() {
			client := client(pod, http2)
			defer client.CloseIdleConnections()
			for {
				select {
				case <-l.done:
					return
				case <-time.After(pause):
				}
				status, body, err := ask(client, address, "/items")
				if err != nil || status != 200 {
					l.mu.Lock()
					l.failure = fmt.Errorf("after %d requests: %d %q %w", l.count.Load(), status, body, err)
					l.mu.Unlock()
				}
				l.count.Add(1)
			}
		})
	}
	return l
}

// more waits for further requests.
func (l *load) more(t *testing.T, n int64) {
	t.Helper()
	want := l.count.Load() + n
	eventually(t, func() error {
		if got := l.count.Load(); got < want {
			return fmt.Errorf("%d requests, want %d", got, want)
		}
		return nil
	})
}

func (l *load) failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failure
}

func (l *load) stop() (int64, error) {
	close(l.done)
	l.wait.Wait()
	return l.count.Load(), l.failed()
}
