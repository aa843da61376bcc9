package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// answer is what the HTTP server tells about a request.
type answer struct {
	Pod     string      `json:"pod"`
	Remote  string      `json:"remote"`
	Local   string      `json:"local"`
	Method  string      `json:"method"`
	Path    string      `json:"path"`
	Host    string      `json:"host"`
	Proto   string      `json:"proto"`
	Headers http.Header `json:"headers"`
}

// serve answers HTTP/1.1 and h2c, and echoes lines with the client's address by TCP and UDP, until SIGTERM.
func serve(args []string) error {
	flags := flag.NewFlagSet("serve", flag.ExitOnError)
	web := flags.String("http", ":8080", "address of the HTTP server")
	tcp := flags.String("tcp", ":9000", "address of the TCP echo server")
	greet := flags.String("greet", ":9001", "address of the TCP server that speaks first")
	udp := flags.String("udp", ":9000", "address of the UDP echo server")
	health := flags.String("grpc", ":9002", "address of the gRPC health service")
	if err := flags.Parse(args); err != nil || flags.NArg() != 0 {
		return errors.New("serve: want no arguments")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	pod, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("read the pod's name: %w", err)
	}
	listener, err := net.Listen("tcp", *tcp)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	seen := &hits{count: map[string]int{}}
	go serveTCP(listener, func(conn net.Conn) {
		seen.add("tcp")
		echo(conn, pod)
	})
	greeter, err := net.Listen("tcp", *greet)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	go serveTCP(greeter, func(conn net.Conn) {
		fmt.Fprintf(conn, "welcome to %s %s\n", pod, conn.RemoteAddr())
		echo(conn, pod)
	})
	packets, err := net.ListenPacket("udp", *udp)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	go echoUDP(packets, pod)
	stopHealth, err := serveHealth(*health, seen)
	if err != nil {
		return err
	}
	defer stopHealth()
	server := &http.Server{Addr: *web, Handler: handler(pod, seen), ReadHeaderTimeout: 10 * time.Second, Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	ended := make(chan error, 1)
	go func() { ended <- server.ListenAndServe() }()
	slog.Info("serving", "pod", pod, "http", *web, "tcp", *tcp, "greet", *greet, "udp", *udp)
	select {
	case err := <-ended:
		return fmt.Errorf("serve HTTP: %w", err)
	case <-ctx.Done():
	}
	closing, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return server.Shutdown(closing)
}

func handler(pod string, seen *hits) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(answer{Pod: pod, Remote: r.RemoteAddr, Local: local.String(), Method: r.Method, Path: r.URL.RequestURI(), Host: r.Host, Proto: r.Proto, Headers: r.Header})
	})
	mux.HandleFunc("/pod", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, pod) })
	mux.HandleFunc("/hit/{name}", func(_ http.ResponseWriter, r *http.Request) { seen.add(r.PathValue("name")) })
	mux.HandleFunc("/hits", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(seen.all()) })
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.PathValue("code"))
		if err != nil || code < 200 || code > 599 {
			code = http.StatusBadRequest
		}
		w.WriteHeader(code)
	})
	mux.HandleFunc("/delay/{time}", func(w http.ResponseWriter, r *http.Request) {
		delay, err := time.ParseDuration(r.PathValue("time"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		select {
		case <-time.After(delay):
			fmt.Fprintln(w, pod)
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/bytes/{count}", func(w http.ResponseWriter, r *http.Request) {
		count, err := strconv.ParseInt(r.PathValue("count"), 10, 64)
		if err != nil || count < 0 {
			http.Error(w, "want a number of bytes", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(count, 10))
		_, _ = io.CopyN(w, zeros{}, count)
	})
	return mux
}

// zeros is an endless body.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func serveTCP(listener net.Listener, talk func(net.Conn)) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			talk(conn)
		}()
	}
}

// echo answers each line with the pod's name, the client's address and the line.
func echo(conn net.Conn, pod string) {
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		if _, err := fmt.Fprintf(conn, "%s %s %s\n", pod, conn.RemoteAddr(), lines.Text()); err != nil {
			return
		}
	}
}

func echoUDP(packets net.PacketConn, pod string) {
	buffer := make([]byte, 64<<10)
	for {
		n, from, err := packets.ReadFrom(buffer)
		if err != nil {
			return
		}
		_, _ = packets.WriteTo(fmt.Appendf(nil, "%s %s %s", pod, from, buffer[:n]), from)
	}
}
