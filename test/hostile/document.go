package hostile

import (
	"fmt"
	"strings"
)

// Document is docs/HOSTILE.md.
func Document() string {
	var out strings.Builder
	all := All()
	open, made := 0, 0
	for _, a := range all {
		if a.Verdict == Open {
			open++
		}
		if a.Shown == Here || a.Shown == Alone {
			made++
		}
	}
	fmt.Fprintf(&out, `# Hostile pods

What was tried against weft, and what became of it: %d attempts, of which %d are open (docs/SECURITY.md says what to do about those, and what is defended
at all). This page is made from the list in test/hostile: `+"`go test ./test/hostile -update`"+`.

%d of them are made by `+"`e2e.TestHostile`"+` and `+"`e2e.TestHostileAlone`"+`, by root in pods with a container's default capabilities, NET_RAW among them, on a Kubernetes of two nodes. Each of those
is also made against a pod without weft, which it must reach, where the last column does not say why not; the server's app counts what it saw. The others
are shown by the test that is named. `+"`make test`"+` makes the short form, `+"`make soak`"+` (`+"`-hostile full`"+`) all ports, all connections and the throughput of others;
it alone insists that forged packets do what they should to pods without weft, which a busy machine does not always show.

"closed" is a refused connect, a reset or an end, and to a pod of the mesh on an HTTP port an error by an Envoy: no byte of the app's comes back, and the app
sees nothing. An attempt stands once, whether it was made by several attackers, on both placements or on several ways to the same port.
`, len(all), open, made)
	for _, g := range groups {
		fmt.Fprintf(&out, "\n## %s\n%s\n\n| Attempt | By | Where | Verdict | Shown by |\n| --- | --- | --- | --- | --- |\n", g.name, g.about)
		for _, a := range g.all() {
			fmt.Fprintf(&out, "| %s | %s | %s | %s | %s |\n", a.What, attackers(a.By), a.Where, verdict(a), shown(a))
		}
	}
	return out.String()
}

func attackers(by []Attacker) string {
	var names []string
	for _, b := range by {
		names = append(names, string(b))
	}
	return strings.Join(names, ", ")
}

func verdict(a Attempt) string {
	if a.Verdict == Open {
		return "**open**"
	}
	return string(a.Verdict)
}

func shown(a Attempt) string {
	test, subtest, _ := strings.Cut(a.Shown, "/")
	switch {
	case test == "":
		return ""
	case (a.Shown == Here || a.Shown == Alone) && a.Uncontrolled != "":
		return fmt.Sprintf("`%s` `%s`; %s", test, a.ID, a.Uncontrolled)
	case a.Shown == Here || a.Shown == Alone:
		return fmt.Sprintf("`%s` `%s`", test, a.ID)
	case subtest != "":
		return fmt.Sprintf("`%s`, %q", test, subtest)
	}
	return "`" + test + "`"
}
