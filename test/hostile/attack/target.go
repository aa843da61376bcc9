package attack

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
)

// Seen is the Unix socket by which a target tells what its app saw.
const Seen = "@weft-hostile-seen"

// Sight is what an app saw: a connection, or a request on one.
type Sight struct {
	Port   int    `json:"port"`
	Remote string `json:"remote"`
	// Request is the method and path of an HTTP request; empty for a connection.
	Request string `json:"request,omitempty"`
	// Bytes are the first that came.
	Bytes []byte `json:"bytes,omitempty"`
}

// target counts what reaches an app.
type target struct {
	mu    sync.Mutex
	all   []*Sight
	first int // what was thrown away before all
}

const kept = 50000

func (t *target) add(s Sight) *Sight {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.all) >= kept {
		t.all = t.all[1:]
		t.first++
	}
	t.all = append(t.all, &s)
	return &s
}

// append keeps the first bytes of a sight.
func (t *target) append(s *Sight, b []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if room := 8192 - len(s.Bytes); room > 0 {
		s.Bytes = append(s.Bytes, b[:min(room, len(b))]...)
	}
}

// since is what was seen from a number on, and the next number.
func (t *target) since(from int) Report {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := Report{Next: t.first + len(t.all), All: []Sight{}}
	own, _ := net.InterfaceAddrs() // an answer without them shows as such
	for _, a := range own {
		r.Addresses = append(r.Addresses, a.String())
	}
	for i := max(from-t.first, 0); i < len(t.all); i++ {
		r.All = append(r.All, *t.all[i])
	}
	return r
}

// Report is what a target tells.
type Report struct {
	// Addresses are the pod's own, with their prefixes.
	Addresses []string `json:"addresses"`
	Next      int      `json:"next"`
	All       []Sight  `json:"all"`
}

// Serve is an app that keeps what it sees: HTTP on the first port, lines on the second, a greeting on the third, and a
// port that no Service names.
func Serve(ctx context.Context, ports [4]int) error {
	t := &target{}
	for i, talk := range []func(*recorded){t.web, t.echo, t.greet, t.echo} {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", fmt.Sprintf(":%d", ports[i]))
		if err != nil {
			return fmt.Errorf("listen: %w", err)
		}
		go t.accept(l, ports[i], talk)
	}
	l, err := net.Listen("unix", Seen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			var from int
			if json.NewDecoder(c).Decode(&from) == nil {
				_ = json.NewEncoder(c).Encode(t.since(from))
			}
			c.Close()
		}
	}()
	<-ctx.Done()
	return nil
}

// Ask asks the target of the same pod what it saw from a number on.
func Ask(from int, out io.Writer) error {
	c, err := net.Dial("unix", Seen)
	if err != nil {
		return fmt.Errorf("ask the target: %w", err)
	}
	defer c.Close()
	if err := json.NewEncoder(c).Encode(from); err != nil {
		return fmt.Errorf("ask the target: %w", err)
	}
	_, err = io.Copy(out, c)
	return err
}

// recorded is a connection whose bytes are kept.
type recorded struct {
	net.Conn
	target *target
	sight  *Sight
	port   int
}

func (r *recorded) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	r.target.append(r.sight, b[:n])
	return n, err
}

func (t *target) accept(l net.Listener, port int, talk func(*recorded)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			talk(&recorded{c, t, t.add(Sight{Port: port, Remote: c.RemoteAddr().String()}), port})
		}()
	}
}

// web answers requests with what it was asked. What is no HTTP is answered too: an attacker is to hear of an app.
func (t *target) web(c *recorded) {
	in := bufio.NewReader(c)
	for {
		r, err := http.ReadRequest(in)
		if err != nil {
			if len(c.bytes()) > 0 {
				fmt.Fprint(c, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\napp: no request\n")
			}
			return
		}
		var head bytes.Buffer
		_ = r.Header.Write(&head)
		fmt.Fprintf(&head, "Host: %s\r\n", r.Host)
		_, _ = io.Copy(io.Discard, r.Body)
		_ = r.Trailer.Write(&head)
		t.add(Sight{Port: c.port, Remote: c.RemoteAddr().String(), Request: r.Method + " " + r.RequestURI, Bytes: head.Bytes()})
		body := fmt.Sprintf("app: %s %s\n%s", r.Method, r.RequestURI, head.String())
		sequence := ""
		if n := r.Header.Get("X-Sequence"); n != "" { // the traffic generator's
			sequence = "X-Sequence: " + n + "\r\n"
		}
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s", sequence, len(body), body)
		if r.Close {
			return
		}
	}
}

func (r *recorded) bytes() []byte {
	r.target.mu.Lock()
	defer r.target.mu.Unlock()
	return bytes.Clone(r.sight.Bytes)
}

func (t *target) echo(c *recorded) {
	for lines := bufio.NewReader(c); ; {
		line, err := lines.ReadString('\n')
		if line != "" {
			fmt.Fprintf(c, "app: %s", line)
		}
		if err != nil {
			return
		}
	}
}

func (t *target) greet(c *recorded) {
	fmt.Fprint(c, "app: welcome\n")
	t.echo(c)
}
