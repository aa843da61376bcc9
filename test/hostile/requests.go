package hostile

import (
	"fmt"
	"strings"
)

// Ways are the addresses of the attacked HTTP port; on the first the attacker's own Envoy parses requests too.
var Ways = []string{"{vip4}:80", "{second4}:80", "{pod4}:8080"}

// request is an attempt of an allowed pod's on every way.
func request(id, what string, verdict Verdict, send string) Attempt {
	return Attempt{ID: id, What: what, By: []Attacker{Allowed}, Where: Both, Verdict: verdict, Shown: Here, Over: Ways, Make: dial(Ways[0], send), Hidden: "/forbidden"}
}

func paths() []Attempt {
	var all []Attempt
	for _, p := range []struct {
		id, path string
		verdict  Verdict
	}{
		{"plain", "/forbidden/x", Denied}, {"slashes", "//forbidden/x", Denied}, {"three-slashes", "///forbidden///x", Denied}, {"dot", "/./forbidden/x", Denied}, {"dots", "/ok/../forbidden/x", Denied},
		{"escaped-dot", "/%2e/forbidden/x", Denied}, {"escaped-dots", "/ok/%2e%2e/forbidden/x", Denied}, {"half-escaped", "/ok/.%2E/forbidden/x", Denied},
		{"letter", "/%66orbidden/x", Denied}, {"upper-escape", "/%46orbidden/x", Harmless}, {"parameter", "/forbidden;a=b/x", Denied}, {"dots-parameter", "/ok/..;/forbidden/x", Denied},
		{"dots-parameter-value", "/ok/..;v=1/forbidden/x", Denied}, {"escaped-dots-parameter", "/ok/%2e%2e;/forbidden/x", Denied}, {"dot-parameter", "/.;x/forbidden/x", Denied},
		{"absolute", "http://target/forbidden/x", Denied}, {"absolute-dots", "http://target/ok/../forbidden/x", Denied},
		{"escaped-slash", "/ok%2f..%2fforbidden/x", Invalid}, {"escaped-backslash", "/ok%5c..%5cforbidden/x", Invalid}, {"backslash", `/ok\..\forbidden/x`, Denied}, {"leading-backslash", `\forbidden/x`, Invalid},
		{"zero", "/forbidden%00/x", Invalid}, {"fragment", "/ok#/../forbidden/x", Invalid}, {"no-slash", "forbidden/x", Invalid},
		{"twice", "/%2566orbidden/x", Harmless}, {"case", "/FORBIDDEN/x", Harmless},
	} {
		all = append(all, request("path-"+p.id, "`"+strings.ReplaceAll(p.path, "|", `\|`)+"`", p.verdict, get(p.path)))
	}
	all[len(all)-1].What += ", which is another path"
	method := func(id, what string, verdict Verdict, line string, heads ...string) Attempt {
		a := request("method-"+id, what, verdict, line+" HTTP/1.1\r\nHost: target\r\n"+strings.Join(append(heads, "Content-Length: 0", "Connection: close"), "\r\n")+"\r\n\r\n")
		a.Hidden = "DELETE /ok"
		return a
	}
	return append(all,
		request("path-10", "the denied path by HTTP/1.0", Denied, "GET /forbidden/x?{mark} HTTP/1.0\r\nHost: target\r\n\r\n"),
		request("path-bare-lf", "the denied path in lines that end by LF alone", Denied, "GET /forbidden/x?{mark} HTTP/1.1\nHost: target\nConnection: close\n\n"),
		request("path-pipelined", "the denied path behind an allowed request", Split, "GET /ok?{mark} HTTP/1.1\r\nHost: target\r\n\r\n"+get("/forbidden/x")),
		request("path-query", "the denied path in the query", Harmless, get("/ok?/../forbidde")),
		method("delete", "DELETE", Denied, "DELETE /ok?{mark}"),
		method("lower", "`delete`", Invalid, "delete /ok?{mark}"),
		method("override", "X-HTTP-Method-Override: DELETE", Harmless, "POST /ok?{mark}", "X-HTTP-Method-Override: DELETE"),
		method("space", "a space before DELETE", Invalid, " DELETE /ok?{mark}"),
	)
}

