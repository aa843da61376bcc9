package resolve

import (
	"fmt"
	"slices"
	"strings"

	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// Envoy refuses a whole RouteConfiguration for one edit that it cannot make, and with it every other route of the Service.
// So what stands here is checked to the byte, whatever the installed version of Gateway API's CRDs lets through.

func httpFilters(filters []gwv1.HTTPRouteFilter, to *ir.Route) error {
	for i, f := range filters {
		var err error
		switch {
		case f.RequestHeaderModifier != nil:
			err = edit(&to.RequestHeaders, f.RequestHeaderModifier, "requestHeaderModifier")
		case f.ResponseHeaderModifier != nil:
			err = edit(&to.ResponseHeaders, f.ResponseHeaderModifier, "responseHeaderModifier")
		case f.RequestRedirect != nil:
			to.Redirect, err = redirect(f.RequestRedirect)
		case f.URLRewrite != nil:
			to.Rewrite, err = rewrite(f.URLRewrite)
		default:
			err = fmt.Errorf("%s is not supported", f.Type)
		}
		if err != nil {
			return fmt.Errorf("filters[%d]: %w", i, err)
		}
	}
	return nil
}

func grpcFilters(filters []gwv1.GRPCRouteFilter, to *ir.Route) error {
	for i, f := range filters {
		var err error
		switch {
		case f.RequestHeaderModifier != nil:
			err = edit(&to.RequestHeaders, f.RequestHeaderModifier, "requestHeaderModifier")
		case f.ResponseHeaderModifier != nil:
			err = edit(&to.ResponseHeaders, f.ResponseHeaderModifier, "responseHeaderModifier")
		default:
			err = fmt.Errorf("%s is not supported", f.Type)
		}
		if err != nil {
			return fmt.Errorf("filters[%d]: %w", i, err)
		}
	}
	return nil
}

func edit(to *ir.HeaderEdit, f *gwv1.HTTPHeaderFilter, field string) error {
	for _, list := range []struct {
		name string
		from []gwv1.HTTPHeader
		to   *[]ir.Header
	}{{"set", f.Set, &to.Set}, {"add", f.Add, &to.Add}} {
		for i, h := range list.from {
			name := string(h.Name)
			err := checkEdit(name)
			if err == nil {
				err = checkHeaderValue(h.Value)
			}
			if err != nil {
				return fmt.Errorf("%s.%s[%d]: header %q: %w", field, list.name, i, name, err)
			}
			*list.to = append(*list.to, ir.Header{Name: name, Value: h.Value})
		}
	}
	for i, name := range f.Remove {
		if err := checkEdit(name); err != nil {
			return fmt.Errorf("%s.remove[%d]: header %q: %w", field, i, name, err)
		}
		to.Remove = append(to.Remove, name)
	}
	return nil
}

// hopByHop headers say where a message ends and what a connection is for: they are Envoy's to write.
var hopByHop = []string{"connection", "content-length", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}

// checkEdit tells whether a route may change a header.
func checkEdit(name string) error {
	lower := strings.ToLower(name)
	switch {
	case lower == "host" || strings.HasPrefix(lower, ":"):
		return fmt.Errorf("a route cannot change it: use a URLRewrite filter for host and path")
	case slices.Contains(hopByHop, lower):
		return fmt.Errorf("a route cannot change how messages are framed")
	case names.ReservedHeader(lower):
		return fmt.Errorf("the name is reserved: Envoy and the mesh act on it")
	}
	return checkToken(name)
}

// checkToken tells whether a text can be a header's name (RFC 9110, token).
func checkToken(name string) error {
	if name == "" || strings.ContainsFunc(name, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("!#$%&'*+-.^_`|~", r))
	}) {
		return fmt.Errorf("not a header name: letters, digits and !#$%%&'*+-.^_`|~ alone")
	}
	return nil
}

func checkHeaderValue(value string) error {
	if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
		return fmt.Errorf("the value has a control character")
	}
	return nil
}

// checkPath tells whether a text can be (the begin of) a path in a request line.
func checkPath(path string) error {
	if !strings.HasPrefix(path, "/") {
		return fmt.Errorf("%q: begin it with /", path)
	}
	if strings.ContainsFunc(path, func(r rune) bool { return r <= ' ' || r > '~' || r == '?' || r == '#' }) {
		return fmt.Errorf("%q: visible ASCII characters alone, others percent-encoded, without ? and #", path)
	}
	return nil
}

func checkHostname(name string) error {
	if len(name) > 253 || strings.ContainsFunc(name, func(r rune) bool {
		return !('a' <= r && r <= 'z' || '0' <= r && r <= '9' || r == '-' || r == '.')
	}) {
		return fmt.Errorf("%q: lower-case letters, digits, dashes and dots, at most 253", name)
	}
	return nil
}

func redirect(f *gwv1.HTTPRequestRedirectFilter) (*ir.Redirect, error) {
	to := &ir.Redirect{Scheme: text(f.Scheme), Hostname: text(f.Hostname), Status: 302}
	if to.Scheme != "" && to.Scheme != "http" && to.Scheme != "https" {
		return nil, fmt.Errorf("requestRedirect.scheme: %q is neither http nor https", to.Scheme)
	}
	if err := checkHostname(to.Hostname); err != nil {
		return nil, fmt.Errorf("requestRedirect.hostname: %w", err)
	}
	if f.Port != nil {
		to.Port = uint32(*f.Port)
	}
	if f.StatusCode != nil {
		to.Status = uint32(*f.StatusCode)
	}
	if !slices.Contains([]uint32{301, 302, 303, 307, 308}, to.Status) {
		return nil, fmt.Errorf("requestRedirect.statusCode: %d is none of 301, 302, 303, 307, 308", to.Status)
	}
	var err error
	if to.Path, to.PrefixPath, err = pathModifier(f.Path); err != nil {
		return nil, fmt.Errorf("requestRedirect.path: %w", err)
	}
	return to, nil
}

func rewrite(f *gwv1.HTTPURLRewriteFilter) (*ir.Rewrite, error) {
	to := &ir.Rewrite{Hostname: text(f.Hostname)}
	if err := checkHostname(to.Hostname); err != nil {
		return nil, fmt.Errorf("urlRewrite.hostname: %w", err)
	}
	var err error
	if to.Path, to.PrefixPath, err = pathModifier(f.Path); err != nil {
		return nil, fmt.Errorf("urlRewrite.path: %w", err)
	}
	return to, nil
}

func pathModifier(p *gwv1.HTTPPathModifier) (full, prefix *string, err error) {
	switch {
	case p == nil:
	case p.ReplaceFullPath != nil:
		err = checkPath(*p.ReplaceFullPath)
	case p.ReplacePrefixMatch != nil && *p.ReplacePrefixMatch != "": // nothing takes the prefix away
		err = checkPath(*p.ReplacePrefixMatch)
	}
	if p == nil || err != nil {
		return nil, nil, err
	}
	return p.ReplaceFullPath, p.ReplacePrefixMatch, nil
}
