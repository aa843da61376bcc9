package main

import (
	"context"
	"net"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/net/multiplex"
	"github.com/containerd/ttrpc"
)

// podless is a container runtime without pods, as NRI's plugins see it.
type podless struct {
	path     string
	listener net.Listener
}

func newPodless(path string) (*podless, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go plug(c)
		}
	}()
	return &podless{path, l}, nil
}

func (r *podless) stop() { r.listener.Close() }

// plugged answers one plugin.
type plugged struct {
	api.RuntimeService
	plugin api.PluginService
}

func plug(c net.Conn) {
	defer c.Close()
	mux := multiplex.Multiplex(c)
	to, err := mux.Open(multiplex.PluginServiceConn)
	if err != nil {
		return
	}
	from, err := mux.Listen(multiplex.RuntimeServiceConn)
	if err != nil {
		return
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return
	}
	api.RegisterRuntimeService(server, &plugged{plugin: api.NewPluginClient(ttrpc.NewClient(to))})
	_ = server.Serve(context.Background(), from) // until the plugin goes
}

// RegisterPlugin takes any, and then tells it that there is no pod.
func (p *plugged) RegisterPlugin(context.Context, *api.RegisterPluginRequest) (*api.Empty, error) {
	go func() {
		ctx := context.Background()
		if _, err := p.plugin.Configure(ctx, &api.ConfigureRequest{RuntimeName: "none", RuntimeVersion: "1", RegistrationTimeout: 5000, RequestTimeout: 2000}); err != nil {
			return
		}
		_, _ = p.plugin.Synchronize(ctx, &api.SynchronizeRequest{})
	}()
	return &api.Empty{}, nil
}

// UpdateContainers changes nothing.
func (p *plugged) UpdateContainers(context.Context, *api.UpdateContainersRequest) (*api.UpdateContainersResponse, error) {
	return &api.UpdateContainersResponse{}, nil
}
