// Command load runs the traffic generator and prints its counters, one JSON object a line; or it is an attacker, or what is
// attacked, of the tests of hostile pods.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/weftmesh/weft/test/load"
)

func main() {
	if len(os.Args) > 1 && hostile[os.Args[1]] != nil {
		if err := hostile[os.Args[1]](os.Args[2:]); err != nil {
			log.Fatal(err)
		}
		return
	}
	targets := flag.String("targets", os.Getenv("LOAD_TARGETS"), "JSON list of targets, or @file")
	every := flag.Duration("every", 500*time.Millisecond, "time between two lines")
	last := flag.Duration("for", 0, "stop after this time; 0: on SIGTERM")
	timeout := flag.Duration("timeout", 10*time.Second, "timeout of one request")
	held := flag.Bool("held", false, "open no connection before -begin")
	begin := flag.Bool("begin", false, "let the container's process 1, which is -held, begin; then end")
	flag.Parse()
	if *begin {
		if err := syscall.Kill(1, syscall.SIGUSR1); err != nil {
			log.Fatalf("let process 1 begin: %v", err)
		}
		return
	}
	start := make(chan os.Signal, 1)
	if *held {
		signal.Notify(start, syscall.SIGUSR1)
	} else {
		close(start)
	}
	if err := run(start, *held, *targets, *every, *last, *timeout); err != nil {
		log.Fatal(err)
	}
}

// awaitAccepted waits until every target accepts a connection: a pod is ready a moment before its Service leads to it.
func awaitAccepted(ctx context.Context, targets []load.Target) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, t := range targets {
		for {
			c, err := (&net.Dialer{}).DialContext(ctx, "tcp", t.Address)
			if err == nil {
				_ = c.Close()
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("wait for %s to accept: %w", t.Address, err)
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	return nil
}

func run(start <-chan os.Signal, held bool, targets string, every, last, timeout time.Duration) error {
	text := []byte(targets)
	if len(text) > 0 && text[0] == '@' {
		var err error
		if text, err = os.ReadFile(targets[1:]); err != nil {
			return fmt.Errorf("read targets: %w", err)
		}
	}
	c := load.Config{Timeout: timeout}
	if err := json.Unmarshal(text, &c.Targets); err != nil {
		return fmt.Errorf("read targets (a JSON list in -targets or LOAD_TARGETS): %w", err)
	}
	g, err := load.NewGenerator(c)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if last > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, last)
		defer cancel()
	}
	if !held {
		if err := awaitAccepted(ctx, c.Targets); err != nil && ctx.Err() == nil {
			return err
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-start:
			g.Run(ctx)
		case <-ctx.Done():
		}
	}()
	out := json.NewEncoder(os.Stdout)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return out.Encode(g.Stats())
		case <-tick.C:
			if err := out.Encode(g.Stats()); err != nil {
				return fmt.Errorf("print counters: %w", err)
			}
		}
	}
}
