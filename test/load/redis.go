package load

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

const pipeline = 8

// redis pipelines INCR of a key that is this client's alone: every answer must be the next number, so a lost, doubled
// or reordered command shows.
func (c *client) redis(ctx context.Context) {
	host, _ := os.Hostname()
	key := fmt.Sprintf("load:%s:%d:%s:%d:%d", host, os.Getpid(), c.Name, c.index, time.Now().UnixNano())
	var number uint64
	for ctx.Err() == nil {
		conn := c.dial(ctx)
		if conn == nil {
			continue
		}
		err := c.pipelines(ctx, conn, key, &number)
		c.ended()
		_ = conn.Close()
		if err != nil {
			c.broken.Add(1)
			c.fail(err.Error())
			key, number = key+":", 0 // what was in flight may have counted or not
		}
	}
}

func (c *client) pipelines(ctx context.Context, conn net.Conn, key string, number *uint64) error {
	reader := bufio.NewReader(conn)
	batch := []byte(strings.Repeat("INCR "+key+"\r\n", pipeline))
	_ = conn.SetDeadline(time.Now().Add(c.config.Timeout))
	from, at, err := redisView(conn, reader)
	if err != nil {
		return err
	}
	for sent := pipeline; ; sent += pipeline {
		_ = conn.SetDeadline(time.Now().Add(c.config.Timeout))
		if _, err := conn.Write(batch); err != nil {
			return fmt.Errorf("send pipeline: %w", err)
		}
		for range pipeline {
			line, err := reader.ReadString('\n')
			if err != nil {
				return fmt.Errorf("read answer after %d: %w", *number, err)
			}
			got, err := strconv.ParseUint(strings.TrimSpace(strings.TrimPrefix(line, ":")), 10, 64)
			if err != nil || got != *number+1 {
				return fmt.Errorf("redis answered %q, want :%d", strings.TrimSpace(line), *number+1)
			}
			*number = got
			c.requests.Add(1)
			c.seen(from, at)
		}
		more := c.pause(ctx)
		if c.PerConnection != 0 && sent >= c.PerConnection {
			return c.halfClose(conn, reader)
		}
		if !more {
			return nil
		}
	}
}

// redisView asks redis whom it sees on the connection, and at which address of its own.
func redisView(conn io.Writer, reader *bufio.Reader) (from, at string, err error) {
	if _, err := io.WriteString(conn, "CLIENT INFO\r\n"); err != nil {
		return "", "", fmt.Errorf("send CLIENT INFO: %w", err)
	}
	line, err := reader.ReadString('\n')
	if err != nil {
		return "", "", fmt.Errorf("read answer to CLIENT INFO: %w", err)
	}
	size, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(line, "$")))
	if err != nil || size < 0 || size > 1<<16 {
		return "", "", fmt.Errorf("redis answered %q to CLIENT INFO, want its length", strings.TrimSpace(line))
	}
	text := make([]byte, size+len("\r\n"))
	if _, err := io.ReadFull(reader, text); err != nil {
		return "", "", fmt.Errorf("read answer to CLIENT INFO: %w", err)
	}
	for _, field := range strings.Fields(string(text)) {
		if value, ok := strings.CutPrefix(field, "addr="); ok {
			from = value
		} else if value, ok := strings.CutPrefix(field, "laddr="); ok {
			at = value
		}
	}
	return from, at, nil
}

// halfClose ends a connection whose answers have all come: the other side must end its half too.
func (c *client) halfClose(conn net.Conn, reader *bufio.Reader) error {
	half, ok := conn.(interface{ CloseWrite() error })
	if !ok {
		return nil
	}
	_ = conn.SetDeadline(time.Now().Add(c.config.Timeout))
	if err := half.CloseWrite(); err != nil {
		return fmt.Errorf("half-close: %w", err)
	}
	if _, err := reader.ReadByte(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("wait for the other half's end: got %v", err)
	}
	return nil
}
