package datapath

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weftmesh/weft/test/datapath/lab"
)

// Ports of the apps.
const (
	httpPort   = 8080
	h2Port     = 9090
	grpcPort   = 9091
	tlsPort    = 8443
	halfPort   = 7000
	echoPort   = 6379
	bannerPort = 3306
	whoPort    = 7100
)

// served counts the connections that a pod's apps have accepted, by port.
type served map[uint16]*atomic.Int64

type counting struct {
	net.Listener
	count *atomic.Int64
}

func (c counting) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.count.Add(1)
	}
	return conn, err
}

func (s served) total() (n int64) {
	for _, count := range s {
		n += count.Load()
	}
	return n
}

// serve runs all apps in a pod: HTTP/1, HTTP/2 with prior knowledge, gRPC, TLS, an echo, a
// server that closes its half first, one that tells the client's address, and one that speaks first.
func serve(t testing.TB, pod *lab.Pod) served {
	t.Helper()
	counts := served{}
	listen := func(port uint16) net.Listener {
		listener, err := pod.Listen(port)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		counts[port] = new(atomic.Int64)
		return counting{listener, counts[port]}
	}
	answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			echoUpgraded(w)
			return
		}
		if pause, err := time.ParseDuration(r.Header.Get("Pause")); err == nil {
			_, _ = io.WriteString(w, "begun\n")
			w.(http.Flusher).Flush()
			select {
			case <-time.After(pause):
				_, _ = io.WriteString(w, "ended\n")
			case <-r.Context().Done():
			}
			return
		}
		if delay, err := time.ParseDuration(r.Header.Get("Delay")); err == nil {
			select {
			case <-time.After(delay):
			case <-r.Context().Done():
			}
		}
		switch r.URL.Path {
		case "/download":
			_, _ = io.Copy(w, io.LimitReader(zeros{}, downloadSize))
			return
		case "/stream":
			streamEvents(w, r)
			return
		}
		n, _ := io.Copy(io.Discard, r.Body)
		w.Header().Set("X-Pod", pod.Name)
		w.Header().Set("X-Client", r.RemoteAddr)
		for name, values := range r.Trailer {
			w.Header()["Saw-"+name] = values
		}
		w.Header().Set("X-Host", r.Host)
		w.Header().Set("X-Path", r.URL.Path)
		w.Header().Set("X-Seen", fmt.Sprintf("%s %s %s", r.Header.Get("X-Set"), r.Host, r.Header.Get("X-Gone")))
		fmt.Fprintf(w, "%s %s %d", r.Proto, r.URL.Path, n)
	})
	for port, http2 := range map[uint16]bool{httpPort: false, h2Port: true} {
		server := &http.Server{Handler: answer, Protocols: new(http.Protocols)}
		server.Protocols.SetHTTP1(!http2)
		server.Protocols.SetUnencryptedHTTP2(http2)
		go server.Serve(listen(port))
		t.Cleanup(func() { server.Close() })
	}
	calls := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(stream)
		if from, ok := peer.FromContext(stream.Context()); ok {
			_ = stream.SetHeader(metadata.Pairs("client", from.Addr.String()))
		}
		var asked wrapperspb.StringValue
		if err := stream.RecvMsg(&asked); err != nil {
			return err
		}
		return stream.SendMsg(wrapperspb.String(fmt.Sprintf("%s %s %s", pod.Name, method, asked.GetValue())))
	}))
	go calls.Serve(listen(grpcPort))
	t.Cleanup(calls.Stop)
	each(tls.NewListener(listen(tlsPort), serverTLS(t)), func(conn net.Conn) { _, _ = io.Copy(conn, conn) })
	each(listen(halfPort), sayAndListen)
	each(listen(echoPort), func(conn net.Conn) { _, _ = io.Copy(conn, conn) })
	each(listen(whoPort), func(conn net.Conn) {
		for lines := bufio.NewScanner(conn); lines.Scan(); {
			fmt.Fprintln(conn, conn.RemoteAddr())
		}
	})
	each(listen(bannerPort), func(conn net.Conn) {
		fmt.Fprintf(conn, "banner of %s\n%s\n", pod.Name, conn.RemoteAddr())
		_, _ = io.Copy(io.Discard, conn)
	})
	return counts
}

func each(listener net.Listener, f func(net.Conn)) {
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				f(conn)
			}()
		}
	}()
}

