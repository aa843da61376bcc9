package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strings"
	"sync"
	"time"
)

// call is one request of a batch: an HTTP request if URL is set, else a line sent to Address by TCP.
type call struct {
	URL     string            `json:"url,omitempty"`
	Method  string            `json:"method,omitempty"`
	Headers map[string]string `json:"headers,omitempty"`
	H2C     bool              `json:"h2c,omitempty"`
	Address string            `json:"address,omitempty"`
	// Line is sent with a newline; empty: nothing is sent, the server speaks first.
	Line string `json:"line,omitempty"`
	// Timeout in milliseconds. 0: 5 s.
	Timeout int `json:"timeout,omitempty"`
}

// outcome is what became of a call. Status is 0 unless an HTTP answer came.
type outcome struct {
	Status int    `json:"status,omitempty"`
	Body   string `json:"body,omitempty"`
	Error  string `json:"error,omitempty"`
	// Location is where a redirect leads.
	Location string `json:"location,omitempty"`
	// Local is the client's end of the connection.
	Local string `json:"local,omitempty"`
}

// batch reads a JSON list of calls from its input, makes all of them side by side, each on a connection of its own, and
// prints the list of outcomes.
func batch(args []string) error {
	if len(args) != 0 {
		return errors.New("batch: want no arguments")
	}
	var calls []call
	if err := json.NewDecoder(os.Stdin).Decode(&calls); err != nil {
		return fmt.Errorf("read calls: %w", err)
	}
	outcomes := make([]outcome, len(calls))
	var wait sync.WaitGroup
	for i, c := range calls {
		wait.Go(func() {
			limit := 5 * time.Second
			if c.Timeout > 0 {
				limit = time.Duration(c.Timeout) * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			do := c.http
			if c.URL == "" {
				do = c.tcp
			}
			var err error
			if outcomes[i], err = do(ctx); err != nil {
				outcomes[i].Error = err.Error()
			}
		})
	}
	wait.Wait()
	return json.NewEncoder(os.Stdout).Encode(outcomes)
}

func (c call) http(ctx context.Context) (outcome, error) {
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	if c.H2C {
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetUnencryptedHTTP2(true)
	}
	var o outcome
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(g httptrace.GotConnInfo) { o.Local = g.Conn.LocalAddr().String() }})
	r, err := http.NewRequestWithContext(ctx, c.Method, c.URL, nil)
	if err != nil {
		return o, fmt.Errorf("make request: %w", err)
	}
	for name, value := range c.Headers {
		r.Header.Set(name, value)
	}
	answer, err := transport.RoundTrip(r)
	if err != nil {
		return o, fmt.Errorf("request %s: %w", c.URL, err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, 64<<10))
	o.Status, o.Body, o.Location = answer.StatusCode, strings.TrimSpace(string(body)), answer.Header.Get("Location")
	return o, err
}

func (c call) tcp(ctx context.Context) (outcome, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", c.Address)
	if err != nil {
		return outcome{}, fmt.Errorf("connect: %w", err)
	}
	defer conn.Close()
	o := outcome{Local: conn.LocalAddr().String()}
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	if c.Line != "" {
		if _, err := fmt.Fprintln(conn, c.Line); err != nil {
			return o, fmt.Errorf("write: %w", err)
		}
	}
	reader := bufio.NewReader(conn)
	line, err := reader.ReadString('\n')
	if err != nil {
		o.Body = line
		return o, fmt.Errorf("read: %w", err)
	}
	o.Body = strings.TrimSpace(line)
	return o, nil
}
