package load

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"
)

// http sends requests on connections of its own making: net/http's client would retry and reconnect by itself.
func (c *client) http(ctx context.Context) {
	for ctx.Err() == nil {
		if conn := c.dial(ctx); conn != nil {
			c.requestsOn(ctx, conn)
			c.ended()
			_ = conn.Close()
		}
	}
}

func (c *client) requestsOn(ctx context.Context, conn net.Conn) {
	reader := bufio.NewReader(conn)
	for n := 1; ; n++ {
		last := n == c.PerConnection
		closing, err := c.request(conn, reader, last)
		switch {
		case err != nil:
			c.broken.Add(1)
			c.fail(err.Error())
			return
		case closing && !last:
			c.closed.Add(1)
			return
		case last:
			c.pause(ctx)
			return
		}
		if !c.pause(ctx) {
			return
		}
	}
}

var errIdleClose = errors.New("connection ended before the first byte of the answer")

// request sends one request and reads its whole answer; closing: the server will close the connection.
func (c *client) request(conn net.Conn, reader *bufio.Reader, last bool) (closing bool, err error) {
	c.sequence++
	sequence := fmt.Sprintf("%d-%d", c.index, c.sequence)
	host := c.Host
	if host == "" {
		host = c.Address
	}
	req, err := http.NewRequest(http.MethodGet, "http://"+host+c.Path, nil)
	if err != nil {
		return false, fmt.Errorf("make request: %w", err)
	}
	req.Header.Set("X-Sequence", sequence)
	for k, v := range c.Headers {
		req.Header.Set(k, v)
	}
	req.Close = last
	_ = conn.SetDeadline(time.Now().Add(c.config.Timeout))
	if err := req.Write(conn); err != nil {
		return false, fmt.Errorf("send %s: %w", sequence, err)
	}
	if _, err := reader.Peek(1); err != nil {
		return false, fmt.Errorf("%w (request %s): %w", errIdleClose, sequence, err)
	}
	resp, err := http.ReadResponse(reader, req)
	if err != nil {
		return false, fmt.Errorf("read answer to %s: %w", sequence, err)
	}
	body, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil {
		return false, fmt.Errorf("read body of %s after %d bytes: %w", sequence, len(body), err)
	}
	c.status(strconv.Itoa(resp.StatusCode))
	if resp.StatusCode != c.Expect {
		c.fail(fmt.Sprintf("answer to %s: status %d, want %d: %.160s", sequence, resp.StatusCode, c.Expect, body))
		return resp.Close, nil
	}
	if got := resp.Header.Get("X-Sequence"); resp.StatusCode == http.StatusOK && got != sequence {
		c.fail(fmt.Sprintf("answer to %s carries sequence %q", sequence, got))
		return resp.Close, nil
	}
	c.requests.Add(1)
	version := resp.Header.Get("X-Version")
	if version == "" {
		version = resp.Header.Get("X-Catalogue")
	}
	c.version(version)
	c.seen(resp.Header.Get("X-Client"), resp.Header.Get("X-Server"))
	return resp.Close, nil
}
