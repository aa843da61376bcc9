// Package envoy runs the node's Envoy: it writes the bootstrap, launches the process with no more rights than it needs, in
// a cgroup of its own, starts it again at once when it dies, and tells the agent about it.
package envoy

import (
	"fmt"
	"slices"
	"time"

	bootstrap "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	metrics "github.com/envoyproxy/go-control-plane/envoy/config/metrics/v3"
	overload "github.com/envoyproxy/go-control-plane/envoy/config/overload/v3"
	fixedheap "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/fixed_heap/v3"
	upstream "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
)

// BootstrapConfig is what a bootstrap is made of.
type BootstrapConfig struct {
	NodeID string
	// Generation of this Envoy, by which the agent knows which listeners are its own.
	Generation uint32
	// AdminSocket is Envoy's, AgentSocket the agent's ADS and SDS: Unix sockets in private directories.
	AdminSocket, AgentSocket string
	// MemoryLimit of the container in bytes; 0: none. Envoy sheds load before it is reached.
	MemoryLimit uint64
}

// denials are the counters of connections that a pod's listener refused: by the peer's identity, for want of a
// certificate, and because no chain takes such callers.
var denials = []string{"ssl.fail_verify_san", "ssl.fail_verify_no_cert", "ssl.fail_verify_error", "no_filter_chain_match"}

// kept statistics, by the beginning of their names; beside them the counters of refused connections and requests. All
// else would cost memory for every pod.
var kept = []string{"cluster_manager.", "listener_manager.", "server.", "overload.", "workers.", "control_plane."}

// released is how much of the memory that Envoy has freed goes back to the kernel each second. By default none of it does: what a
// large update took for a moment would stay with the process. tcmalloc waits for a minute before it parts with what it was asked for
// lately (its skip of subrelease), so that the process is not slowed by giving and taking.
const released = 4 << 20

// Bootstrap makes Envoy's static configuration, as JSON.
func Bootstrap(c BootstrapConfig) ([]byte, error) {
	ads := &core.ConfigSource{ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}}, ResourceApiVersion: core.ApiVersion_V3}
	runtime := map[string]any{}
	for k, v := range lds.Runtime() {
		runtime[k] = v
	}
	layer, err := structpb.NewStruct(runtime)
	if err != nil {
		return nil, fmt.Errorf("make bootstrap: %w", err)
	}
	protocols, err := anypb.New(&upstream.HttpProtocolOptions{UpstreamProtocolOptions: &upstream.HttpProtocolOptions_ExplicitHttpConfig_{
		ExplicitHttpConfig: &upstream.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &upstream.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &core.Http2ProtocolOptions{}},
		},
	}})
	if err != nil {
		return nil, fmt.Errorf("make bootstrap: %w", err)
	}
	var patterns []*matcher.StringMatcher
	for _, prefix := range slices.Sorted(slices.Values(kept)) {
		patterns = append(patterns, &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Prefix{Prefix: prefix}})
	}
	patterns = append(patterns, &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Contains{Contains: "rbac"}})
	for _, suffix := range denials {
		patterns = append(patterns, &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Suffix{Suffix: suffix}})
	}
	b := &bootstrap.Bootstrap{
		Node:  &core.Node{Id: c.NodeID, Cluster: "weft", Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{names.MetadataGeneration: structpb.NewNumberValue(float64(c.Generation))}}},
		Admin: &bootstrap.Admin{Address: pipe(c.AdminSocket)},
		DynamicResources: &bootstrap.Bootstrap_DynamicResources{
			AdsConfig: &core.ApiConfigSource{
				ApiType: core.ApiConfigSource_DELTA_GRPC, TransportApiVersion: core.ApiVersion_V3, SetNodeOnFirstMessageOnly: true,
				GrpcServices: []*core.GrpcService{{TargetSpecifier: &core.GrpcService_EnvoyGrpc_{EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: names.ClusterAgent}}}},
			},
			LdsConfig: ads, CdsConfig: ads,
		},
		StaticResources: &bootstrap.Bootstrap_StaticResources{Clusters: []*cluster.Cluster{{
			Name: names.ClusterAgent, ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC}, ConnectTimeout: durationpb.New(5 * time.Second),
			TypedExtensionProtocolOptions: map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocols},
			LoadAssignment: &endpoint.ClusterLoadAssignment{ClusterName: names.ClusterAgent, Endpoints: []*endpoint.LocalityLbEndpoints{{
				LbEndpoints: []*endpoint.LbEndpoint{{HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: pipe(c.AgentSocket)}}}},
			}}},
		}}},
		StatsConfig:            &metrics.StatsConfig{StatsMatcher: &metrics.StatsMatcher{StatsMatcher: &metrics.StatsMatcher_InclusionList{InclusionList: &matcher.ListStringMatcher{Patterns: patterns}}}},
		DeferredStatOptions:    &bootstrap.Bootstrap_DeferredStatOptions{EnableDeferredCreationStats: true},
		LayeredRuntime:         &bootstrap.LayeredRuntime{Layers: []*bootstrap.RuntimeLayer{{Name: "static", LayerSpecifier: &bootstrap.RuntimeLayer_StaticLayer{StaticLayer: layer}}}},
		OverloadManager:        overloadManager(c.MemoryLimit),
		MemoryAllocatorManager: &bootstrap.MemoryAllocatorManager{BytesToRelease: released},
	}
	out, err := protojson.MarshalOptions{Indent: " "}.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("write bootstrap: %w", err)
	}
	return out, nil
}

func pipe(path string) *core.Address {
	return &core.Address{Address: &core.Address_Pipe{Pipe: &core.Pipe{Path: path, Mode: 0o660}}}
}

// overloadManager sheds load as the heap nears the container's limit.
func overloadManager(limit uint64) *overload.OverloadManager {
	if limit == 0 {
		return nil
	}
	heap, err := anypb.New(&fixedheap.FixedHeapConfig{MaxHeapSizeBytes: limit})
	if err != nil {
		panic(err) // a message of this process always marshals
	}
	action := func(name string, at float64) *overload.OverloadAction {
		return &overload.OverloadAction{Name: name, Triggers: []*overload.Trigger{{Name: "envoy.resource_monitors.fixed_heap",
			TriggerOneof: &overload.Trigger_Threshold{Threshold: &overload.ThresholdTrigger{Value: at}}}}}
	}
	return &overload.OverloadManager{
		RefreshInterval:  durationpb.New(250 * time.Millisecond),
		ResourceMonitors: []*overload.ResourceMonitor{{Name: "envoy.resource_monitors.fixed_heap", ConfigType: &overload.ResourceMonitor_TypedConfig{TypedConfig: heap}}},
		Actions: []*overload.OverloadAction{
			action("envoy.overload_actions.shrink_heap", 0.85),
			action("envoy.overload_actions.disable_http_keepalive", 0.90),
			action("envoy.overload_actions.stop_accepting_requests", 0.95),
		},
	}
}
