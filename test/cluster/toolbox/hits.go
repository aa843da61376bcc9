package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// hits counts what reached the app, by name: requests to /hit/{name}, "tcp" connections and "grpc" health checks.
type hits struct {
	mu    sync.Mutex
	count map[string]int
}

// add also logs the first of each name, for what comes when the app ends and nobody can ask it any more.
func (h *hits) add(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.count[name]++; h.count[name] == 1 {
		slog.Info("first hit", "name", name)
	}
}

func (h *hits) all() map[string]int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.count)
}

// serveHealth answers gRPC health checks, counted as "grpc".
func serveHealth(address string, seen *hits) (stop func(), err error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		seen.add("grpc")
		return handle(ctx, request)
	}))
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	go func() { _ = server.Serve(listener) }()
	return server.Stop, nil
}
