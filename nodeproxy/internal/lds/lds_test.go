package lds_test

import (
	"net/netip"
	"testing"
	"time"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/test/contract/golden"
	"google.golang.org/protobuf/proto"
)

const (
	permissive = meshv1.Mode_MODE_PERMISSIVE
	strict     = meshv1.Mode_MODE_STRICT
)

func peer(id string) *meshv1.Peer { return &meshv1.Peer{Match: &meshv1.Peer_SpiffeId{SpiffeId: id}} }

func namespace(ns string) *meshv1.Peer {
	return &meshv1.Peer{Match: &meshv1.Peer_SpiffePrefix{SpiffePrefix: "spiffe://cluster.local/ns/" + ns + "/"}}
}

func exact(s string) *meshv1.StringMatch {
	return &meshv1.StringMatch{Match: &meshv1.StringMatch_Exact{Exact: s}}
}
func prefix(s string) *meshv1.StringMatch {
	return &meshv1.StringMatch{Match: &meshv1.StringMatch_Prefix{Prefix: s}}
}
func regex(s string) *meshv1.StringMatch {
	return &meshv1.StringMatch{Match: &meshv1.StringMatch_Regex{Regex: s}}
}

var (
	front   = "spiffe://cluster.local/ns/shop/sa/front"
	reports = "spiffe://cluster.local/ns/shop/sa/reports"

	allowFront = &meshv1.Rule{Name: "shop/allow-front[0]", Peers: []*meshv1.Peer{peer(front)}}
	denyBatch  = &meshv1.Rule{Name: "shop/deny-batch[0]", Peers: []*meshv1.Peer{namespace("batch"), peer(reports)}}
	denyAdmin  = &meshv1.Rule{Name: "shop/deny-admin[0]", Requests: []*meshv1.Request{{Paths: []*meshv1.StringMatch{prefix("/admin"), regex("/v[0-9]+/internal")}}}}
	denyDebug  = &meshv1.Rule{Name: "shop/deny-debug[0]", Requests: []*meshv1.Request{{Headers: []*meshv1.HeaderMatch{{Name: "X-Debug", Match: &meshv1.HeaderMatch_Value{Value: exact("on")}}}}}}
	allowReads = &meshv1.Rule{Name: "shop/allow-reads[0]", Peers: []*meshv1.Peer{peer(front), namespace("team")}, Requests: []*meshv1.Request{
		{Methods: []string{"GET", "HEAD"}, Paths: []*meshv1.StringMatch{exact("/"), prefix("/items")}},
		{Methods: []string{"POST"}, Headers: []*meshv1.HeaderMatch{
			{Name: "X-Tier", Match: &meshv1.HeaderMatch_Value{Value: exact("gold")}},
			{Name: "x-reason", Match: &meshv1.HeaderMatch_Present{Present: true}}}},
	}}
)

func policy(whole *meshv1.PortPolicy, ports ...*meshv1.PortPolicy) *meshv1.InboundPolicy {
	return &meshv1.InboundPolicy{DefaultPort: whole, Ports: ports}
}

