package names

import (
	"maps"
	"net/netip"
	"strings"
	"testing"
)

func TestRefusedTextIsReadBack(t *testing.T) {
	want := map[string]string{
		Route("shop", "till", 80):      "Proto constraint validation failed: value must be greater than 0",
		TCPCluster(at("[fd00::1]:80")): "two lines: one, two",
		Scope(at("10.96.0.10:80")):     "",
		"n1/5c6d":                      "says nothing of: itself",
	}
	lines := []string{
		RefusedText(Route("shop", "till", 80), "Proto constraint validation failed: value must be greater than 0"),
		RefusedText(TCPCluster(at("[fd00::1]:80")), "two lines:\n  one,\n  two\n"),
		RefusedText(Scope(at("10.96.0.10:80")), ""),
		RefusedText("n1/5c6d", "says nothing of: itself"),
	}
	if got := ParseRefused(strings.Join(lines, "\n")); !maps.Equal(got, want) {
		t.Errorf("read %q, want %q", got, want)
	}
}

func at(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func TestWhatNamesNoResourceIsAboutAll(t *testing.T) {
	for _, message := range []string{
		"", "\n", "internal error", "capture services: the map is full", ": nothing",
		RefusedText("svc/shop/till/80", "bad") + "\nand the agent is ill",
	} {
		if got := ParseRefused(message); got != nil {
			t.Errorf("%q was read as %q", message, got)
		}
	}
}
