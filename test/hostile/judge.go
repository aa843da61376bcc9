package hostile

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/weftmesh/weft/test/hostile/attack"
)

// Try is one attempt by one attacker over one way, and what came of it.
type Try struct {
	Attempt
	By  Attacker
	Way string
	// Control: it is made against a pod without weft.
	Control bool
	// Mark is what {mark} stands for.
	Mark string
	Done attack.Outcome
	// Sights are what the attacked app saw of it.
	Sights []attack.Sight
}

// Sight takes what the app saw if it came of this try.
func (v *Try) Sight(s attack.Sight) {
	if strings.Contains(s.Request, v.Mark) || bytes.Contains(s.Bytes, []byte(v.Mark)) || v.Done.Local != "" && s.Remote == v.Done.Local {
		v.Sights = append(v.Sights, s)
	}
}

func (v Try) String() string {
	what := "want it " + string(v.Verdict)
	if v.Control {
		what = "want the pod without weft to be reached"
	}
	return fmt.Sprintf("%s (%s), %s, %s: %s %s %s, got %.300q, counts %v, %s", v.ID, v.What, v.By, v.Way, v.Done.Stage, v.Done.Errno, v.Done.Error, v.Done.Got, v.Done.Counts, what)
}

var (
	proxied = regexp.MustCompile(`^HTTP/1\.[01] (400|403|404|408|426|500|501|502|503)`)
	tlsSays = []byte{21, 3}
	// h2Says begins the settings of the attacker's own Envoy, to whom it spoke HTTP/2.
	h2Says = []byte{0, 0, 0x18, 4}
)

// Problem compares what happened with the verdict; empty: it is right.
func (v *Try) Problem() string {
	app := bytes.Contains(v.Done.Got, []byte("app: "))
	if v.Control {
		return v.uncontrolled()
	}
	if v.Hidden != "" {
		for _, s := range v.Sights {
			text := s.Request + "\n" + string(s.Bytes)
			if strings.HasPrefix(v.Hidden, "x-") { // a header's name
				text = strings.ToLower(text)
			}
			if s.Request != "" && strings.Contains(text, v.Hidden) {
				return fmt.Sprintf("the app saw %q in %q", v.Hidden, text)
			}
		}
	}
	status := func(want string) string {
		if !regexp.MustCompile(`^HTTP/1\.[01] (` + want + `)`).Match(v.Done.Got) {
			return "want status " + want
		}
		return ""
	}
	switch v.Verdict {
	case Closed:
		return v.unclosed(app)
	case Unheard:
		if len(v.Sights) > 0 || app {
			return "the app saw it"
		}
	case Denied, Invalid:
		if v.requested() || app {
			return "the app saw it"
		}
		want := string(v.Verdict)
		if v.Status != "" {
			want = v.Status
		}
		return status(want)
	case Stripped, Harmless:
		if v.Make.Kind == "dial" && (!app || !v.requested()) {
			return "want it to pass"
		}
	case Split:
		return status(`\d+`)
	case Permission:
		if v.Done.Counts == nil && v.Done.Errno != "EPERM" {
			return "want EPERM"
		}
		for name := range v.Done.Counts {
			if name != "EPERM" && name != "connect EPERM" {
				return "want EPERM alone"
			}
		}
	case NoEntry:
		if v.Done.Errno != "ENOENT" && v.Done.Errno != "ENOPROTOOPT" {
			return "want ENOENT"
		}
	case NoOption:
		if v.Done.Errno != "ENOPROTOOPT" {
			return "want ENOPROTOOPT"
		}
	default:
		return "nothing judges this verdict"
	}
	return ""
}

// requested: the app saw the request itself.
func (v *Try) requested() bool {
	return slices.ContainsFunc(v.Sights, func(s attack.Sight) bool { return s.Request != "" && strings.Contains(s.Request, v.Mark) })
}

func (v *Try) unclosed(app bool) string {
	got := v.Done.Got
	switch {
	case len(v.Sights) > 0 || app || v.Done.Counts["answered"] > 0:
		return "the app saw it"
	case v.Make.Kind != "dial":
		return ""
	case v.Status != "" && regexp.MustCompile(`^HTTP/1\.[01] (`+v.Status+`)`).Match(got):
		return ""
	case v.Done.Stage == "read" && v.Done.Errno == "timeout" && len(got) == 0:
		return "the connection was held open"
	case len(got) == 0 || bytes.HasPrefix(got, tlsSays) || v.By != Stranger && (proxied.Match(got) || bytes.HasPrefix(got, h2Says)):
		return ""
	}
	return "want no byte"
}

// uncontrolled: the same attempt against a pod without weft must get through, or the attempt shows nothing.
func (v *Try) uncontrolled() string {
	switch v.Make.Kind {
	case "dial":
		if len(v.Sights) == 0 {
			return "the app of the pod without weft saw nothing"
		}
	case "scan", "bind":
		for name := range v.Done.Counts {
			if strings.Contains(name, "EPERM") {
				return "a pod without weft may not do it either"
			}
		}
		if len(v.Done.Counts) == 0 {
			return "nothing was tried"
		}
	}
	return ""
}
