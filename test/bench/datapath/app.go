package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
)

// Ports of the app. Each protocol with HTTP has two: the callee's policy for the second looks at requests.
const (
	portHTTP     = 8080
	portHTTPRule = 8081
	portGRPC     = 9090
	portGRPCRule = 9091
	portEcho     = 7000
	portSink     = 7001
)

// app serves all ports, as cheaply as Go can: requests are told apart and not parsed.
func app([]string) error {
	failed := make(chan error, 1)
	for port, serve := range map[int]func(net.Listener) error{
		portHTTP: loop(answers), portHTTPRule: loop(answers), portGRPC: pings, portGRPCRule: pings, portEcho: loop(echoes), portSink: loop(sinks),
	} {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go func() { failed <- serve(l) }()
	}
	return <-failed
}

func loop(serve func(net.Conn) error) func(net.Listener) error {
	return func(l net.Listener) error {
		for {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			go func() {
				defer c.Close()
				_ = serve(c) // the client has gone
			}()
		}
	}
}

// answers gives 1 KB to every request without a body.
func answers(c net.Conn) error {
	body := bytes.Repeat([]byte("x"), 1024)
	kept := append([]byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\n\r\n"), body...)
	last := append([]byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\nConnection: close\r\n\r\n"), body...)
	buffer, have := make([]byte, 16<<10), 0
	for {
		end := bytes.Index(buffer[:have], []byte("\r\n\r\n"))
		if end < 0 {
			if have == len(buffer) {
				return errors.New("the request's head is too long")
			}
			n, err := c.Read(buffer[have:])
			if err != nil {
				return err
			}
			have += n
			continue
		}
		head := bytes.ToLower(buffer[:end])
		if !bytes.HasPrefix(head, []byte("get ")) {
			return errors.New("not a GET")
		}
		closing := bytes.Contains(head, []byte("connection: close"))
		have = copy(buffer, buffer[end+4:have])
		if closing {
			_, err := c.Write(last)
			return err
		}
		if _, err := c.Write(kept); err != nil {
			return err
		}
	}
}

// raw passes messages as they are.
type raw struct{}

func (raw) Name() string { return "raw" }

func (raw) Marshal(m any) ([]byte, error) { return *m.(*[]byte), nil }

func (raw) Unmarshal(data []byte, m any) error {
	*m.(*[]byte) = bytes.Clone(data)
	return nil
}

var _ encoding.Codec = raw{}

// pings answers every unary call with its request, as fortio's ping wants it.
func pings(l net.Listener) error {
	return grpc.NewServer(grpc.ForceServerCodec(raw{}), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		var message []byte
		if err := s.RecvMsg(&message); err != nil {
			return err
		}
		return s.SendMsg(&message)
	})).Serve(l)
}

func echoes(c net.Conn) error {
	buffer := make([]byte, 16<<10)
	for {
		n, err := c.Read(buffer)
		if err != nil {
			return err
		}
		if _, err := c.Write(buffer[:n]); err != nil {
			return err
		}
	}
}

// sinks reads to the end and answers how much it was.
func sinks(c net.Conn) error {
	buffer, all := make([]byte, 256<<10), uint64(0)
	for {
		n, err := c.Read(buffer)
		all += uint64(n)
		if errors.Is(err, io.EOF) {
			return binary.Write(c, binary.BigEndian, all)
		}
		if err != nil {
			return err
		}
	}
}

// sent is what send reports.
type sent struct {
	Bytes   uint64  `json:"bytes"`
	Seconds float64 `json:"seconds"`
}

// send fills connections to a sink: address, connections, seconds. What arrived counts, until it has.
func send(arguments []string) error {
	if len(arguments) != 3 {
		return errors.New("give address, connections and seconds")
	}
	count, err := strconv.Atoi(arguments[1])
	if err != nil {
		return err
	}
	length, err := strconv.ParseFloat(arguments[2], 64)
	if err != nil {
		return err
	}
	begun := time.Now()
	until := begun.Add(time.Duration(length * float64(time.Second)))
	type result struct {
		bytes uint64
		err   error
	}
	results := make(chan result, count)
	for range count {
		go func() {
			n, err := fill(arguments[0], until)
			results <- result{n, err}
		}()
	}
	all := sent{}
	for range count {
		r := <-results
		if r.err != nil {
			return r.err
		}
		all.Bytes += r.bytes
	}
	all.Seconds = time.Since(begun).Seconds()
	return json.NewEncoder(os.Stdout).Encode(all)
}

func fill(address string, until time.Time) (arrived uint64, err error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	buffer := make([]byte, 256<<10)
	for time.Now().Before(until) {
		if _, err := c.Write(buffer); err != nil {
			return 0, err
		}
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return 0, err
	}
	return arrived, binary.Read(c, binary.BigEndian, &arrived)
}
