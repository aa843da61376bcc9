package report

import (
	"fmt"
	"math"
	"slices"
)

// Stat is a median with its range.
type Stat struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Count  int     `json:"count"`
	// Noisy: see NoiseLimit.
	Noisy bool `json:"noisy,omitempty"`
}

// NoiseLimit and FewestPairs are the rule of noise: a ratio is too noisy when the range of its pairs is wider than this part
// of their median, or when there are fewer pairs.
const (
	NoiseLimit  = 0.30
	FewestPairs = 7
)

// Of takes the median and the range of values.
func Of(values []float64) Stat {
	s := slices.Sorted(slices.Values(values))
	n := len(s)
	if n == 0 {
		return Stat{Noisy: true}
	}
	out := Stat{Median: (s[(n-1)/2] + s[n/2]) / 2, Min: s[0], Max: s[n-1], Count: n}
	out.Noisy = n < FewestPairs || out.Max-out.Min > NoiseLimit*math.Abs(out.Median)
	return out
}

// Row is one workload on one way.
type Row struct {
	Workload  string `json:"workload"`
	Placement string `json:"placement"`
	Variant   string `json:"variant"`
	Rate      Stat   `json:"rate"`
	P50       Stat   `json:"p50"`
	P90       Stat   `json:"p90"`
	P99       Stat   `json:"p99"`
	// Microseconds per operation.
	Proxies Stat `json:"proxies"`
	Whole   Stat `json:"whole"`
}

// Comparison is one way over another, the medians of the pairs' ratios.
type Comparison struct {
	Workload  string `json:"workload"`
	Placement string `json:"placement"`
	Variant   string `json:"variant"`
	Base      string `json:"base"`
	Rate      Stat   `json:"rate"`
	P50       Stat   `json:"p50"`
	P90       Stat   `json:"p90"`
	P99       Stat   `json:"p99"`
	// Proxies is without a count where the base has none.
	Proxies Stat `json:"proxies"`
	Whole   Stat `json:"whole"`
}

// Verdict is a goal and what became of it.
type Verdict struct {
	Goal string `json:"goal"`
	Seen string `json:"seen"`
	// Result is "met", "missed" or "too noisy to say".
	Result string `json:"result"`
}

// Results of goals.
const (
	Met    = "met"
	Missed = "missed"
	Unsure = "too noisy to say"
)

// Summary is what is shown.
type Summary struct {
	Rows        []Row        `json:"rows,omitempty"`
	Comparisons []Comparison `json:"comparisons,omitempty"`
	Goals       []Verdict    `json:"goals,omitempty"`
	// Dearer is the page's first line.
	Dearer string `json:"dearer"`
}

// Summarise computes the summary of runs and figures.
func Summarise(r Report) Summary {
	s := Summary{}
	for _, placement := range Placements {
		for _, w := range Workloads {
			for _, v := range Variants {
				if runs := pick(r.Runs, w.Name, placement.Name, v.Name); len(runs) > 0 {
					s.Rows = append(s.Rows, row(w.Name, placement.Name, v.Name, runs))
				}
			}
			for _, c := range Comparisons {
				if compared, ok := compare(r.Runs, w, placement.Name, c); ok {
					s.Comparisons = append(s.Comparisons, compared)
				}
			}
		}
	}
	s.Goals = append(goals(s.Comparisons), figureGoals(r.Figures)...)
	s.Dearer = dearer(s.Comparisons)
	return s
}

func pick(runs []Run, workload, placement, variant string) (out []Run) {
	for _, r := range runs {
		if r.Workload == workload && r.Placement == placement && r.Variant == variant {
			out = append(out, r)
		}
	}
	return out
}

func each(runs []Run, f func(Run) float64) Stat {
	var values []float64
	for _, r := range runs {
		values = append(values, f(r))
	}
	return Of(values)
}

func proxies(r Run) float64 { return r.Proxies / r.Operations }
func whole(r Run) float64   { return r.Whole / r.Operations }

