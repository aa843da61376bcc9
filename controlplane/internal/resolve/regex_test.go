package resolve

import (
	"strings"
	"testing"

	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// What Envoy takes at the limits is shown by the contract tier (xds, case route-edges).
func TestRegularExpressions(t *testing.T) {
	for value, want := range map[string]string{
		`/v[0-9]+/.*`:               "",
		`.{0,700}`:                  "",
		`(?i)[a-z\x{7f}\x7f\177]\0`: "",
		`[a-zA-Z0-9_.-]{1,63}\\pX`:  "",
		`\Q\p{Letter}\E[^\n]+`:      "",
		strings.Repeat("a", 256):    "",
		strings.Repeat("a", 257):    "at most 256",
		`(`:                         "missing closing )",
		`a**`:                       "invalid nested repetition",
		`a{1001}`:                   "invalid repeat count",
		`(a{100}){100}`:             "invalid repeat count",
		`[^/]{1000}`:                "compiles to more than 32768 instructions",
		`(.{31}){32}`:               "compiles to more than 32768 instructions",
		`\pL{1000}`:                 `\p has no meaning`,
		`\\\P{Greek}`:               `\P has no meaning`,
		`\p{Letter}`:                `\p has no meaning`,
		`ä`:                         "use ASCII alone",
		`a\x{212A}`:                 "0x212A is not ASCII",
		`a\xfF`:                     "0xfF is not ASCII",
		`\377`:                      "0377 is not ASCII",
		`\C`:                        "invalid escape sequence",
		`(?=a)`:                     "invalid or unsupported Perl syntax",
		"a\xff":                     "invalid UTF-8",
	} {
		err := checkRegex(ir.Regex, value)
		if got := ""; want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			if err != nil {
				got = err.Error()
			}
			t.Errorf("%q: %q, want %q", value, got, want)
		}
	}
}
