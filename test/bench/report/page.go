package report

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// number writes a figure with three digits that count.
func number(v float64) string {
	digits := 0
	switch {
	case v != 0 && v < 1 && v > -1:
		digits = 3
	case v < 10:
		digits = 2
	case v < 100:
		digits = 1
	}
	text := strconv.FormatFloat(v, 'f', digits, 64)
	if whole, _, fraction := strings.Cut(text, "."); !fraction && len(whole) > 4 {
		for i := len(whole) - 3; i > 0; i -= 3 {
			whole = whole[:i] + "," + whole[i:]
		}
		text = whole
	}
	return text
}

// ratioText is a median with its range; "-": there is nothing to compare.
func ratioText(s Stat) string {
	if s.Count == 0 {
		return "-"
	}
	text := fmt.Sprintf("%.2f× (%.2f - %.2f)", s.Median, s.Min, s.Max)
	if s.Noisy {
		text += " too noisy"
	}
	return text
}

func statText(s Stat) string {
	if s.Median == 0 {
		return "-"
	}
	return fmt.Sprintf("%s (%s - %s)", number(s.Median), number(s.Min), number(s.Max))
}

type table struct{ strings.Builder }

func (t *table) row(cells ...string) { fmt.Fprintf(t, "| %s |\n", strings.Join(cells, " | ")) }

func (t *table) head(cells ...string) {
	t.row(cells...)
	t.row(slices.Repeat([]string{"---"}, len(cells))...)
}

// Page is the report as Markdown; chart is the name of the chart's file.
func Page(r Report, chart string) string {
	var t table
	s := r.Summary
	fmt.Fprintf(&t, "%s\n\n# What traffic costs: weft, two sidecars, no mesh\n\n", s.Dearer)
	t.WriteString("Made by `make bench-datapath` from `" + strings.TrimSuffix(chart, ".svg") + ".json`, which has every run; do not edit. ")
	t.WriteString("How it is measured is in [README.md](README.md).\n\n")
	t.machine(r)
	t.noise(s)
	if len(s.Comparisons) > 0 {
		fmt.Fprintf(&t, "\n![Throughput and proxies' processor time over those of two sidecars](%s)\n", chart)
	}
	t.goals(s)
	t.comparisons(s)
	t.rows(s)
	t.memory(r.Processes)
	t.figures(r.Figures)
	return t.String()
}

func (t *table) machine(r Report) {
	m := r.Machine
	fmt.Fprintf(t, "%d processors (%s, %s), %s MiB, %s, Envoy %s with %d workers each, fortio %s, weft at %s; %s; load average before: %.2f, %.2f, %.2f.\n",
		m.Processors, m.Model, m.Arch, number(float64(m.MemoryMiB)), m.Kernel, m.Envoy, r.Settings.Workers, m.Fortio, m.Revision,
		m.Started.UTC().Format("2006-01-02 15:04 UTC"), m.Load[0], m.Load[1], m.Load[2])
	fmt.Fprintf(t, "%d pairs of %s s each, interleaved, the order turned round every time. App, generator and proxies share the processors: throughput of a closed\nloop has all of them in it.\n",
		r.Settings.Pairs, number(r.Settings.Seconds))
}

// noise states the rule, and how much of the comparison it spoils.
func (t *table) noise(s Summary) {
	fmt.Fprintf(t, "\nA ratio is **too noisy** when the range of its pairs is wider than %.0f %% of their median, or when there are fewer than %d pairs.\nA goal is undecided when a noisy ratio's pairs disagree about it.\n", 100*NoiseLimit, FewestPairs)
	noisy, all := 0, 0
	for _, c := range s.Comparisons {
		for _, stat := range []Stat{c.Rate, c.Proxies, c.Whole} {
			if stat.Count > 0 {
				all++
				if stat.Noisy {
					noisy++
				}
			}
		}
	}
	if noisy > 0 {
		fmt.Fprintf(t, "**Too noisy here: %d of %d ratios of throughput and processor time.**\n", noisy, all)
	}
}

func (t *table) goals(s Summary) {
	if len(s.Goals) == 0 {
		return
	}
	met := 0
	for _, g := range s.Goals {
		if g.Result == Met {
			met++
		}
	}
	fmt.Fprintf(t, "\n## Goals: %d of %d met\n\n", met, len(s.Goals))
	t.head("goal", "seen", "result")
	for _, g := range s.Goals {
		result := g.Result
		if result != Met {
			result = "**" + result + "**"
		}
		t.row(g.Goal, g.Seen, result)
	}
}

