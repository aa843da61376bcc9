//go:build e2e

package e2e

import (
	"fmt"
	"testing"
	"time"
)

const shortcut = "weft.dev/Shortcut"

// TestShortcut: the label of a namespace switches the short circuit of its running pods, both ways, under load. Bytes go past
// TCP, the pods' conditions say so, and nothing is lost.
func TestShortcut(t *testing.T) {
	alone(t, "shop")
	s := newShop(t)
	s.label(everybody, true)
	s.dwell(500)
	moved := func() (n int) {
		for _, node := range []string{"n1", "n2"} {
			n += hookEvents(t, node, "shortcut_redirected_bytes")
		}
		return n
	}
	label := func(value, status string) {
		t.Helper()
		if _, err := k8s.Kubectl(t.Context(), "label", "namespace", "shop", "weft.dev/sockmap"+value, "--overwrite"); err != nil {
			t.Fatal(err)
		}
		if err := k8s.UntilCondition(t.Context(), time.Minute, "shop", everybody, shortcut, status, nil); err != nil {
			t.Fatal(err)
		}
	}
	if n := moved(); n > 0 {
		t.Errorf("%d bytes went past TCP before anybody asked for it", n)
	}
	for range 3 {
		before := moved()
		label("=enabled", "True")
		until(t, time.Minute, "bytes past TCP", func() (bool, string) {
			n := moved() - before
			return n > 0, fmt.Sprintf("%d bytes", n)
		})
		s.dwell(1000)
		label("-", "False")
		after := moved()
		s.dwell(1000)
		if n := moved() - after; n > 0 {
			t.Errorf("%d bytes went past TCP after it was switched off", n)
		}
	}
	s.lossless()
	s.label(everybody, false)
}
