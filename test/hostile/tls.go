package hostile

import (
	"strings"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/test/hostile/attack"
)

const trusted = "spiffe://cluster.local/ns/hostile/sa/"

// hello is an attempt to speak TLS, which asks for the mark's name.
func hello(to string, t attack.TLS) *attack.Attempt {
	t.Name = "{mark}.test"
	return &attack.Attempt{Kind: "dial", To: to, TLS: &t, Send: []byte(get("/ok"))}
}

// record is the head of a TLS record, and of a ClientHello of a length in it.
func record(length, hello int) string {
	return string([]byte{22, 3, 1, byte(length >> 8), byte(length), 1, byte(hello >> 16), byte(hello >> 8), byte(hello)}) + "\x03\x03"
}

func handshakes() []Attempt {
	closed := func(id, what string, make *attack.Attempt) Attempt {
		return Attempt{ID: "tls-" + id, What: what, By: outsiders, Where: Both, Verdict: Closed, Shown: Here, Make: make}
	}
	slow := func(a *attack.Attempt, millis int) *attack.Attempt { a.Millis = millis; return a }
	const web, lines, first = "{pod4}:8080", "{pod4}:9000", "{pod4}:9001"
	var many []string // an offer of 15 KB
	for range 75 {
		many = append(many, strings.Repeat("x", 200))
	}
	all := []Attempt{
		closed("plain", "an app's own TLS without ALPN", hello(web, attack.TLS{})),
		closed("plain6", "an app's own TLS, IPv6", hello("[{pod6}]:8080", attack.TLS{})),
		closed("vip", "an app's own TLS to the Service", hello("{vip4}:80", attack.TLS{})),
		closed("h1", "ALPN http/1.1", hello(web, attack.TLS{ALPN: []string{"http/1.1"}})),
		closed("h2", "ALPN h2", hello(web, attack.TLS{ALPN: []string{"h2", "http/1.1"}})),
		closed("foreign", "an ALPN that nobody knows", hello(web, attack.TLS{ALPN: []string{"acme-tls/1"}})),
		closed("upper", "ALPN WEFT-L4", hello(web, attack.TLS{ALPN: []string{"WEFT-L4"}})),
		closed("zero", `ALPN "weft-l4\0"`, hello(web, attack.TLS{ALPN: []string{"weft-l4\x00"}})),
		closed("alone-l4", "weft-l4 alone", hello(web, attack.TLS{ALPN: []string{names.ALPNL4}})),
		closed("alone-h1", "weft-h1 alone", hello(web, attack.TLS{ALPN: []string{names.ALPNH1}})),
		closed("alone-h2", "weft-h2 alone", hello(web, attack.TLS{ALPN: []string{names.ALPNH2}})),
		closed("reversed", "a mesh offer in the wrong order", hello(web, attack.TLS{ALPN: []string{names.ALPNH1, names.ALPNL4}})),
		closed("mixed", "a mesh offer among others", hello(web, attack.TLS{ALPN: []string{"h2", names.ALPNL4, names.ALPNH1, "http/1.1"}})),
		closed("bare-h1", "the mesh's offer for HTTP/1.1, without certificate", hello(web, attack.TLS{ALPN: names.ALPNOfferH1})),
		closed("bare-h2", "the mesh's offer for HTTP/2, without certificate", hello(web, attack.TLS{ALPN: names.ALPNOfferH2})),
		closed("bare-tcp", "the mesh's offer for TCP, without certificate", hello(lines, attack.TLS{ALPN: names.ALPNOfferTCP})),
		closed("bare-first", "the mesh's offer for TCP, without certificate, to a server that speaks first", hello(first, attack.TLS{ALPN: names.ALPNOfferTCP})),
		closed("bare-unnamed", "the mesh's offer for TCP, without certificate, to a port that no Service names", hello("{pod4}:9002", attack.TLS{ALPN: names.ALPNOfferTCP})),
		closed("bare-12", "the mesh's offer by TLS 1.2", hello(web, attack.TLS{ALPN: names.ALPNOfferH1, Version12: true})),
		closed("own-allowed", "the mesh's offer, a self-signed certificate with the allowed SPIFFE ID", hello(web, attack.TLS{ALPN: names.ALPNOfferH1, ID: trusted + "allowed"})),
		closed("own-allowed-tcp", "the same on a TCP port", hello(lines, attack.TLS{ALPN: names.ALPNOfferTCP, ID: trusted + "allowed"})),
		closed("own-allowed-first", "the same to a server that speaks first", hello(first, attack.TLS{ALPN: names.ALPNOfferTCP, ID: trusted + "allowed"})),
		closed("own-12", "the same by TLS 1.2", hello(web, attack.TLS{ALPN: names.ALPNOfferH1, ID: trusted + "allowed", Version12: true})),
		closed("own-server", "a self-signed certificate with the server's own SPIFFE ID", hello(web, attack.TLS{ALPN: names.ALPNOfferH1, ID: trusted + "target"})),
		closed("own-controller", "a self-signed certificate with the controller's SPIFFE ID", hello(web, attack.TLS{ALPN: names.ALPNOfferH1, ID: "spiffe://cluster.local/ns/weft-system/sa/weft-controlplane"})),
		closed("issuer", "the allowed SPIFFE ID from a CA with the name of the mesh's", hello(web, attack.TLS{ALPN: names.ALPNOfferH1, ID: trusted + "allowed", Issuer: "weft"})),
		closed("large", "a ClientHello of 15 KB", hello(web, attack.TLS{ALPN: many})),
		closed("large-mesh", "a ClientHello of 15 KB that ends with the mesh's offer", hello(web, attack.TLS{ALPN: append(append([]string{}, many...), names.ALPNOfferH1...)})),
		closed("huge", "a ClientHello that says it has 16 MB", slow(dial(web, record(16384, 0xffffff)+"{mark}"+strings.Repeat("x", 16000)), 12000)),
		closed("endless", "a ClientHello of which the end never comes", slow(dial(web, record(512, 508)+"{mark}"), 12000)),
		closed("empty", "TLS records without content", dial(web, strings.Repeat("\x16\x03\x01\x00\x00", 100)+"{mark}")),
		closed("sslv2", "SSLv2's ClientHello", slow(dial(web, "\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10{mark}"), 12000)),
		closed("alert", "an alert instead of a ClientHello", dial(web, "\x15\x03\x03\x00\x02\x02\x28{mark}")),
		closed("data", "application data instead of a ClientHello", dial(web, "\x17\x03\x03\x00\x20{mark}")),
		closed("three", "three bytes of a ClientHello, then silence", slow(dial(web, "\x16\x03\x01"), 12000)),
		closed("silent", "silence", slow(dial(web, ""), 12000)),
		closed("silent-first", "silence to a server that speaks first, IPv6", slow(dial("[{pod6}]:9001", ""), 12000)),
	}
	for i := range all {
		if all[i].Make.Millis > 0 { // a pod of the mesh is silent inside its Envoy's TLS
			all[i].By = []Attacker{Stranger}
		}
	}
	return append(all, Attempt{ID: "tls-stalled", What: "a whole ClientHello of the mesh, then silence", By: []Attacker{Stranger}, Where: Both, Verdict: Closed,
		Shown: "contract.TestInboundChains"})
}
