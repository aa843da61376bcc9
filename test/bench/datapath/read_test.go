package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weftmesh/weft/test/bench/report"
)

func TestFortioResult(t *testing.T) {
	r, err := result([]byte(`{"ActualDuration": 2000000000, "RetCodes": {"200": 5000}, "DurationHistogram": {"Count": 5000, "Percentiles": [
		{"Percentile": 50, "Value": 0.0015}, {"Percentile": 90, "Value": 0.003}, {"Percentile": 99, "Value": 0.01}]}}`))
	want := report.Run{Operations: 5000, Seconds: 2, P50: 1.5, P90: 3, P99: 10}
	if err != nil || r != want || r.Rate() != 2500 {
		t.Errorf("%+v %v, want %+v", r, err, want)
	}
	for name, text := range map[string]string{
		"a request that failed": `{"ActualDuration": 2000000000, "RetCodes": {"200": 4999, "503": 1}, "DurationHistogram": {"Count": 5000}}`,
		"a broken connection":   `{"ActualDuration": 2000000000, "RetCodes": {"200": 4999, "-1": 1}, "DurationHistogram": {"Count": 5000}}`,
		"nothing":               `{"ActualDuration": 2000000000, "DurationHistogram": {"Count": 0}}`,
		"no JSON":               `dial failed`,
	} {
		if r, err := result([]byte(text)); err == nil {
			t.Errorf("%s was taken: %+v", name, r)
		}
	}
}

func TestBusy(t *testing.T) {
	// user, nice, system, idle, waiting, irq, softirq, stolen, guest, guest nice
	got, err := busyOf("cpu  100 20 3 4000 500 6 7 800 90 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
	if err != nil || got != (100+20+3+6+7)*tick {
		t.Errorf("%v %v", got, err)
	}
	if _, err := busyOf("intr 1"); err == nil {
		t.Error("a file without processors was read")
	}
}

func TestUsed(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "cpu.stat"), []byte("usage_usec 4711\nuser_usec 11\nsystem_usec 4700\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := used(dir); err != nil || got != 4711 {
		t.Errorf("%v %v", got, err)
	}
}

func TestWants(t *testing.T) {
	for only, want := range map[string]string{
		"traffic,size":               "size same/http-8 cross/http-8 same/grpc cross/grpc",
		"size":                       "size",
		"traffic":                    "same/http-8 cross/http-8 same/grpc cross/grpc",
		"grpc":                       "same/grpc cross/grpc",
		"cross":                      "cross/http-8 cross/grpc",
		"http-8,cross":               "cross/http-8",
		"http-8,grpc,same":           "same/http-8 same/grpc",
		"http-8,grpc,tcp-echo,cross": "cross/http-8 cross/grpc",
	} {
		o := options{only: only}
		if err := o.check(); err != nil {
			t.Error(err)
		}
		var got []string
		if o.wants("size") {
			got = append(got, "size")
		}
		for _, w := range []string{"http-8", "grpc"} {
			for _, p := range []string{"same", "cross"} {
				if o.wants("traffic") && o.wants("traffic", w, p) {
					got = append(got, p+"/"+w)
				}
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("-only %s: %v, want %s", only, got, want)
		}
	}
}

func TestUnknownPart(t *testing.T) {
	if err := (options{only: "traffic,sise"}).check(); err == nil {
		t.Error("a part that there is not was taken")
	}
}

// TestRender: page and chart are made of the JSON alone, again and again the same.
func TestRender(t *testing.T) {
	dir := t.TempDir()
	runs := []report.Run{{Workload: "http-8", Placement: "same", Variant: report.Weft, Seconds: 1, Operations: 2, Whole: 1}, {Workload: "http-8", Placement: "same", Variant: report.Sidecars, Seconds: 1, Operations: 1, Whole: 1}}
	if err := write(filepath.Join(dir, name+".json"), report.Report{Runs: runs}); err != nil {
		t.Fatal(err)
	}
	var before string
	for range 2 {
		if err := render(dir); err != nil {
			t.Fatal(err)
		}
		now := ""
		for _, ending := range []string{".json", ".md", ".svg"} {
			raw, err := os.ReadFile(filepath.Join(dir, name+ending))
			if err != nil {
				t.Fatal(err)
			}
			now += string(raw)
		}
		if before != "" && now != before {
			t.Error("the second time something else came out")
		}
		before = now
	}
	if !strings.Contains(before, "2.00× (2.00 - 2.00) too noisy") {
		t.Errorf("the ratio is not on the page:\n%s", before)
	}
}
