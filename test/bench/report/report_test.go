package report

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestStatistics(t *testing.T) {
	for name, c := range map[string]struct {
		values []float64
		want   Stat
	}{
		"none":                      {nil, Stat{Noisy: true}},
		"odd, out of order":         {[]float64{7, 1, 3, 2, 5, 4, 6}, Stat{4, 1, 7, 7, true}},
		"even: between the two":     {[]float64{1.0, 1.1, 1.0, 1.1, 1.0, 1.1, 1.0, 1.1}, Stat{1.05, 1.0, 1.1, 8, false}},
		"too few, however steady":   {[]float64{1, 1, 1, 1, 1, 1}, Stat{1, 1, 1, 6, true}},
		"range just within":         {[]float64{1, 1, 1, 1, 1, 1, 1.29}, Stat{1, 1, 1.29, 7, false}},
		"range just beyond":         {[]float64{1, 1, 1, 1, 1, 1, 1.31}, Stat{1, 1, 1.31, 7, true}},
		"one pair far below":        {[]float64{1, 1, 1, 1, 1, 1, 0.6}, Stat{1, 0.6, 1, 7, true}},
		"the median takes no mean":  {[]float64{1, 1, 1, 1, 100, 100, 100}, Stat{1, 1, 100, 7, true}},
		"a median of zero is noisy": {[]float64{0, 0, 0, 0, 0, 0, 1}, Stat{0, 0, 1, 7, true}},
	} {
		got := Of(c.values)
		if math.Abs(got.Median-c.want.Median) > 1e-9 || got.Min != c.want.Min || got.Max != c.want.Max || got.Count != c.want.Count || got.Noisy != c.want.Noisy {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

func TestJudgement(t *testing.T) {
	atLeast := func(v float64) bool { return v >= 1.35 }
	for name, c := range map[string]struct {
		stat Stat
		want string
	}{
		"met":                            {Stat{1.5, 1.4, 1.6, 7, false}, Met},
		"missed":                         {Stat{1.2, 1.1, 1.3, 7, false}, Missed},
		"steady, across the goal":        {Stat{1.36, 1.3, 1.4, 7, false}, Met},
		"noisy, all pairs beyond it":     {Stat{2.0, 1.4, 3.0, 7, true}, Met},
		"noisy, all pairs short of it":   {Stat{0.8, 0.5, 1.2, 7, true}, Missed},
		"noisy, the pairs disagree":      {Stat{1.5, 1.1, 1.8, 7, true}, Unsure},
		"too few, though all are beyond": {Stat{1.5, 1.5, 1.5, 2, true}, Unsure},
		"nothing":                        {Stat{Noisy: true}, Unsure},
	} {
		if got := judge(c.stat, atLeast); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// example is a report of made-up runs: weft is better but with an L7 policy, and one workload is noisy.
func example() Report {
	r := Report{
		Machine: Machine{Started: time.Date(2026, 5, 4, 3, 2, 0, 0, time.UTC), Processors: 2, Model: "A Processor", Arch: "amd64", Kernel: "Linux 6.18", MemoryMiB: 24105, Load: [3]float64{0.1, 0.2, 0.3},
			Envoy: "1.40.0", Fortio: "1.66.5", Revision: "0123456789ab"},
		Settings:  Settings{Pairs: 7, Seconds: 3, Workers: 2},
		Processes: []Process{{Weft, "weft: envoy", 0, 95000, 54000}, {Sidecars, "sidecar of client: envoy", 0, 81000, 39000}, {Sidecars, "sidecar of near: envoy", 0, 79000, 37000}},
		Figures: []Figure{{"agent's memory", "MiB", 60.5, 64, "a real agent"}, {"Envoy's memory per unused service", "KiB", 5.6, 4, "a real Envoy"},
			{Name: "agent's peak", Unit: "MiB", Value: 120, How: "VmHWM"}},
	}
	base := map[string][3]float64{None: {20000, 0, 80}, Sidecars: {4000, 200, 500}, Weft: {6000, 130, 330}, WeftL7: {3600, 220, 560}, SidecarsL7: {4000, 205, 505}}
	for pair := range 7 {
		for _, workload := range []string{"http-8", "http-1000rps", "tcp-bulk"} {
			for place, variant := range []string{None, Weft, Sidecars, SidecarsL7, WeftL7} {
				if workload == "tcp-bulk" && (variant == WeftL7 || variant == SidecarsL7) {
					continue
				}
				b := base[variant]
				drift := 1 + 0.01*float64(pair)
				if workload == "tcp-bulk" && variant == Weft {
					drift = 1 - 0.1*float64(pair)
				}
				rate := b[0] * drift
				if workload == "http-1000rps" {
					rate = 1000
				}
				run := Run{Workload: workload, Placement: "cross", Variant: variant, Pair: pair, Place: place, Seconds: 3, Operations: 3 * rate, Proxies: b[1] * 3 * rate, Whole: b[2] * 3 * rate}
				if workload != "tcp-bulk" {
					run.P50, run.P90, run.P99 = 8000/b[0], 16000/b[0], 32000/b[0]
				}
				r.Runs = append(r.Runs, run)
			}
		}
	}
	r.Summary = Summarise(r)
	return r
}

func TestGolden(t *testing.T) {
	r := example()
	summary, err := json.MarshalIndent(r.Summary, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string]string{"page.md": Page(r, "chart.svg"), "chart.svg": Chart(r.Summary), "summary.json": string(summary) + "\n"} {
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(want) != got {
			t.Errorf("%s is not what its golden says (go test -update rewrites it):\n%s", name, got)
		}
	}
}

func TestFirstLine(t *testing.T) {
	page := Page(example(), "chart.svg")
	first, _, _ := strings.Cut(page, "\n")
	for _, want := range []string{"than with no mesh: 0.18 to 0.30× the throughput", "HTTP/1.1, 1 KB, 8 connections, across nodes, weft, L7 policy (throughput 0.90×"} {
		if !strings.Contains(first, want) {
			t.Errorf("the first line lacks %q: %s", want, first)
		}
	}
	if strings.Contains(first, "TCP") {
		t.Errorf("the first line names what is too noisy: %s", first)
	}
}

// TestPairs: only runs of one pair are compared, so that a machine that slows down changes no ratio.
func TestPairs(t *testing.T) {
	var runs []Run
	for pair := range 7 {
		slower := math.Pow(0.5, float64(pair))
		runs = append(runs, Run{Workload: "http-8", Placement: "same", Variant: Weft, Pair: pair, Seconds: 1, Operations: 1500 * slower},
			Run{Workload: "http-8", Placement: "same", Variant: Sidecars, Pair: pair, Seconds: 1, Operations: 1000 * slower})
	}
	runs = append(runs, Run{Workload: "http-8", Placement: "same", Variant: Weft, Pair: 7, Seconds: 1, Operations: 9})
	s := Summarise(Report{Runs: runs})
	if len(s.Comparisons) != 1 {
		t.Fatalf("comparisons: %+v", s.Comparisons)
	}
	if got := s.Comparisons[0].Rate; got.Median != 1.5 || got.Min != 1.5 || got.Max != 1.5 || got.Count != 7 || got.Noisy {
		t.Errorf("ratio %+v", got)
	}
}

func TestChartIsXML(t *testing.T) {
	d := xml.NewDecoder(strings.NewReader(Chart(example().Summary)))
	for {
		_, err := d.Token()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0.00", 0.1234: "0.123", 1.234: "1.23", 12.34: "12.3", 123.4: "123", 1234: "1234", 12345.6: "12,346", 1234567: "1,234,567"} {
		if got := number(v); got != want {
			t.Errorf("%v: %q, want %q", v, got, want)
		}
	}
}
