//go:build e2e

package e2e

import (
	"fmt"
	"strings"
)

// caller is an app whose pods stand on both nodes.
type caller struct{ namespace, app string }

var (
	client   = caller{"mesh", "client"}
	other    = caller{"mesh", "other"}
	stranger = caller{"outside", "stranger"}
)

// ask is one call of a case.
type ask struct {
	from   caller
	port   int
	method string
	path   string
	header string
	// h2c asks by HTTP/2.
	h2c     bool
	allowed bool
}

func get(from caller, path string, allowed bool) ask {
	return ask{from: from, port: 8080, method: "GET", path: path, allowed: allowed}
}

func (a ask) with(header string) ask { a.header = header; return a }
func (a ask) by(method string) ask   { a.method = method; return a }
func (a ask) http2() ask             { a.h2c = true; return a }

func line(from caller, port int, allowed bool) ask {
	return ask{from: from, port: port, allowed: allowed}
}

func (a ask) String() string {
	verdict := "denied"
	if a.allowed {
		verdict = "allowed"
	}
	return strings.TrimSpace(fmt.Sprintf("%s %d %s %s %s h2c=%v is %s", a.from.app, a.port, a.method, a.path, a.header, a.h2c, verdict))
}

const (
	byClient = `from: [{serviceAccounts: [{name: client}]}]`
	byOther  = `from: [{serviceAccounts: [{name: other}]}]`
)

// accessCase is one policy, and what becomes of whom.
type accessCase struct {
	name   string
	policy []string // one or two specs without the target
	asks   []ask
	// requests: the policy has rules about requests to port 8080, so that its chain parses HTTP; without such rules no
	// port of the server is parsed.
	requests bool
	// byService: the policy names the server by its Service instead of its labels.
	byService bool
	// strict puts the callee under Strict.
	strict bool
}

// identity tells whether who calls matters, so that a caller without an identity is refused.
func (c accessCase) identity() bool {
	return c.strict || strings.Contains(strings.Join(c.policy, ""), "from:")
}

// manifest is the case's policies.
func (c accessCase) manifest() string {
	target := "selector: {matchLabels: {app: server}}"
	if c.byService {
		target = "targetRefs: [{name: server}]"
	}
	return policies(target, c.policy)
}

// manifest is policies for the server's pods.
func manifest(specs []string) string {
	return policies("selector: {matchLabels: {app: server}}", specs)
}

func policies(target string, specs []string) string {
	var out strings.Builder
	for i, spec := range specs {
		fmt.Fprintf(&out, "---\napiVersion: weft.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: case-%d, namespace: mesh}\nspec: {%s, %s}\n", i, target, spec)
	}
	return out.String()
}