const patience = 10 * time.Second

// get asks over HTTP from inside a pod, by a new connection.
func get(pod *lab.Pod, address, path string, http2 bool) (status int, body string, err error) {
	client := client(pod, http2)
	defer client.CloseIdleConnections()
	return ask(client, address, path)
}

func client(pod *lab.Pod, http2 bool) *http.Client {
	transport := &http.Transport{Protocols: new(http.Protocols), MaxIdleConnsPerHost: 100,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) { return pod.Dial(ctx, address) }}
	transport.Protocols.SetHTTP1(!http2)
	transport.Protocols.SetUnencryptedHTTP2(http2)
	return &http.Client{Transport: transport, Timeout: patience}
}

func ask(client *http.Client, address, path string) (status int, body string, err error) {
	response, err := client.Get("http://" + address + path)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	raw, err := io.ReadAll(response.Body)
	return response.StatusCode, string(raw), err
}

// header asks and returns the answer's header.
func header(pod *lab.Pod, address string) (int, http.Header, error) {
	client := client(pod, false)
	defer client.CloseIdleConnections()
	response, err := client.Get("http://" + address + "/")
	if err != nil {
		return 0, nil, err
	}
	return response.StatusCode, response.Header, response.Body.Close()
}

// line sends (if anything) and reads one line.
func line(pod *lab.Pod, address, send string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := pod.Dial(ctx, address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, send); err != nil {
		return "", err
	}
	got, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(got), err
}

// echoUpgraded takes the connection over and echoes, as a WebSocket server would.
func echoUpgraded(w http.ResponseWriter) {
	conn, buffered, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	_, _ = io.Copy(conn, buffered)
}

func upload(pod *lab.Pod, address string, size int64) error {
	client := client(pod, false)
	client.Timeout = time.Minute
	defer client.CloseIdleConnections()
	response, err := client.Post("http://"+address+"/upload", "application/octet-stream", io.LimitReader(zeros{}, size))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && !strings.HasSuffix(string(body), fmt.Sprint(size)) {
		err = fmt.Errorf("%s: %s", response.Status, body)
	}
	return err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func open(pod *lab.Pod, address string) (net.Conn, *bufio.Reader, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := pod.Dial(ctx, address)
	if err != nil {
		return nil, nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	return conn, bufio.NewReader(conn), nil
}

func upgrade(pod *lab.Pod, address string) error {
	conn, reader, err := open(pod, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /socket HTTP/1.1\r\nHost: shop\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n\r\n")
	response, err := http.ReadResponse(reader, nil)
	if err != nil || response.StatusCode != http.StatusSwitchingProtocols {
		return fmt.Errorf("no upgrade: %v %w", response, err)
	}
	for range 3 {
		fmt.Fprintln(conn, "frame")
		if got, err := reader.ReadString('\n'); err != nil || got != "frame\n" {
			return fmt.Errorf("got %q: %w", got, err)
		}
	}
	return nil
}

func trailer(pod *lab.Pod, address string) error {
	conn, reader, err := open(pod, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	fmt.Fprint(conn, "POST /t HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\nTrailer: Checksum\r\n\r\n2\r\nab\r\n0\r\nChecksum: 7\r\n\r\n")
	response, err := http.ReadResponse(reader, nil)
	if err != nil {
		return err
	}
	if got := response.Header.Get("Saw-Checksum"); got != "7" {
		return fmt.Errorf("the app saw trailer %q", got)
	}
	return nil
}

// halfClose ends its own direction and still reads all of the other.
func halfClose(pod *lab.Pod, address string) error {
	conn, reader, err := open(pod, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	const size = 1 << 20
	go func() {
		_, _ = io.CopyN(conn, zeros{}, size)
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	n, err := io.Copy(io.Discard, reader)
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes of %d came back", n, size)
	}
	return err
}

// silent asks for a stream that pauses, as server-sent events do.
func silent(pod *lab.Pod, address string, pause time.Duration) error {
	client := client(pod, false)
	client.Timeout = pause + patience
	defer client.CloseIdleConnections()
	request, err := http.NewRequest(http.MethodGet, "http://"+address+"/events", nil)
	if err != nil {
		return err
	}
	request.Header.Set("Pause", pause.String())
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && string(body) != "begun\nended\n" {
		err = fmt.Errorf("the stream brought %q", body)
	}
	return err
}