func headers() []Attempt {
	header := func(id, what string, verdict Verdict, lines ...string) Attempt {
		a := request("header-"+id, what, verdict, get("/ok", lines...))
		a.Hidden = ""
		return a
	}
	var all []Attempt
	for _, h := range []struct{ name, value string }{
		{"x-envoy-original-dst-host", "{bare4}:8080"}, {"x-envoy-retry-on", "5xx"}, {"x-envoy-max-retries", "1000"}, {"x-envoy-internal", "true"},
		{"x-envoy-external-address", "10.0.0.1"}, {"x-envoy-upstream-rq-timeout-ms", "1"}, {"x-envoy-expected-rq-timeout-ms", "1"}, {"x-envoy-decorator-operation", "forged"},
		{"x-envoy-force-trace", "true"}, {"x-envoy-original-path", "/forbidden"}, {"x-envoy-hedge-on-per-try-timeout", "true"}, {"x-envoy-upstream-alt-stat-name", "forged"},
		{"x-envoy-downstream-service-cluster", "forged"}, {"x-envoy-peer-metadata", "forged"}, {"x-forwarded-client-cert", "By=x;URI=" + trusted + "allowed"},
		{"x-weft-dst", "{bare4}:8080"}, {"x-weft-src-ns", "kube-system"}, {"x-weft-anything", "forged"},
	} {
		a := header(h.name, "`"+h.name+"`", Stripped, h.name+": "+h.value)
		a.Hidden = h.name
		all = append(all, a)
	}
	hidden := func(a Attempt, text string) Attempt { a.Hidden = text; return a }
	return append(all,
		hidden(header("case", "the same in another case", Stripped, "X-ENVOY-Internal: true", "X-Weft-SRC-NS: kube-system"), "x-weft-src-ns"),
		hidden(header("repeated", "the same twice", Stripped, "x-weft-src-ns: a", "x-weft-src-ns: kube-system"), "x-weft-src-ns"),
		hidden(header("nominated", "the same, nominated by Connection", Stripped, "x-weft-dst: {bare4}:8080", "x-forwarded-client-cert: By=x", "Connection: x-weft-dst, x-forwarded-client-cert"), "x-weft-dst"),
		hidden(header("upgrade", "the same, with Upgrade", Stripped, "x-weft-src-ns: kube-system", "Upgrade: websocket", "Sec-WebSocket-Key: x"), "x-weft-src-ns"),
		header("underscore", "the same with underscores", Invalid, "x_weft_dst: {bare4}:8080"),
		header("forwarded-for", "`x-forwarded-for` that names the server", Harmless, "x-forwarded-for: {pod4}"),
		header("forwarded-host", "`x-forwarded-host` and `forwarded`", Harmless, "x-forwarded-host: other", "forwarded: for={pod4};host=other"),
		header("host", "`x-original-host` of another Service", Harmless, "x-original-host: bare"),
		header("original-url", "`x-original-url` and `x-rewrite-url`, the denied path", Harmless, "x-original-url: /forbidden", "x-rewrite-url: /forbidden"),
		header("denied", "the denied header", Denied, "x-debug: on"),
		header("denied-case", "the denied header in another case", Denied, "X-DEBUG: on"),
		header("denied-twice", "the denied value behind another", Denied, "x-debug: off", "x-debug: on"),
		header("denied-first", "the denied value before another", Denied, "x-debug: on", "x-debug: off"),
		header("denied-spaces", "the denied value between spaces and tabs", Denied, "x-debug: \t on \t"),
		header("denied-underscore", "the denied header with an underscore", Invalid, "x_debug: on"),
		header("denied-colon", "the denied header with a space before the colon", Invalid, "x-debug : on"),
		header("denied-folded", "the denied value on a line of continuation", Denied, "x-debug:", " on"),
		header("denied-zero", "the denied header with a zero byte in its name", Invalid, "x-de\x00bug: on"),
		hidden(header("denied-nominated", "the denied header, nominated by Connection", Stripped, "x-debug: on", "Connection: x-debug"), "x-debug"),
		Attempt{ID: "header-l4", What: "any header to a port without rules about requests", By: []Attacker{Allowed}, Where: Both, Verdict: Open, Shown: "contract.TestInboundChains"},
		Attempt{ID: "header-client", What: "X-Forwarded-For, to be shown to the app as another client", By: outsiders, Where: Both, Verdict: Ignored, Shown: "datapath.TestClientAddress"},
		Attempt{ID: "header-route", What: "forged headers of weft's to a route's decisions", By: []Attacker{Barred}, Where: Both, Verdict: Stripped, Shown: "e2e.TestHTTPRoute"},
	)
}

