// Package xds makes Envoy's and weft's own resources of a snapshot. Every resource is a pure function of the snapshot
// and its name, the same for every node: Build answers any name of any kind, Names lists what an agent subscribes to by
// wildcard. Nothing is built before somebody asks for it.
//
// An unknown cluster, route or load assignment has an answer too, one that refuses: Envoy would wait for a missing one
// until its timeout, every time.
//
// Order. A cluster holds one transport socket match per identity among its endpoints. When that set changes, the
// cluster changes, and the stream must send the cluster before the load assignment that needs it (an endpoint without
// its match is refused, never spoken to in plaintext), and must send the load assignment again after a cluster that
// changed, or Envoy keeps waiting for it. A pool moves to new connections when an endpoint's hostname changes
// (ir.Endpoint.Generation), so nothing here may use the hostname for anything else.
package xds