// accessCases: together with their repeal they are the table that docs/SECURITY.md speaks of.
var accessCases = []accessCase{
	{name: "allow one account", policy: []string{`action: Allow, rules: [{` + byClient + `}]`}, asks: []ask{
		get(client, "/pod", true), get(other, "/pod", false), get(stranger, "/pod", false),
		line(client, 9000, true), line(other, 9000, false), line(stranger, 9000, false),
		line(client, 9001, true), line(other, 9001, false), line(stranger, 9001, false),
	}},
	{name: "deny one account", policy: []string{`action: Deny, rules: [{` + byOther + `}]`}, asks: []ask{
		get(client, "/pod", true), get(other, "/pod", false), get(stranger, "/pod", false),
		line(client, 9000, true), line(other, 9000, false), line(client, 9001, true), line(other, 9001, false),
	}},
	{name: "allow a namespace", policy: []string{`action: Allow, rules: [{from: [{namespaces: [mesh]}]}]`}, asks: []ask{
		get(client, "/pod", true), get(other, "/pod", true), get(stranger, "/pod", false),
	}},
	{name: "allow another namespace", policy: []string{`action: Allow, rules: [{from: [{namespaces: [elsewhere]}]}]`}, asks: []ask{
		get(client, "/pod", false), get(other, "/pod", false), get(stranger, "/pod", false), line(client, 9000, false),
	}},
	{name: "allow a SPIFFE ID", policy: []string{`action: Allow, rules: [{from: [{spiffeIDs: ["spiffe://cluster.local/ns/mesh/sa/client"]}]}]`}, asks: []ask{
		get(client, "/pod", true), get(other, "/pod", false), line(client, 9001, true), line(other, 9001, false),
	}},
	{name: "allow a longer SPIFFE ID", policy: []string{`action: Allow, rules: [{from: [{spiffeIDs: ["spiffe://cluster.local/ns/mesh/sa/client2"]}]}]`}, asks: []ask{
		get(client, "/pod", false), line(client, 9000, false),
	}},
	{name: "allow nothing", policy: []string{`action: Allow, rules: []`}, asks: []ask{
		get(client, "/pod", false), get(stranger, "/pod", false), line(client, 9000, false), line(client, 9001, false),
	}},
	{name: "allow GET", policy: []string{`action: Allow, rules: [{to: [{ports: [8080], methods: [GET]}]}]`}, requests: true, asks: []ask{
		get(client, "/pod", true), get(client, "/pod", false).by("POST"), get(client, "/pod", true).http2(), get(client, "/pod", false).by("POST").http2(),
		get(stranger, "/pod", true), get(stranger, "/pod", false).by("POST"),
	}},
	{name: "deny DELETE", policy: []string{`action: Deny, rules: [{to: [{ports: [8080], methods: [DELETE]}]}]`}, requests: true, asks: []ask{
		get(client, "/pod", true), get(client, "/pod", false).by("DELETE"), get(other, "/pod", false).by("DELETE"),
	}},
	{name: "deny a path prefix", policy: []string{`action: Deny, rules: [{to: [{ports: [8080], paths: [{type: Prefix, value: /status}]}]}]`}, requests: true, asks: []ask{
		get(client, "/pod", true), get(client, "/status/200", false), get(client, "//status/200", false),
		get(client, "/pod/../status/200", false), get(client, "/status/200", false).http2(), get(client, "/pod/%2e%2e;/status/200", false),
	}},
	{name: "allow an exact path", policy: []string{`action: Allow, rules: [{to: [{ports: [8080], paths: [{value: /pod}]}]}]`}, requests: true, asks: []ask{
		get(client, "/pod", true), get(client, "/status/200", false), get(client, "/podx", false),
	}},
	{name: "allow a pattern", policy: []string{`action: Allow, rules: [{to: [{ports: [8080], paths: [{type: RegularExpression, value: "/status/2.*"}]}]}]`}, requests: true, asks: []ask{
		get(client, "/status/200", true), get(client, "/pod", false), get(client, "/a/status/200", false),
	}},
	{name: "allow a header", policy: []string{`action: Allow, rules: [{to: [{ports: [8080], headers: [{name: x-tier, value: {value: gold}}]}]}]`}, requests: true, asks: []ask{
		get(client, "/pod", true).with("x-tier:gold"), get(client, "/pod", false).with("x-tier:silver"), get(client, "/pod", false),
	}},
	{name: "deny a header that is there", policy: []string{`action: Deny, rules: [{to: [{ports: [8080], headers: [{name: x-debug}]}]}]`}, requests: true, asks: []ask{
		get(client, "/pod", true), get(client, "/pod", false).with("x-debug:1"),
	}},
	{name: "allow an account to GET", policy: []string{`action: Allow, rules: [{` + byClient + `, to: [{ports: [8080], methods: [GET]}]}]`}, requests: true, asks: []ask{
		get(client, "/pod", true), get(client, "/pod", false).by("PUT"), get(other, "/pod", false), get(stranger, "/pod", false),
	}},
	{name: "deny an account a path", policy: []string{`action: Deny, rules: [{` + byOther + `, to: [{ports: [8080], paths: [{type: Prefix, value: /status}]}]}]`}, requests: true, asks: []ask{
		get(client, "/status/200", true), get(other, "/status/200", false), get(other, "/pod", true),
	}},
	{name: "allow one port", policy: []string{`action: Allow, rules: [{` + byClient + `, to: [{ports: [9000]}]}]`}, asks: []ask{
		line(client, 9000, true), line(other, 9000, false), line(stranger, 9000, false), // no Allow is about the other ports
		get(client, "/pod", true), get(stranger, "/pod", true), line(other, 9001, true),
	}},
	{name: "deny one port", policy: []string{`action: Deny, rules: [{` + byClient + `, to: [{ports: [9000]}]}]`}, asks: []ask{
		line(client, 9000, false), line(other, 9000, true), get(client, "/pod", true), line(client, 9001, true),
	}},
	{name: "deny wins over allow", policy: []string{`action: Allow, rules: [{from: [{namespaces: [mesh]}]}]`, `action: Deny, rules: [{` + byOther + `}]`}, asks: []ask{
		get(client, "/pod", true), get(other, "/pod", false), line(client, 9000, true), line(other, 9000, false), line(other, 9001, false),
	}},
	{name: "two allows add up", policy: []string{`action: Allow, rules: [{` + byClient + `}]`, `action: Allow, rules: [{` + byOther + `}]`}, asks: []ask{
		get(client, "/pod", true), get(other, "/pod", true), get(stranger, "/pod", false), line(other, 9000, true),
	}},
	{name: "deny one account, by the Service", policy: []string{`action: Deny, rules: [{` + byOther + `}]`}, byService: true, asks: []ask{
		get(client, "/pod", true), get(other, "/pod", false), line(other, 9000, false), line(other, 9001, false),
	}},
	{name: "allow GET, by the Service", policy: []string{`action: Allow, rules: [{to: [{ports: [8080], methods: [GET]}]}]`}, requests: true, byService: true, asks: []ask{
		get(client, "/pod", true), get(client, "/pod", false).by("POST"),
	}},
	{name: "Strict, allow one account", policy: []string{`action: Allow, rules: [{` + byClient + `}]`}, strict: true, asks: []ask{
		get(client, "/pod", true), get(other, "/pod", false), get(stranger, "/pod", false),
		line(client, 9000, true), line(other, 9000, false), line(stranger, 9000, false), line(other, 9001, false), line(stranger, 9001, false),
	}},
	{name: "Strict, deny a path prefix", policy: []string{`action: Deny, rules: [{to: [{ports: [8080], paths: [{type: Prefix, value: /status}]}]}]`}, requests: true, strict: true, asks: []ask{
		get(client, "/pod", true), get(client, "/status/200", false), get(other, "/status/200", false), get(stranger, "/pod", false), line(client, 9000, true),
	}},
	{name: "Strict, allow one port", policy: []string{`action: Allow, rules: [{` + byClient + `, to: [{ports: [9000]}]}]`}, strict: true, asks: []ask{
		line(client, 9000, true), line(other, 9000, false), get(other, "/pod", true), get(stranger, "/pod", false), line(stranger, 9001, false),
	}},
}