func smuggling() []Attempt {
	hide := func(id, what string, verdict Verdict, head, body string) Attempt {
		return request("smuggle-"+id, what, verdict, "POST /ok?{mark} HTTP/1.1\r\nHost: target\r\n"+head+"\r\n\r\n"+body)
	}
	second := "GET /forbidden/x?{mark} HTTP/1.1\r\nHost: target\r\n\r\n"
	length := fmt.Sprint(len("0\r\n\r\n") + len(get("/forbidden/x")))
	tunnel := func(a Attempt, status string) Attempt { a.Status = status; return a }
	return []Attempt{
		hide("two-lengths", "two Content-Lengths", Invalid, "Content-Length: 0\r\nContent-Length: 60", second),
		hide("list-length", "a list of Content-Lengths", Invalid, "Content-Length: 0, 60", second),
		hide("signed-length", "Content-Length: +0", Invalid, "Content-Length: +0", second),
		hide("negative-length", "a negative Content-Length", Invalid, "Content-Length: -1", second),
		hide("huge-length", "a Content-Length beyond 64 bits", Invalid, "Content-Length: 18446744073709551617", second),
		hide("length-chunked", "Content-Length with chunked", Invalid, "Content-Length: "+length+"\r\nTransfer-Encoding: chunked", "0\r\n\r\n"+second),
		hide("chunked-length", "chunked with Content-Length", Invalid, "Transfer-Encoding: chunked\r\nContent-Length: 4", "5c\r\n"+second+"\r\n0\r\n\r\n"),
		tunnel(hide("two-codings", "two transfer codings", Closed, "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "0\r\n\r\n"+second), "400|501"),
		tunnel(hide("unknown-coding", "an unknown transfer coding", Closed, "Transfer-Encoding: xchunked", "0\r\n\r\n"+second), "400|501"),
		tunnel(hide("tab-coding", "a transfer coding behind a control character", Closed, "Transfer-Encoding: \x0bchunked", "0\r\n\r\n"+second), "400|501"),
		hide("coding-colon", "a space before the colon of Transfer-Encoding", Invalid, "Transfer-Encoding : chunked", "0\r\n\r\n"+second),
		hide("chunk-size", "a chunk's size beyond 64 bits", Split, "Transfer-Encoding: chunked", "10000000000000000f\r\nx\r\n0\r\n\r\n"+second),
		hide("chunk-sign", "a signed chunk's size", Split, "Transfer-Encoding: chunked", "+0\r\n\r\n"+second),
		hide("pipelined", "a request behind a body", Split, "Content-Length: 4", "body"+second),
		hide("body", "a request as the body", Split, "Content-Length: "+fmt.Sprint(len(strings.ReplaceAll(second, "{mark}", Mark))), second),
		hide("extension", "a request in a chunk's extension", Split, "Transfer-Encoding: chunked", "4;x=GET /hidden\r\nbody\r\n0\r\n\r\n"+second),
		hide("trailer", "the denied header as a trailer", Harmless, "Trailer: x-debug\r\nTransfer-Encoding: chunked\r\nConnection: close", "0\r\nx-debug: on\r\n\r\n"),
		hide("expect", "Expect: 100-continue, and a request instead of the body", Split, "Expect: 100-continue\r\nContent-Length: 4", "body"+second),
		tunnel(request("smuggle-connect", "CONNECT", Closed, "CONNECT {bare4}:8080 HTTP/1.1\r\nHost: {bare4}:8080\r\n\r\n"+second), "403|404|400"),
		request("smuggle-h2c", "Upgrade to h2c with a request behind", Split, "GET /ok?{mark} HTTP/1.1\r\nHost: target\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"+second),
		request("smuggle-websocket", "Upgrade to websocket with a request behind", Split, "GET /ok?{mark} HTTP/1.1\r\nHost: target\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"+second),
		tunnel(request("smuggle-preface", "HTTP/2's preface on HTTP/1", Closed, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+second), ".*"),
		tunnel(request("smuggle-zero-nine", "the denied path without a version", Closed, "GET /forbidden/x?{mark}\r\n\r\n"), "400|403|426"),
		request("smuggle-host", "two Hosts, which decide nothing", Harmless, "GET /ok?{mark} HTTP/1.1\r\nHost: target\r\nHost: other\r\nConnection: close\r\n\r\n"),
	}
}

// Mark is as long as every mark that {mark} stands for.
const Mark = "m00000000x0000"
