package xds

import (
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	raw "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	mapper "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/cert_mappers/filter_state_override/v3"
	selector "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/cert_selectors/on_demand_secret/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	envoytype "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"time"

	"github.com/weftmesh/weft/api/names"
)

// nobody is a URI SAN that weft's CA issues to nobody.
const nobody = "weft:nobody"

// noSVID is the secret asked for when a connection has no identity; the agent has none by this name.
const noSVID = "none"

// peerTLS is the caller's side of mesh mTLS: the source pod's SVID, chosen per connection, and exactly one SPIFFE ID as
// the peer's. No session is kept, for it would carry one pod's identity to another's connection.
func peerTLS(peer string, offer []string) *core.TransportSocket {
	context := &tls.UpstreamTlsContext{
		MaxSessionKeys: wrapperspb.UInt32(0),
		CommonTlsContext: &tls.CommonTlsContext{
			TlsParams:     &tls.TlsParameters{TlsMinimumProtocolVersion: tls.TlsParameters_TLSv1_3, TlsMaximumProtocolVersion: tls.TlsParameters_TLSv1_3},
			AlpnProtocols: offer,
			ValidationContextType: &tls.CommonTlsContext_CombinedValidationContext{
				CombinedValidationContext: &tls.CommonTlsContext_CombinedCertificateValidationContext{
					DefaultValidationContext: &tls.CertificateValidationContext{
						MatchTypedSubjectAltNames: []*tls.SubjectAltNameMatcher{{
							SanType: tls.SubjectAltNameMatcher_URI,
							Matcher: &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: peer}},
						}},
					},
					ValidationContextSdsSecretConfig: &tls.SdsSecretConfig{Name: names.SecretBundle, SdsConfig: ads()},
				},
			},
		},
	}
	if peer != nobody {
		context.CommonTlsContext.CustomTlsCertificateSelector = extension("envoy.tls.certificate_selectors.on_demand_secret", &selector.Config{
			ConfigSource: ownStream(),
			CertificateMapper: extension("envoy.tls.upstream_certificate_mappers.filter_state_override",
				&mapper.Config{DefaultValue: noSVID}),
		})
	}
	return &core.TransportSocket{Name: "envoy.transport_sockets.tls",
		ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: pack(context)}}
}

func plainSocket() *core.TransportSocket {
	return &core.TransportSocket{Name: "envoy.transport_sockets.raw_buffer",
		ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: pack(&raw.RawBuffer{})}}
}

// ownStream is for the certificate selector alone: on the ADS stream it would starve where a listener names the same
// secret.
func ownStream() *core.ConfigSource {
	return &core.ConfigSource{
		ResourceApiVersion:  core.ApiVersion_V3,
		InitialFetchTimeout: durationpb.New(5 * time.Second),
		ConfigSourceSpecifier: &core.ConfigSource_ApiConfigSource{ApiConfigSource: &core.ApiConfigSource{
			ApiType:             core.ApiConfigSource_DELTA_GRPC,
			TransportApiVersion: core.ApiVersion_V3,
			GrpcServices: []*core.GrpcService{{TargetSpecifier: &core.GrpcService_EnvoyGrpc_{
				EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: names.ClusterAgent}}}},
		}},
	}
}

func percent(v float64) *envoytype.Percent { return &envoytype.Percent{Value: v} }