func (t *table) comparisons(s Summary) {
	for _, base := range []struct {
		names []string
		title string
	}{{[]string{Sidecars, SidecarsL7}, "Over two sidecars with the same policy"}, {[]string{None}, "Over no mesh"}} {
		var lines []Comparison
		for _, c := range s.Comparisons {
			if slices.Contains(base.names, c.Base) {
				lines = append(lines, c)
			}
		}
		if len(lines) == 0 {
			continue
		}
		fmt.Fprintf(t, "\n## %s\n\nMedian of the pairs' ratios (minimum - maximum). Processor time is per operation, user and system.\n\n", base.title)
		t.head("workload", "where", "way", "throughput", "CPU of all proxies", "CPU of the machine", "p50", "p90", "p99")
		for _, c := range lines {
			t.row(workload(c.Workload).Title, place(c.Placement), title(c.Variant), ratioText(c.Rate), ratioText(c.Proxies), ratioText(c.Whole), ratioText(c.P50), ratioText(c.P90), ratioText(c.P99))
		}
	}
}

func (t *table) rows(s Summary) {
	if len(s.Rows) == 0 {
		return
	}
	t.WriteString("\n## Each way by itself\n\nMedian (minimum - maximum). Processor time in µs per operation, latency in ms.\n\n")
	t.head("workload", "where", "way", "per second", "CPU of all proxies", "CPU of the machine", "p50", "p90", "p99")
	for _, r := range s.Rows {
		w := workload(r.Workload)
		t.row(w.Title, place(r.Placement), title(r.Variant), statText(r.Rate)+" "+w.Unit, statText(r.Proxies), statText(r.Whole), statText(r.P50), statText(r.P90), statText(r.P99))
	}
}

// podCounts are the numbers of pods on a node for which memory is reckoned.
var podCounts = []uint64{1, 10, 30, 100}

// perPod is KiB of weft's Envoy for each pod, as measured on the embedded Kubernetes with all kinds of chains.
const perPod = 277

func (t *table) memory(processes []Process) {
	if len(processes) == 0 {
		return
	}
	t.WriteString("\n## Memory after the runs\n\nKiB; PSS shares what processes have in common, the program above all.\n\n")
	t.head("process", "node", "RSS", "PSS")
	var sidecars []Process
	for _, p := range processes {
		t.row(p.Name, strconv.Itoa(p.Node), number(float64(p.RSS)), number(float64(p.PSS)))
		if p.Of == Sidecars {
			sidecars = append(sidecars, p)
		}
	}
	if len(sidecars) == 0 {
		return
	}
	var rss, pss uint64
	for _, p := range sidecars {
		rss, pss = rss+p.RSS, pss+p.PSS
	}
	n := uint64(len(sidecars))
	var envoy, all uint64
	for _, p := range processes {
		if p.Of == Weft && p.Node == 0 {
			all += p.RSS
			if p.Name == "weft: envoy" {
				envoy = p.RSS
			}
		}
	}
	fmt.Fprintf(t, "\nA node with many pods, reckoned: of sidecars the mean of those above for each pod (without Istio's agent in it, and with few services in its\nconfiguration); of weft node 0's processes above and %d KiB of Envoy for each pod, which is what one takes with all kinds of chains\n([README.md](README.md)).\n\n", perPod)
	t.head("pods on the node", "sidecars: RSS, MiB", "sidecars: PSS, MiB", "weft: Envoy's RSS, MiB", "weft: RSS of all its processes, MiB")
	for _, pods := range podCounts {
		mib := func(kib uint64) string { return number(float64(kib) / 1024) }
		t.row(strconv.FormatUint(pods, 10), mib(rss/n*pods), mib(pss/n*pods), mib(envoy+perPod*pods), mib(all+perPod*pods))
	}
}

func (t *table) figures(figures []Figure) {
	if len(figures) == 0 {
		return
	}
	t.WriteString("\n## Size of the mesh\n\n")
	t.head("figure", "measured", "goal", "how")
	for _, f := range figures {
		goal := "-"
		if f.AtMost > 0 {
			goal = "≤" + number(f.AtMost) + " " + f.Unit
		}
		t.row(f.Name, number(f.Value)+" "+f.Unit, goal, f.How)
	}
}
