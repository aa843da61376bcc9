// Command datapath measures what traffic costs with weft, with two sidecars and without a mesh, on two nodes made of network
// namespaces: real hooks, real Envoys, the configuration that weft generates. It writes every run and the summary as JSON,
// and makes a page and a chart of them. Root is needed; everything is removed at the end, and after an interrupt.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/weftmesh/weft/test/bench/report"
	"github.com/weftmesh/weft/test/datapath/lab"
)

type options struct {
	root, out, docs, fortio, only string
	pairs, workers                int
	seconds                       float64
	quick, render                 bool
	services, pods                int
}

func main() {
	if len(os.Args) > 1 {
		if run, ok := map[string]func([]string) error{"app": app, "send": send}[os.Args[1]]; ok {
			if err := run(os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
				os.Exit(1)
			}
			return
		}
	}
	o := options{}
	flag.StringVar(&o.root, "root", ".", "the clone")
	flag.StringVar(&o.out, "out", "", "file for all runs and the summary as JSON")
	flag.StringVar(&o.docs, "docs", "", "folder for JSON, page and chart")
	flag.StringVar(&o.fortio, "fortio", "fortio", "fortio's program")
	flag.StringVar(&o.only, "only", "traffic,size", "parts to run: traffic, size; or workloads and placements, such as http-8,cross")
	flag.IntVar(&o.pairs, "pairs", report.FewestPairs, "pairs of each comparison")
	flag.Float64Var(&o.seconds, "seconds", 2.5, "length of a run")
	flag.IntVar(&o.workers, "workers", 2, "threads of each Envoy")
	flag.IntVar(&o.services, "services", 5000, "services of the mesh, for its size")
	flag.IntVar(&o.pods, "pods", 20000, "pods in the mesh, for its size")
	flag.BoolVar(&o.quick, "quick", false, "two minutes in all: shows that it works, and is too noisy to conclude from")
	flag.BoolVar(&o.render, "render", false, "make page and chart anew from the JSON in the folder, without measuring")
	flag.Parse()
	if err := o.check(); err != nil {
		fail(err)
	}
	if o.quick {
		o.pairs, o.seconds = 2, 0.5
	}
	if o.render {
		if err := render(o.docs); err != nil {
			fail(err)
		}
		return
	}
	os.Exit(lab.Enter(func() int {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		if err := measure(ctx, o); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			return 1
		}
		return 0
	}))
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(1)
}

// check refuses parts that there are not.
func (o options) check() error {
	known := map[string]bool{"traffic": true, "size": true}
	for _, w := range report.Workloads {
		known[w.Name] = true
	}
	for _, p := range report.Placements {
		known[p.Name] = true
	}
	for _, part := range strings.Split(o.only, ",") {
		if !known[part] {
			return fmt.Errorf("read -only: there is no %q; there are %s", part, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
	}
	return nil
}

// wants tells whether a part, or anything within it, is to run.
func (o options) wants(names ...string) bool {
	asked := map[string]bool{}
	for _, a := range strings.Split(o.only, ",") {
		asked[a] = true
	}
	if asked["traffic"] || asked["size"] {
		return asked[names[0]]
	}
	var workloads, placements bool
	for _, w := range report.Workloads {
		workloads = workloads || asked[w.Name]
	}
	for _, p := range report.Placements {
		placements = placements || asked[p.Name]
	}
	if names[0] != "traffic" {
		return false
	}
	return len(names) == 1 || (!workloads || asked[names[1]]) && (!placements || asked[names[2]])
}

func measure(ctx context.Context, o options) error {
	machine, err := describe(ctx, o)
	if err != nil {
		return err
	}
	r := report.Report{Machine: machine, Settings: report.Settings{Pairs: o.pairs, Seconds: o.seconds, Workers: o.workers}}
	if o.wants("size") {
		if r.Figures, r.Processes, err = size(ctx, o); err != nil {
			return fmt.Errorf("measure the mesh's size: %w", err)
		}
	}
	if o.wants("traffic") {
		runs, processes, err := traffic(ctx, o)
		if err != nil {
			return fmt.Errorf("measure traffic: %w", err)
		}
		r.Runs, r.Processes = runs, append(processes, r.Processes...)
	}
	r.Summary = report.Summarise(r)
	show(r.Summary)
	if o.out != "" {
		if err := write(o.out, r); err != nil {
			return err
		}
	}
	if o.docs == "" {
		return nil
	}
	if err := write(filepath.Join(o.docs, name+".json"), r); err != nil {
		return err
	}
	return render(o.docs)
}

// name of the files in the documentation.
const name = "datapath"

func write(path string, r report.Report) error {
	raw, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return fmt.Errorf("write results: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write results: %w", err)
	}
	return os.WriteFile(path, append(raw, '\n'), 0o644)
}

// render makes page and chart of the runs.
func render(folder string) error {
	raw, err := os.ReadFile(filepath.Join(folder, name+".json"))
	if err != nil {
		return fmt.Errorf("read results: %w", err)
	}
	var r report.Report
	if err := json.Unmarshal(raw, &r); err != nil {
		return fmt.Errorf("read results: %w", err)
	}
	r.Summary = report.Summarise(r)
	return errors.Join(write(filepath.Join(folder, name+".json"), r),
		os.WriteFile(filepath.Join(folder, name+".md"), []byte(report.Page(r, name+".svg")), 0o644),
		os.WriteFile(filepath.Join(folder, name+".svg"), []byte(report.Chart(r.Summary)), 0o644))
}

func show(s report.Summary) {
	fmt.Println()
	for _, g := range s.Goals {
		fmt.Printf("%-16s %s: %s\n", g.Result, g.Goal, g.Seen)
	}
	fmt.Println("\n" + s.Dearer)
}