// pods are the cases by the name of their golden file.
var pods = map[string]func(*lds.Pod){
	"captured": func(p *lds.Pod) {
		p.Stage = meshv1.Stage_STAGE_CAPTURED
		p.Policy = policy(&meshv1.PortPolicy{Mode: strict})
	},
	"permissive":     func(p *lds.Pod) { p.Policy = policy(&meshv1.PortPolicy{Mode: permissive}) },
	"strict":         func(p *lds.Pod) { p.Policy = policy(&meshv1.PortPolicy{Mode: strict}) },
	"policy-missing": func(p *lds.Pod) { p.Policy = nil },
	"closed-port": func(p *lds.Pod) {
		p.Policy = policy(&meshv1.PortPolicy{Mode: strict}, &meshv1.PortPolicy{Port: 8080, Mode: strict, Closed: true})
	},
	"strict-allow-l4": func(p *lds.Pod) {
		p.Policy = policy(&meshv1.PortPolicy{Mode: strict}, &meshv1.PortPolicy{Port: 6379, Mode: strict, Protocol: meshv1.Protocol_PROTOCOL_TCP, Identity: true, Restricted: true, Allow: []*meshv1.Rule{allowFront}})
	},
	"strict-deny-l4": func(p *lds.Pod) {
		p.Policy = policy(&meshv1.PortPolicy{Mode: strict, Identity: true, Deny: []*meshv1.Rule{denyBatch}})
	},
	"permissive-identity": func(p *lds.Pod) {
		p.Policy = policy(&meshv1.PortPolicy{Mode: permissive}, &meshv1.PortPolicy{Port: 6379, Mode: permissive, Protocol: meshv1.Protocol_PROTOCOL_TCP, Identity: true, Deny: []*meshv1.Rule{denyBatch}})
	},
	"nobody": func(p *lds.Pod) { p.Policy = policy(&meshv1.PortPolicy{Mode: permissive, Restricted: true}) },
	"strict-http": func(p *lds.Pod) {
		p.Policy = policy(&meshv1.PortPolicy{Mode: strict},
			&meshv1.PortPolicy{Port: 8080, Mode: strict, Protocol: meshv1.Protocol_PROTOCOL_HTTP1, Http: true, Identity: true, Deny: []*meshv1.Rule{denyAdmin, denyBatch, denyDebug}, Restricted: true, Allow: []*meshv1.Rule{allowReads}},
			&meshv1.PortPolicy{Port: 9090, Mode: strict, Protocol: meshv1.Protocol_PROTOCOL_HTTP2, Http: true, Identity: true, Restricted: true, Allow: []*meshv1.Rule{allowFront}})
	},
	"permissive-http": func(p *lds.Pod) {
		p.Policy = policy(&meshv1.PortPolicy{Mode: permissive},
			&meshv1.PortPolicy{Port: 8080, Mode: permissive, Protocol: meshv1.Protocol_PROTOCOL_HTTP1, Http: true, Deny: []*meshv1.Rule{denyAdmin}},
			&meshv1.PortPolicy{Port: 8443, Mode: strict})
	},
	// What a pod can have of every kind at once, as agents give it.
	"all-chains": func(p *lds.Pod) {
		p.MaxConnection = 24 * time.Minute
		p.Policy = policy(&meshv1.PortPolicy{Mode: permissive},
			&meshv1.PortPolicy{Port: 8080, Mode: permissive, Protocol: meshv1.Protocol_PROTOCOL_HTTP1, Http: true, Deny: []*meshv1.Rule{denyAdmin}})
	},
	"server-first": func(p *lds.Pod) {
		p.ServerFirst = []uint16{3306, 25}
		p.Policy = policy(&meshv1.PortPolicy{Mode: permissive}, &meshv1.PortPolicy{Port: 25, Mode: strict})
	},
	"server-first-deny": func(p *lds.Pod) {
		p.ServerFirst = []uint16{3306}
		p.Policy = policy(&meshv1.PortPolicy{Mode: strict}, &meshv1.PortPolicy{Port: 3306, Mode: permissive, Identity: true, Deny: []*meshv1.Rule{denyBatch}})
	},
	"server-first-http-rule": func(p *lds.Pod) {
		p.ServerFirst = []uint16{3306}
		p.Policy = policy(&meshv1.PortPolicy{Mode: permissive}, &meshv1.PortPolicy{Port: 3306, Mode: permissive, Http: true, Deny: []*meshv1.Rule{denyAdmin}})
	},
	"port-twice": func(p *lds.Pod) {
		p.Policy = policy(&meshv1.PortPolicy{Mode: permissive}, &meshv1.PortPolicy{Port: 80, Mode: permissive}, &meshv1.PortPolicy{Port: 80, Mode: strict})
	},
	"mode-missing":   func(p *lds.Pod) { p.Policy = policy(&meshv1.PortPolicy{}) },
	"odd-generation": func(p *lds.Pod) { p.Generation = 7; p.Policy = policy(&meshv1.PortPolicy{Mode: strict}) },
	"logged": func(p *lds.Pod) {
		p.AccessLog, p.MaxConnection = true, 50*time.Minute
		p.Policy = policy(&meshv1.PortPolicy{Mode: permissive}, &meshv1.PortPolicy{Port: 8080, Mode: strict, Http: true, Identity: true, Deny: []*meshv1.Rule{denyBatch}})
	},
}

func pod(change func(*lds.Pod)) lds.Pod {
	p := lds.Pod{
		UID: "0b6c5f0e-3f1e-4a55-9f43-51b1a9c9d3a1", Namespace: "shop", SPIFFEID: "spiffe://cluster.local/ns/shop/sa/catalogue",
		Sandbox: "f00dfeedf00dfeedf00dfeed", Generation: 0, NetnsPath: "/run/netns/cni-0b6c5f0e", Stage: meshv1.Stage_STAGE_ENFORCED,
	}
	change(&p)
	return p
}

