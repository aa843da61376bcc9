package report

import (
	"fmt"
	"slices"
	"strings"
)

// worse is how much worse than a peer a median must be to be named in the first line. A noisy one is named where all its
// pairs are worse.
const worse = 0.03

// dearer says what is slower or dearer with weft than without and than with sidecars.
func dearer(comparisons []Comparison) string {
	if len(comparisons) == 0 {
		return "Nothing was compared."
	}
	text := "Slower or dearer with weft"
	if t := withoutMesh(comparisons); t != "" {
		text += " than with no mesh: " + t + "."
	}
	t, unsure := thanSidecars(comparisons)
	if t == "" {
		t = "nothing"
	}
	text += " Slower or dearer than two sidecars, by more than 3 %: " + t + "."
	if unsure > 0 {
		text += fmt.Sprintf(" (%d more ratios look so and are too noisy to say.)", unsure)
	}
	return text
}

// withoutMesh names the range over all workloads: what the machine spends, and what comes through where nothing else limits.
func withoutMesh(comparisons []Comparison) string {
	var rate, cost, wait []float64
	for _, c := range comparisons {
		if c.Base != None || c.Variant != Weft && c.Variant != WeftL7 {
			continue
		}
		cost = append(cost, c.Whole.Median)
		if c.Rate.Count > 0 {
			rate = append(rate, c.Rate.Median)
		}
		if c.P50.Count > 0 {
			wait = append(wait, c.P50.Median)
		}
	}
	var parts []string
	for _, p := range []struct {
		values []float64
		text   string
	}{{rate, "%.2f to %.2f× the throughput"}, {cost, "%.1f to %.1f× the machine's processor time per operation"}, {wait, "%.1f to %.1f× the median latency"}} {
		if len(p.values) > 0 {
			parts = append(parts, fmt.Sprintf(p.text, slices.Min(p.values), slices.Max(p.values)))
		}
	}
	return strings.Join(parts, ", ")
}

// thanSidecars names each workload with what is worse there, and counts what is too noisy to say.
func thanSidecars(comparisons []Comparison) (text string, unsure int) {
	var parts []string
	for _, c := range comparisons {
		if c.Base != Sidecars && c.Base != SidecarsL7 {
			continue
		}
		var said []string
		for _, m := range []struct {
			stat Stat
			more bool // more is better
			text string
		}{{c.Rate, true, "throughput"}, {c.Proxies, false, "proxies' processor time"}, {c.Whole, false, "the machine's processor time"}, {c.P50, false, "p50"}, {c.P90, false, "p90"}, {c.P99, false, "p99"}} {
			bad := func(v float64) bool { return m.more && v < 1-worse || !m.more && v > 1+worse }
			switch {
			case m.stat.Count == 0 || !bad(m.stat.Median):
			case m.stat.Count < FewestPairs || m.stat.Noisy && (!bad(m.stat.Min) || !bad(m.stat.Max)):
				unsure++
			default:
				said = append(said, fmt.Sprintf("%s %.2f×", m.text, m.stat.Median))
			}
		}
		if len(said) > 0 {
			parts = append(parts, fmt.Sprintf("%s, %s, %s (%s)", workload(c.Workload).Title, place(c.Placement), title(c.Variant), strings.Join(said, ", ")))
		}
	}
	return strings.Join(parts, "; "), unsure
}
