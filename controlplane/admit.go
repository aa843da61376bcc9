package main

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// streams that one connection may have at a time: an agent has a handful, and asks for SVIDs beside them.
const streams = 100

// admit refuses, before anything of a call is read, what a caller without a certificate may not ask: all but Bootstrap.
func admit(ctx context.Context, call *tap.Info) (context.Context, error) {
	if call.FullMethodName == meshv1.Identity_Bootstrap_FullMethodName {
		return ctx, nil
	}
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(info.State.VerifiedChains) > 0 {
			return ctx, nil
		}
	}
	return nil, status.Error(codes.Unauthenticated, "show a certificate of the mesh; without one only Bootstrap is answered")
}