func row(workload, placement, variant string, runs []Run) Row {
	return Row{Workload: workload, Placement: placement, Variant: variant, Rate: each(runs, Run.Rate), Proxies: each(runs, proxies), Whole: each(runs, whole),
		P50: each(runs, func(r Run) float64 { return r.P50 }), P90: each(runs, func(r Run) float64 { return r.P90 }), P99: each(runs, func(r Run) float64 { return r.P99 })}
}

// compare takes the ratios of runs of the same pair.
func compare(runs []Run, w Workload, placement string, c [2]string) (Comparison, bool) {
	var of, over []Run
	base := pick(runs, w.Name, placement, c[1])
	for _, r := range pick(runs, w.Name, placement, c[0]) {
		if i := slices.IndexFunc(base, func(b Run) bool { return b.Pair == r.Pair }); i >= 0 {
			of, over = append(of, r), append(over, base[i])
		}
	}
	if len(of) == 0 {
		return Comparison{}, false
	}
	ratio := func(f func(Run) float64) Stat {
		var values []float64
		for i := range of {
			if below := f(over[i]); below > 0 {
				values = append(values, f(of[i])/below)
			}
		}
		if len(values) == 0 {
			return Stat{}
		}
		return Of(values)
	}
	out := Comparison{Workload: w.Name, Placement: placement, Variant: c[0], Base: c[1], Whole: ratio(whole),
		P50: ratio(func(r Run) float64 { return r.P50 }), P90: ratio(func(r Run) float64 { return r.P90 }), P99: ratio(func(r Run) float64 { return r.P99 })}
	if !w.Fixed {
		out.Rate = ratio(Run.Rate)
	}
	if c[1] != None {
		out.Proxies = ratio(proxies)
	}
	return out, true
}

// judge compares with a goal. A noisy ratio decides nothing while its pairs disagree about the goal.
func judge(s Stat, holds func(float64) bool) string {
	if s.Count < FewestPairs || s.Noisy && holds(s.Min) != holds(s.Max) {
		return Unsure
	}
	if holds(s.Median) {
		return Met
	}
	return Missed
}

// Goals over two sidecars, for requests on kept connections.
const (
	rateGoal, cpuGoal, rateGoalL7 = 1.35, 0.75, 0.97
)

func goals(comparisons []Comparison) (out []Verdict) {
	for _, c := range comparisons {
		w := workload(c.Workload)
		if w.Bytes || w.Name == "http-new" {
			continue
		}
		about := fmt.Sprintf("%s, %s", w.Title, place(c.Placement))
		least := func(goal float64) {
			if !w.Fixed {
				out = append(out, Verdict{fmt.Sprintf("%s, %s: throughput ≥%.2f× that of %s", about, title(c.Variant), goal, title(c.Base)), ratioText(c.Rate),
					judge(c.Rate, func(v float64) bool { return v >= goal })})
			}
		}
		switch {
		case c.Variant == Weft && c.Base == Sidecars:
			least(rateGoal)
			out = append(out, Verdict{fmt.Sprintf("%s, %s: proxies' processor time per operation ≤%.2f× that of %s", about, title(c.Variant), cpuGoal, title(c.Base)), ratioText(c.Proxies),
				judge(c.Proxies, func(v float64) bool { return v <= cpuGoal })})
		case c.Variant == WeftL7 && c.Base == SidecarsL7:
			least(rateGoalL7)
		}
	}
	return out
}

func figureGoals(figures []Figure) (out []Verdict) {
	for _, f := range figures {
		if f.AtMost == 0 {
			continue
		}
		result := Missed
		if f.Value <= f.AtMost {
			result = Met
		}
		out = append(out, Verdict{fmt.Sprintf("%s ≤%s %s", f.Name, number(f.AtMost), f.Unit), number(f.Value) + " " + f.Unit, result})
	}
	return out
}

func workload(name string) Workload {
	i := slices.IndexFunc(Workloads, func(w Workload) bool { return w.Name == name })
	if i < 0 {
		return Workload{Name: name, Title: name, Unit: "operations"}
	}
	return Workloads[i]
}

func place(name string) string {
	for _, p := range Placements {
		if p.Name == name {
			return p.Title
		}
	}
	return name
}
