// Package sidecar makes what weft is measured against: an Envoy in each pod, as Istio runs it. Traffic is redirected in and
// out by nftables with the rules of istio-init; the caller's Envoy parses HTTP and picks the cluster by port and Host; mTLS
// with the workload's own certificate; the callee's Envoy parses HTTP again. What weft and sidecars both need is set alike:
// the connection manager's limits, buffers, retries, keep-alive, TLS 1.3 with P-256, statistics. Left out on purpose, for it
// would make sidecars dearer: access logs, Istio's own statistics and metadata exchange, xDS. The goldens beside this file
// are what runs.
package sidecar

import (
	"encoding/json"
	"fmt"
	"slices"
)

// Ports and users as Istio has them.
const (
	PortOut = 15001
	PortIn  = 15006
	User    = 1337
)

// Service is what a caller knows of a service.
type Service struct {
	Name, Address string
	Ports         []Port
	// Endpoint is its pod's address, Identity what the pod's certificate must say.
	Endpoint, Identity string
}

// Port of a service, and the same port of the pod behind it.
type Port struct {
	Number, Target uint16
	Protocol       Protocol
	// Judged: the callee's policy looks at each request.
	Judged bool
}

// Protocol of a port.
type Protocol string

// Protocols.
const (
	HTTP1 Protocol = "http1"
	HTTP2 Protocol = "http2"
	TCP   Protocol = "tcp"
)

// Config of one sidecar.
type Config struct {
	Name, Admin string
	// Chain, Key and Roots are files in PEM.
	Chain, Key, Roots string
	// Services that the pod calls.
	Services []Service
	// Ports that the pod serves, and the identity that judged ones let in.
	Ports   []Port
	Allowed string
	// Stats is Envoy's StatsConfig as JSON: that of weft's nodes.
	Stats json.RawMessage
}

type object = map[string]any
type list = []any

const (
	kind   = "type.googleapis.com/envoy.extensions."
	buffer = 262144
	most   = 1 << 30
)

func extension(name, of string, fields object) object {
	typed := object{"@type": kind + of}
	for k, v := range fields {
		typed[k] = v
	}
	return object{"name": name, "typed_config": typed}
}

// Bootstrap is the sidecar's whole configuration.
func Bootstrap(c Config) ([]byte, error) {
	var clusters list
	for _, s := range c.Services {
		for _, p := range s.Ports {
			clusters = append(clusters, c.outbound(s, p))
		}
	}
	for _, protocol := range c.protocols() {
		clusters = append(clusters, local(protocol))
	}
	listeners := list{}
	if len(c.Services) > 0 {
		listeners = append(listeners, c.out())
	}
	if len(c.Ports) > 0 {
		listeners = append(listeners, c.in())
	}
	out, err := json.MarshalIndent(object{
		"node": object{"id": c.Name, "cluster": "sidecar"}, "admin": object{"address": object{"pipe": object{"path": c.Admin}}},
		"stats_config": c.Stats, "deferred_stat_options": object{"enable_deferred_creation_stats": true},
		"memory_allocator_manager": object{"bytes_to_release": 4 << 20},
		"static_resources":         object{"listeners": listeners, "clusters": clusters},
	}, "", " ")
	if err != nil {
		return nil, fmt.Errorf("write bootstrap of %s: %w", c.Name, err)
	}
	return append(out, '\n'), nil
}

