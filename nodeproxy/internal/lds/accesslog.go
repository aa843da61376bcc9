package lds

import (
	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	stream "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	"google.golang.org/protobuf/types/known/structpb"
)

// requestLog is one JSON line per request. peer and local are the SPIFFE IDs of the certificates that Envoy saw on the
// mesh side of the request: at the callee the client's and its own, at the caller the server's and its own.
func requestLog(outbound bool) []*accesslog.AccessLog {
	fields := map[string]string{
		"kind": "request", "direction": "in",
		"time": "%START_TIME%", "method": "%REQ(:METHOD)%", "path": "%REQ(:PATH)%", "authority": "%REQ(:AUTHORITY)%",
		"protocol": "%PROTOCOL%", "status": "%RESPONSE_CODE%", "details": "%RESPONSE_CODE_DETAILS%",
		"flags": "%RESPONSE_FLAGS%", "grpc_status": "%GRPC_STATUS(SNAKE_STRING)%", "upstream": "%UPSTREAM_HOST%",
		"chain": "%FILTER_CHAIN_NAME%", "remote": "%DOWNSTREAM_REMOTE_ADDRESS%", "destination": "%DOWNSTREAM_LOCAL_ADDRESS%",
		"peer": "%DOWNSTREAM_PEER_URI_SAN%", "local": "%DOWNSTREAM_LOCAL_URI_SAN%",
	}
	if outbound {
		fields["direction"] = "out"
		fields["peer"], fields["local"] = "%UPSTREAM_PEER_URI_SAN%", "%UPSTREAM_LOCAL_URI_SAN%"
		fields["failure"] = "%UPSTREAM_TRANSPORT_FAILURE_REASON%"
		// The remote of the callee's line.
		fields["source"] = "%UPSTREAM_LOCAL_ADDRESS%"
	}
	return jsonLog(fields)
}

// connectionLog is one JSON line per connection when it ends, also when it was refused before any filter ran.
func connectionLog(outbound bool) []*accesslog.AccessLog {
	fields := map[string]string{
		"kind": "connection", "direction": "in",
		"time": "%START_TIME%", "chain": "%FILTER_CHAIN_NAME%", "remote": "%DOWNSTREAM_REMOTE_ADDRESS%",
		"destination": "%DOWNSTREAM_LOCAL_ADDRESS%", "received": "%BYTES_RECEIVED%", "sent": "%BYTES_SENT%",
		"flags": "%RESPONSE_FLAGS%", "details": "%CONNECTION_TERMINATION_DETAILS%",
		"peer": "%DOWNSTREAM_PEER_URI_SAN%", "local": "%DOWNSTREAM_LOCAL_URI_SAN%",
		"failure": "%DOWNSTREAM_TRANSPORT_FAILURE_REASON%",
	}
	if outbound {
		fields["direction"] = "out"
		fields["peer"], fields["local"] = "%UPSTREAM_PEER_URI_SAN%", "%UPSTREAM_LOCAL_URI_SAN%"
		fields["failure"] = "%UPSTREAM_TRANSPORT_FAILURE_REASON%"
		// The remote of the callee's line.
		fields["source"] = "%UPSTREAM_LOCAL_ADDRESS%"
	}
	return jsonLog(fields)
}

func jsonLog(fields map[string]string) []*accesslog.AccessLog {
	format := &structpb.Struct{Fields: make(map[string]*structpb.Value, len(fields))}
	for key, value := range fields {
		format.Fields[key] = structpb.NewStringValue(value)
	}
	return []*accesslog.AccessLog{{Name: "envoy.access_loggers.stdout", ConfigType: &accesslog.AccessLog_TypedConfig{
		TypedConfig: pack(&stream.StdoutAccessLog{AccessLogFormat: &stream.StdoutAccessLog_LogFormat{
			LogFormat: &core.SubstitutionFormatString{Format: &core.SubstitutionFormatString_JsonFormat{JsonFormat: format}}}}),
	}}}
}
