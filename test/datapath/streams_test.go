package datapath

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/datapath/lab"
)

// rendezvous lets an app and the client in the same test wait for each other, by a token that the client sends.
var (
	rendezvous sync.Map // token: chan int64
	tokens     atomic.Int64
)

func meet() (token string, channel chan int64) {
	token, channel = fmt.Sprint("token-", tokens.Add(1)), make(chan int64, 1)
	rendezvous.Store(token, channel)
	return token, channel
}

func meeting(token string) chan int64 {
	channel, _ := rendezvous.Load(token)
	c, _ := channel.(chan int64)
	return c
}

const downloadSize = 64 << 20

func download(pod *lab.Pod, address string) error {
	client := client(pod, false)
	client.Timeout = 5 * time.Minute
	defer client.CloseIdleConnections()
	response, err := client.Get("http://" + address + "/download")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	n, err := io.Copy(io.Discard, response.Body)
	if err == nil && n != downloadSize {
		err = fmt.Errorf("%d bytes of %d came", n, downloadSize)
	}
	return err
}

const events = 5

// streamEvents sends an event when the client has seen the one before.
func streamEvents(w http.ResponseWriter, r *http.Request) {
	seen := meeting(r.Header.Get("Token"))
	w.Header().Set("Content-Type", "text/event-stream")
	for i := range events {
		fmt.Fprintf(w, "data: %d\n\n", i)
		w.(http.Flusher).Flush()
		select {
		case <-seen:
		case <-r.Context().Done():
			return
		}
	}
}

func stream(pod *lab.Pod, address string) error {
	client := client(pod, false)
	defer client.CloseIdleConnections()
	request, err := http.NewRequest(http.MethodGet, "http://"+address+"/stream", nil)
	if err != nil {
		return err
	}
	token, seen := meet()
	request.Header.Set("Token", token)
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	lines := bufio.NewScanner(response.Body)
	next := 0
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
			if got, err := strconv.Atoi(text); err != nil || got != next {
				return fmt.Errorf("event %q, want %d", text, next)
			}
			next++
			seen <- 1
		}
	}
	if err := lines.Err(); err != nil || next != events {
		return fmt.Errorf("%d events of %d: %w", next, events, err)
	}
	return nil
}

// sayAndListen ends its own direction first and then reads all of the other.
func sayAndListen(conn net.Conn) {
	reader := bufio.NewReader(conn)
	token, err := reader.ReadString('\n')
	if err != nil {
		return
	}
	fmt.Fprintln(conn, "all said")
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
	n, err := io.Copy(io.Discard, reader)
	if err != nil {
		n = -1
	}
	meeting(strings.TrimSpace(token)) <- n
}

func serverHalfClose(pod *lab.Pod, address string) error {
	conn, reader, err := open(pod, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	token, result := meet()
	fmt.Fprintln(conn, token)
	if said, err := io.ReadAll(reader); err != nil || string(said) != "all said\n" {
		return fmt.Errorf("the server said %q: %w", said, err)
	}
	const size = 1 << 20
	if _, err := io.CopyN(conn, zeros{}, size); err != nil {
		return fmt.Errorf("after the server's end: %w", err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	select {
	case n := <-result:
		if n != size {
			return fmt.Errorf("the server read %d bytes of %d", n, size)
		}
	case <-time.After(patience):
		return errors.New("the server saw no end")
	}
	return nil
}

// serverTLS is the TLS of an app that knows nothing of the mesh.
func serverTLS(t testing.TB) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"app.example"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"echo"}}
}

// echoTLS speaks TLS with the app itself and looks that it is the app's certificate.
func echoTLS(pod *lab.Pod, address string) error {
	plain, _, err := open(pod, address)
	if err != nil {
		return err
	}
	defer plain.Close()
	// The app's certificate is its own authority; its name says whose it is.
	conn := tls.Client(plain, &tls.Config{ServerName: "app.example", NextProtos: []string{"echo"}, InsecureSkipVerify: true})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		return err
	}
	if err := conn.ConnectionState().PeerCertificates[0].VerifyHostname("app.example"); err != nil {
		return err
	}
	fmt.Fprintln(conn, "hello")
	if got, err := bufio.NewReader(conn).ReadString('\n'); err != nil || got != "hello\n" {
		return fmt.Errorf("the echo is %q: %w", got, err)
	}
	return nil
}

// oversizedHello begins a ClientHello of 16 MiB and goes on for ever.
func oversizedHello() io.Reader {
	record := append([]byte{0x16, 3, 1, 0x40, 0}, make([]byte, 0x4000)...)
	copy(record[5:], []byte{1, 0xff, 0xff, 0xff, 3, 3})
	return &endless{record: record}
}

type endless struct {
	record []byte
	offset int
}

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, e.record[e.offset:])
	e.offset = (e.offset + n) % len(e.record)
	return n, nil
}

// closedAfter sends and wants the connection closed without an answer.
func closedAfter(pod *lab.Pod, address string, send io.Reader) error {
	conn, reader, err := open(pod, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	go func() { _, _ = io.Copy(conn, send) }()
	got, err := reader.ReadByte()
	switch {
	case err == nil:
		return fmt.Errorf("it was answered: %q", got)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("it is still open after %v", patience)
	}
	return nil
}

// refused counts the connections that a server's inbound listener let nowhere.
func (m *mesh) refused(t *testing.T, server string) (n uint64) {
	t.Helper()
	text, err := m.Stats(node(server), "no_filter_chain_match|pre_cx_timeout|client_hello_too_large|listener_filter_error|ssl.connection_error")
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if count, err := strconv.ParseUint(value, 10, 64); err == nil && (strings.Contains(name, "in-uid-"+server) || strings.Contains(name, "client_hello_too_large")) {
			n += count
		}
	}
	return n
}