// protocols that the pod's own ports speak.
func (c Config) protocols() []Protocol {
	var out []Protocol
	for _, p := range c.Ports {
		out = append(out, p.Protocol)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// alpn is Istio's name for what is inside.
var alpn = map[Protocol]string{HTTP1: "istio-http/1.1", HTTP2: "istio-h2", TCP: "istio"}

// tls shows the pod's certificate, and takes a peer's of one identity; "": of any.
func (c Config) tls(p Protocol, peer string) object {
	validation := object{"trusted_ca": object{"filename": c.Roots}}
	if peer != "" {
		validation["match_typed_subject_alt_names"] = list{object{"san_type": "URI", "matcher": object{"exact": peer}}}
	}
	return object{
		"alpn_protocols": list{alpn[p]}, "validation_context": validation,
		"tls_params":       object{"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
		"tls_certificates": list{object{"certificate_chain": object{"filename": c.Chain}, "private_key": object{"filename": c.Key}}},
	}
}

func clusterName(s Service, p Port) string { return fmt.Sprintf("outbound|%d||%s", p.Number, s.Name) }

func shared(name string, more object) object {
	out := object{
		"name": name, "per_connection_buffer_limit_bytes": buffer,
		"circuit_breakers":            object{"thresholds": list{object{"max_connections": most, "max_pending_requests": most, "max_requests": most, "max_retries": most}}},
		"upstream_connection_options": object{"tcp_keepalive": object{"keepalive_time": 300, "keepalive_interval": 30, "keepalive_probes": 4}},
	}
	for k, v := range more {
		out[k] = v
	}
	return out
}

// options are a cluster's HTTP version; none for bytes.
func options(p Protocol, more object) object {
	explicit := object{"http_protocol_options": http1()}
	switch p {
	case TCP:
		return nil
	case HTTP2:
		explicit = object{"http2_protocol_options": object{"initial_stream_window_size": buffer, "initial_connection_window_size": 4 * buffer}}
	}
	out := object{"@type": kind + "upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": explicit}
	for k, v := range more {
		out[k] = v
	}
	return object{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": out}
}

func http1() object {
	return object{"enable_trailers": true, "header_key_format": object{"stateful_formatter": extension(
		"envoy.http.stateful_header_formatters.preserve_case", "http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig", object{"forward_reason_phrase": true})}}
}

// outbound is one service port, over mTLS. TLS sessions may be resumed, as Envoy has it by default.
func (c Config) outbound(s Service, p Port) object {
	name := clusterName(s, p)
	return shared(name, object{
		"type": "STATIC", "lb_policy": "LEAST_REQUEST", "connect_timeout": "5s",
		"load_assignment": object{"cluster_name": name, "endpoints": list{object{"lb_endpoints": list{object{
			"endpoint": object{"address": object{"socket_address": object{"address": s.Endpoint, "port_value": p.Target}}}}}}}},
		"transport_socket": extension("envoy.transport_sockets.tls", "transport_sockets.tls.v3.UpstreamTlsContext", object{
			"sni": name, "common_tls_context": c.tls(p.Protocol, s.Identity)}),
		"typed_extension_protocol_options": options(p.Protocol, object{"common_http_protocol_options": object{"max_connection_duration": "300s"}}),
	})
}

// local is the last hop, to whatever address and port was asked for, from the address that the rules let pass.
func local(p Protocol) object {
	return shared("inbound|"+string(p), object{
		"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "10s", "cleanup_interval": "60s",
		"upstream_bind_config":             object{"source_address": object{"address": "127.0.0.6", "port_value": 0}},
		"typed_extension_protocol_options": options(p, nil),
	})
}

func listener(name string, port int, direction string, more object) object {
	out := object{
		"name": name, "address": object{"socket_address": object{"address": "0.0.0.0", "port_value": port}}, "traffic_direction": direction,
		"per_connection_buffer_limit_bytes": buffer, "tcp_keepalive": object{"keepalive_time": 300, "keepalive_interval": 30, "keepalive_probes": 4},
	}
	for k, v := range more {
		out[k] = v
	}
	return out
}

var originalDestination = extension("envoy.filters.listener.original_dst", "filters.listener.original_dst.v3.OriginalDst", nil)

// out has a chain for each port that a service has: HTTP routes by Host, bytes by the service's address.
func (c Config) out() object {
	numbers := map[uint16]Protocol{}
	for _, s := range c.Services {
		for _, p := range s.Ports {
			numbers[p.Number] = p.Protocol
		}
	}
	var chains list
	for _, number := range sorted(numbers) {
		if numbers[number] != TCP {
			chains = append(chains, object{"filter_chain_match": object{"destination_port": number},
				"filters": list{manager(fmt.Sprintf("outbound_%d", number), codec(numbers[number]), nil, c.routes(number))}})
			continue
		}
		for _, s := range c.Services {
			for _, p := range s.Ports {
				if p.Number == number {
					chains = append(chains, object{"filters": list{tcpProxy(clusterName(s, p))}, "filter_chain_match": object{
						"destination_port": number, "prefix_ranges": list{object{"address_prefix": s.Address, "prefix_len": 32}}}})
				}
			}
		}
	}
	return listener("virtualOutbound", PortOut, "OUTBOUND", object{"listener_filters": list{originalDestination}, "filter_chains": chains})
}

// in has a chain for each port of the pod.
func (c Config) in() object {
	var chains list
	for _, p := range c.Ports {
		filters := list{tcpProxy("inbound|tcp")}
		if p.Protocol != TCP {
			var judge list
			if p.Judged {
				judge = list{extension("envoy.filters.http.rbac", "filters.http.rbac.v3.RBAC", object{"rules": object{"action": "ALLOW", "policies": object{
					"shop/only[0]": object{"permissions": list{object{"any": true}}, "principals": list{object{"authenticated": object{"principal_name": object{"exact": c.Allowed}}}}}}}})}
			}
			filters = list{manager(fmt.Sprintf("inbound_%d", p.Target), codec(p.Protocol), judge, object{"name": "app", "virtual_hosts": list{
				object{"name": "app", "domains": list{"*"}, "routes": list{route("inbound|"+string(p.Protocol), false)}}}})}
		}
		chains = append(chains, object{
			"filter_chain_match": object{"destination_port": p.Target, "transport_protocol": "tls"}, "filters": filters,
			"transport_socket": extension("envoy.transport_sockets.tls", "transport_sockets.tls.v3.DownstreamTlsContext", object{
				"require_client_certificate": true, "common_tls_context": c.tls(p.Protocol, "")}),
		})
	}
	return listener("virtualInbound", PortIn, "INBOUND", object{"filter_chains": chains, "listener_filters": list{originalDestination,
		extension("envoy.filters.listener.tls_inspector", "filters.listener.tls_inspector.v3.TlsInspector", nil)}})
}

func codec(p Protocol) string { return map[Protocol]string{HTTP1: "HTTP1", HTTP2: "HTTP2"}[p] }

func sorted(numbers map[uint16]Protocol) []uint16 {
	var out []uint16
	for n := range numbers {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// routes of all services on a port, by Host.
func (c Config) routes(number uint16) object {
	var hosts list
	for _, s := range c.Services {
		for _, p := range s.Ports {
			if p.Number == number {
				hosts = append(hosts, object{"name": s.Name, "domains": list{s.Address}, "routes": list{route(clusterName(s, p), true)}})
			}
		}
	}
	return object{"name": fmt.Sprint(number), "ignore_port_in_host_matching": true, "virtual_hosts": hosts}
}

func route(cluster string, retried bool) object {
	action := object{"cluster": cluster, "timeout": "0s", "idle_timeout": "0s"}
	if retried {
		action["retry_policy"] = object{"retry_on": "connect-failure,refused-stream,reset-before-request", "num_retries": 1}
	}
	return object{"match": object{"prefix": "/"}, "route": action}
}

func tcpProxy(cluster string) object {
	return extension("envoy.filters.network.tcp_proxy", "filters.network.tcp_proxy.v3.TcpProxy", object{
		"stat_prefix": cluster, "cluster": cluster, "idle_timeout": "0s", "max_connect_attempts": 2})
}

// manager has weft's limits and settings; what only weft does is left out: its own headers, routes on demand.
func manager(stat, codec string, judge list, routes object) object {
	client := http1()
	client["accept_http_10"], client["default_host_for_http_10"] = true, "http10.invalid"
	filters := append(judge, extension("envoy.filters.http.router", "filters.http.router.v3.Router", object{"suppress_envoy_headers": true}))
	return extension("envoy.filters.network.http_connection_manager", "filters.network.http_connection_manager.v3.HttpConnectionManager", object{
		"stat_prefix": stat, "codec_type": codec, "http_filters": filters, "route_config": routes,
		"common_http_protocol_options": object{"idle_timeout": "0s", "headers_with_underscores_action": "REJECT_REQUEST", "max_headers_count": 200},
		"http_protocol_options":        client,
		"http2_protocol_options":       object{"initial_stream_window_size": buffer, "initial_connection_window_size": 4 * buffer, "max_concurrent_streams": 1000},
		"server_header_transformation": "PASS_THROUGH", "max_request_headers_kb": 96, "stream_idle_timeout": "15s", "drain_timeout": "1s",
		"use_remote_address": false, "skip_xff_append": true, "generate_request_id": false, "preserve_external_request_id": true,
		"proxy_100_continue": true, "upgrade_configs": list{object{"upgrade_type": "websocket"}}, "normalize_path": true, "internal_address_config": object{},
	})
}

// Rules redirect a pod's traffic, those of istio-init in the words of nft.
func Rules() string {
	return fmt.Sprintf(`table ip sidecar {
	chain prerouting {
		type nat hook prerouting priority dstnat;
		meta l4proto tcp redirect to :%[1]d
	}
	chain output {
		type nat hook output priority -100;
		meta l4proto != tcp return
		oifname "lo" ip saddr 127.0.0.6 return
		oifname "lo" ip daddr != 127.0.0.1 meta skuid %[3]d meta l4proto tcp redirect to :%[1]d
		oifname "lo" meta skuid != %[3]d return
		meta skuid %[3]d return
		ip daddr 127.0.0.1 return
		meta l4proto tcp redirect to :%[2]d
	}
}
`, PortIn, PortOut, User)
}
