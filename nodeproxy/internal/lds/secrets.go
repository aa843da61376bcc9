package lds

import (
	"slices"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/weftmesh/weft/api/names"
)

// nobody matches no certificate that weft's CA issues. A validation context without any matcher would let everybody in.
const nobody = "weft:nobody"

// RuleSecret says whom a port's validation secret lets in: peers whose SPIFFE ID equals one of Exact, begins with one
// of Prefixes, or matches one of Patterns (RE2, whole ID). All empty: nobody.
type RuleSecret struct {
	// Name is the SDS name: names.RuleSecret and the port's revision, or names.SecretBundle for "whoever the trust bundle vouches for".
	Name                      string
	Exact, Prefixes, Patterns []string
}

// RuleSecrets lists the validation secrets that the pod's listeners name, besides names.SecretBundle, by port.
func RuleSecrets(p Pod) []RuleSecret {
	if p.Stage == 0 {
		return nil
	}
	var secrets []RuleSecret
	named := map[string]bool{}
	for _, form := range slices.Concat([]Pod{p}, p.previous()) {
		for _, q := range form.ports() {
			name := q.secret(p.UID)
			if q.refuse || q.http || named[name] {
				continue
			}
			named[name] = true
			secrets = append(secrets, RuleSecret{Name: name, Exact: q.peers.exact, Prefixes: q.peers.prefixes, Patterns: q.peers.patterns})
		}
	}
	return secrets
}

// ValidationSecret makes a rule and the trust bundle (PEM certificates) one SDS secret.
func ValidationSecret(rule RuleSecret, roots []byte) *tls.Secret {
	context := &tls.CertificateValidationContext{
		TrustedCa: &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: roots}},
	}
	add := func(m *matcher.StringMatcher) {
		context.MatchTypedSubjectAltNames = append(context.MatchTypedSubjectAltNames,
			&tls.SubjectAltNameMatcher{SanType: tls.SubjectAltNameMatcher_URI, Matcher: m})
	}
	for _, id := range rule.Exact {
		add(exactly(id))
	}
	for _, prefix := range rule.Prefixes {
		add(&matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Prefix{Prefix: prefix}})
	}
	for _, pattern := range rule.Patterns {
		add(&matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_SafeRegex{SafeRegex: &matcher.RegexMatcher{Regex: pattern}}})
	}
	if len(context.MatchTypedSubjectAltNames) == 0 && rule.Name != names.SecretBundle {
		add(exactly(nobody))
	}
	return &tls.Secret{Name: rule.Name, Type: &tls.Secret_ValidationContext{ValidationContext: context}}
}

// TLSCertificateSecret makes an SVID an SDS secret: certificates (leaf first) and private key in PEM.
func TLSCertificateSecret(spiffeID string, chain, key []byte) *tls.Secret {
	return &tls.Secret{Name: spiffeID, Type: &tls.Secret_TlsCertificate{TlsCertificate: &tls.TlsCertificate{
		CertificateChain: &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: chain}},
		PrivateKey:       &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: key}},
	}}}
}

func exactly(s string) *matcher.StringMatcher {
	return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: s}}
}