func TestListeners(t *testing.T) {
	dir := golden.Open(t, "testdata")
	for name, change := range pods {
		t.Run(name, func(t *testing.T) {
			p := pod(change)
			listeners, err := lds.Listeners(p)
			if err != nil {
				t.Fatal(err)
			}
			file := golden.File{Listeners: golden.Messages(listeners)}
			for _, rule := range lds.RuleSecrets(p) {
				file.Secrets = append(file.Secrets, lds.ValidationSecret(rule, []byte("roots")))
			}
			if problems := lds.Problems(p); problems != nil {
				file.Notes = problems
			}
			dir.Check(t, name, file)

			again, _ := lds.Listeners(p)
			for i := range listeners {
				a, _ := proto.MarshalOptions{Deterministic: true}.Marshal(listeners[i])
				b, _ := proto.MarshalOptions{Deterministic: true}.Marshal(again[i])
				if string(a) != string(b) {
					t.Error("the same pod gave other bytes")
				}
			}
		})
	}
	t.Run("node", func(t *testing.T) {
		dir.Check(t, "node", golden.File{Listeners: []proto.Message{lds.Holder()}, Clusters: golden.Messages(lds.Clusters()), Scopes: golden.Messages(lds.Scopes(services()))})
	})
}

func services() []*meshv1.Service {
	ip := func(s string) []byte { return netip.MustParseAddr(s).AsSlice() }
	return []*meshv1.Service{
		{Namespace: "shop", Name: "front", Addresses: [][]byte{ip("10.96.0.10"), ip("fd00:96::10")}, Ports: []*meshv1.ServicePort{
			{Port: 80, Class: meshv1.Class_CLASS_HTTP}, {Port: 6379, Class: meshv1.Class_CLASS_TCP}, {Port: 8080, Class: meshv1.Class_CLASS_AUTO}}},
		{Namespace: "evil", Name: "front", Addresses: [][]byte{ip("10.96.0.11"), {1, 2}}, Ports: []*meshv1.ServicePort{{Port: 80, Class: meshv1.Class_CLASS_HTTP}}},
		{Namespace: "shop", Name: "late", Addresses: [][]byte{ip("10.96.0.11")}, Ports: []*meshv1.ServicePort{{Port: 80, Class: meshv1.Class_CLASS_HTTP}}},
	}
}

// TestModeChangesChainsAlone: Envoy applies a change in place only when nothing but chains and matcher changed.
func TestModeChangesChainsAlone(t *testing.T) {
	want, err := lds.Listeners(pod(pods["captured"]))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"permissive", "strict", "strict-http", "permissive-http", "strict-deny-l4", "policy-missing"} {
		got, err := lds.Listeners(pod(pods[name]))
		if err != nil {
			t.Fatal(err)
		}
		for i := range want {
			for _, l := range []int{i} {
				got[l].FilterChains, got[l].FilterChainMatcher = nil, nil
				want[l].FilterChains, want[l].FilterChainMatcher = nil, nil
			}
			if !proto.Equal(got[i], want[i]) {
				t.Errorf("%s: listener %s differs from the captured one beyond its chains", name, got[i].GetName())
			}
		}
	}
}

func TestPodOutOfTheMeshHasNothing(t *testing.T) {
	p := pod(func(p *lds.Pod) { p.Stage = meshv1.Stage_STAGE_OUT })
	listeners, err := lds.Listeners(p)
	if err != nil || len(listeners)+len(lds.RuleSecrets(p)) != 0 {
		t.Fatalf("listeners %v, secrets %v, error %v", listeners, lds.RuleSecrets(p), err)
	}
}

func TestIncompletePodIsRefused(t *testing.T) {
	for _, change := range []func(*lds.Pod){
		func(p *lds.Pod) { p.UID = "" }, func(p *lds.Pod) { p.SPIFFEID = "" }, func(p *lds.Pod) { p.Sandbox = "" },
		func(p *lds.Pod) { p.Namespace = "" }, func(p *lds.Pod) { p.NetnsPath = "netns" },
	} {
		if _, err := lds.Listeners(pod(change)); err == nil {
			t.Error("an incomplete pod got listeners")
		}
	}
}

// TestEmptyRuleLetsNobodyIn: a validation context without matchers would let everybody in.
func TestEmptyRuleLetsNobodyIn(t *testing.T) {
	secret := lds.ValidationSecret(lds.RuleSecret{Name: names.RuleSecret("uid", 80)}, nil)
	if len(secret.GetValidationContext().GetMatchTypedSubjectAltNames()) != 1 {
		t.Fatal("an empty rule has no matcher")
	}
}
