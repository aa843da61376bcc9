package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/examples/shop/shoppb"
)

// grpc keeps one client connection after the other; each of its TCP connections after the first is counted, and is
// broken unless the stream on it had ended well.
func (c *client) grpc(ctx context.Context, use func(context.Context, shoppb.PricesClient) error) {
	for ctx.Err() == nil {
		if err := c.grpcConnection(ctx, use); err != nil && ctx.Err() == nil {
			c.fail(err.Error())
			c.backOff(ctx)
		}
	}
}

func (c *client) grpcConnection(ctx context.Context, use func(context.Context, shoppb.PricesClient) error) error {
	dials := 0
	conn, err := grpc.NewClient("passthrough:///"+c.Address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDisableRetry(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1, MaxDelay: 50 * time.Millisecond}, MinConnectTimeout: c.config.Timeout}),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			dials++
			if dials > 1 {
				c.closed.Add(1) // GOAWAY: announced; a stream that breaks is counted where it breaks
				c.ended()
			}
			c.opened()
			return c.config.Dial(ctx, "tcp", address)
		}))
	if err != nil {
		return fmt.Errorf("dial %s: %w", c.Address, err)
	}
	defer conn.Close()
	defer c.ended()
	return use(ctx, shoppb.NewPricesClient(conn))
}

func (c *client) unary(ctx context.Context, client shoppb.PricesClient) error {
	for n := 1; ; n++ {
		c.sequence++
		call, cancel := context.WithTimeout(ctx, c.config.Timeout)
		price, err := client.Get(call, &shoppb.PriceRequest{Item: "loom", Sequence: c.sequence})
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		c.status(status.Code(err).String())
		if err != nil {
			c.broken.Add(1)
			return fmt.Errorf("call %d: %w", c.sequence, err)
		}
		c.answered(price)
		if !c.pause(ctx) || n == c.PerConnection {
			return nil
		}
	}
}

func (c *client) stream(ctx context.Context, client shoppb.PricesClient) error {
	// The stream outlives ctx by its last answer and its end, so that the end of the run is no failure.
	open, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	watch, err := client.Watch(open)
	if err != nil {
		c.broken.Add(1)
		return fmt.Errorf("open stream: %w", err)
	}
	for n := 1; ; n++ {
		c.sequence++
		stop := time.AfterFunc(c.config.Timeout, cancel)
		err := watch.Send(&shoppb.PriceRequest{Item: "loom", Sequence: c.sequence})
		var price *shoppb.Price
		if err == nil || errors.Is(err, io.EOF) {
			price, err = watch.Recv()
		}
		stop.Stop()
		if err != nil {
			c.broken.Add(1)
			return fmt.Errorf("message %d on the stream: %w", c.sequence, err)
		}
		c.answered(price)
		if !c.pause(ctx) || n == c.PerConnection {
			break
		}
	}
	defer time.AfterFunc(c.config.Timeout, cancel).Stop()
	if err := watch.CloseSend(); err != nil {
		c.broken.Add(1)
		return fmt.Errorf("half-close the stream: %w", err)
	}
	if _, err := watch.Recv(); !errors.Is(err, io.EOF) {
		c.broken.Add(1)
		return fmt.Errorf("wait for the stream's end: got %v", err)
	}
	return nil
}

func (c *client) answered(p *shoppb.Price) {
	if p.Sequence != c.sequence {
		c.fail(fmt.Sprintf("answer to %d carries sequence %d", c.sequence, p.Sequence))
		return
	}
	c.requests.Add(1)
	c.seen(p.Client, p.Server)
}
