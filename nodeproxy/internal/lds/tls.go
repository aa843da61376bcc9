package lds

import (
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
)

// meshTLS is the callee's side of mesh mTLS: the pod's own SVID, a peer certificate in any case, judged by the
// validation secret. No session is ever resumed, for a resumed one would skip that judgement.
func meshTLS(svid, validation, alpn string) *core.TransportSocket {
	return &core.TransportSocket{Name: "envoy.transport_sockets.tls", ConfigType: &core.TransportSocket_TypedConfig{
		TypedConfig: pack(&tls.DownstreamTlsContext{
			RequireClientCertificate:         truth(true),
			DisableStatefulSessionResumption: true,
			SessionTicketKeysType:            &tls.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
			CommonTlsContext: &tls.CommonTlsContext{
				TlsParams:                      &tls.TlsParameters{TlsMinimumProtocolVersion: tls.TlsParameters_TLSv1_3, TlsMaximumProtocolVersion: tls.TlsParameters_TLSv1_3},
				AlpnProtocols:                  []string{alpn},
				TlsCertificateSdsSecretConfigs: []*tls.SdsSecretConfig{{Name: svid, SdsConfig: ads()}},
				ValidationContextType: &tls.CommonTlsContext_ValidationContextSdsSecretConfig{
					ValidationContextSdsSecretConfig: &tls.SdsSecretConfig{Name: validation, SdsConfig: ads()}},
			},
		}),
	}}
}
