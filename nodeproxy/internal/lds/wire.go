package lds

import (
	"fmt"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	common "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	envoytype "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weftmesh/weft/api/names"
)

// pack wraps a message, same content giving the same bytes.
func pack(m proto.Message) *anypb.Any {
	packed := &anypb.Any{}
	if err := anypb.MarshalFrom(packed, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		panic(fmt.Sprintf("marshal %s: %v", m.ProtoReflect().Descriptor().FullName(), err)) // only invalid UTF-8 does this
	}
	return packed
}

func extension(name string, m proto.Message) *core.TypedExtensionConfig {
	return &core.TypedExtensionConfig{Name: name, TypedConfig: pack(m)}
}

func network(name string, m proto.Message) *listener.Filter {
	return &listener.Filter{Name: name, ConfigType: &listener.Filter_TypedConfig{TypedConfig: pack(m)}}
}

func truth(v bool) *wrapperspb.BoolValue           { return wrapperspb.Bool(v) }
func seconds(d time.Duration) *durationpb.Duration { return durationpb.New(d) }
func number(v uint32) *wrapperspb.UInt32Value      { return wrapperspb.UInt32(v) }
func percent(v float64) *envoytype.Percent         { return &envoytype.Percent{Value: v} }
func inline(text string) *core.SubstitutionFormatString {
	return &core.SubstitutionFormatString{Format: &core.SubstitutionFormatString_TextFormatSource{
		TextFormatSource: &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: text}}}}
}

// ads is the stream that Envoy has to the agent.
func ads() *core.ConfigSource {
	return &core.ConfigSource{
		ResourceApiVersion:    core.ApiVersion_V3,
		ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}},
	}
}

// state sets a filter state to what format yields. Shared state reaches the upstream side, separates connection pools
// and picks netns and certificate there.
func state(key, factory, format string, shared bool) *common.FilterStateValue {
	value := &common.FilterStateValue{
		Key:        &common.FilterStateValue_ObjectKey{ObjectKey: key},
		FactoryKey: factory,
		Value:      &common.FilterStateValue_FormatString{FormatString: inline(format)},
	}
	if shared {
		value.SharedWithUpstream = common.FilterStateValue_TRANSITIVE
	}
	return value
}

// literal makes constant text safe in a format string.
func literal(text string) string {
	var out []byte
	for i := range len(text) {
		if text[i] == '%' {
			out = append(out, '%')
		}
		out = append(out, text[i])
	}
	return string(out)
}

// socketTag marks Envoy's own upstream sockets for the hooks. Without extra an IPv6 socket would not be tagged, and
// would open in Envoy's own netns.
func bindConfig(tag int64) *core.BindConfig {
	options := []*core.SocketOption{{
		Description: "weft's tag of Envoy's own sockets",
		Level:       names.SocketOptionLevel,
		Name:        names.SocketOptionName,
		Value:       &core.SocketOption_IntValue{IntValue: tag << 16},
		State:       core.SocketOption_STATE_PREBIND,
	}}
	unbound := func(address string) *core.SocketAddress {
		return &core.SocketAddress{Address: address, PortSpecifier: &core.SocketAddress_PortValue{PortValue: 0}}
	}
	return &core.BindConfig{
		SourceAddress: unbound("0.0.0.0"),
		SocketOptions: options,
		ExtraSourceAddresses: []*core.ExtraSourceAddress{{
			Address:       unbound("::"),
			SocketOptions: &core.SocketOptionsOverride{SocketOptions: options},
		}},
		LocalAddressSelector: extension("envoy.upstream.local_address_selector.filter_state_override", &netnsSelector{}),
	}
}

// keepalive finds dead peers of connections that are silent for long, for nothing else ends those.
func keepalive() *core.TcpKeepalive {
	return &core.TcpKeepalive{KeepaliveTime: number(300), KeepaliveInterval: number(30), KeepaliveProbes: number(4)}
}
