// Command tier runs one tier of the tests (`go test -json …`), shows what failed and what was skipped with its reason,
// and adds a line to the summary that `make test` prints at its end. With -steps it runs a demo, which prints a line
// "3/9 title" before each step, and counts the steps.
//
//	tier -name unit -summary .out/tiers go test -json ./...
//	tier -name demo -summary .out/tiers -steps make demo
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
)

type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

type result struct {
	passed, failed, skipped int
	// Output lines of tests that have not ended, by package and test.
	output  map[string][]string
	skips   map[string]string
	elapsed time.Duration
	// took is how long each top-level test ran.
	took map[string]time.Duration
	// ended, if set, corrects the counts of a command that failed.
	ended func(*result)
}

// reader takes the output of a tier's command apart: all of it goes to sink, what matters to show.
type reader func(in io.Reader, sink, show io.Writer) *result

func main() {
	name := flag.String("name", "", "name of the tier")
	summary := flag.String("summary", "", "file to which the tier's line is added")
	log := flag.String("log", "", "file for the whole output")
	steps := flag.Bool("steps", false, "the command is a demo that prints its steps")
	flag.Parse()
	if *name == "" || flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "usage: tier -name NAME [-summary FILE] [-log FILE] COMMAND...")
		os.Exit(2)
	}
	reader := read
	if *steps {
		reader = readSteps
	}
	ok, err := run(*name, *summary, *log, reader, flag.Args())
	if err != nil {
		fmt.Fprintf(os.Stderr, "tier %s: %v\n", *name, err)
	}
	if !ok || err != nil {
		os.Exit(1)
	}
}

func run(name, summary, log string, read reader, command []string) (bool, error) {
	var sink io.Writer = io.Discard
	if log != "" {
		f, err := os.Create(log)
		if err != nil {
			return false, fmt.Errorf("open log: %w", err)
		}
		defer f.Close()
		sink = f
	}
	start := time.Now()
	fmt.Printf("== %s: %s\n", name, strings.Join(command, " "))
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stderr = io.MultiWriter(os.Stderr, sink)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return false, fmt.Errorf("run %s: %w", command[0], err)
	}
	if err := cmd.Start(); err != nil {
		return false, fmt.Errorf("run %s: %w", command[0], err)
	}
	r := read(out, sink, os.Stdout)
	exit := cmd.Wait()
	if exit != nil && r.ended != nil {
		r.ended(r)
	}
	var exited *exec.ExitError
	if exit != nil && !errors.As(exit, &exited) {
		return false, fmt.Errorf("run %s: %w", command[0], exit)
	}
	r.elapsed = time.Since(start)
	ok := exit == nil && r.failed == 0
	for _, line := range r.skipLines() {
		fmt.Println(line)
	}
	if ok && r.passed == 0 {
		ok, err = false, errors.New("no test ran: the pattern or the build tag is wrong")
	}
	if slow := r.slowest(); slow != "" {
		fmt.Println("slowest: " + slow)
	}
	line := fmt.Sprintf("%-12s %5d passed %3d failed %3d skipped  %6.0f s", name, r.passed, r.failed, r.skipped, r.elapsed.Seconds())
	if !ok {
		line += "  FAILED"
	}
	fmt.Println(line)
	if summary != "" {
		f, openErr := os.OpenFile(summary, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if openErr != nil {
			return ok, fmt.Errorf("add to summary: %w", openErr)
		}
		defer f.Close()
		fmt.Fprintln(f, line)
	}
	return ok, err
}

// read counts top-level and sub tests and shows the output of those that fail; lines that are no test event (a build
// error) are shown as they are.
func read(in io.Reader, sink, show io.Writer) *result {
	r := &result{output: map[string][]string{}, skips: map[string]string{}, took: map[string]time.Duration{}}
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 1<<20), 64<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			fmt.Fprintln(show, lines.Text())
			fmt.Fprintln(sink, lines.Text())
			continue
		}
		r.take(e, sink, show)
	}
	return r
}

func (r *result) take(e event, sink, show io.Writer) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output":
		fmt.Fprint(sink, e.Output)
		r.output[key] = append(r.output[key], e.Output)
	case "build-output":
		fmt.Fprint(sink, e.Output)
		fmt.Fprint(show, e.Output)
	case "pass", "fail", "skip":
		r.end(e, key, show)
		delete(r.output, key)
	}
}

func (r *result) end(e event, key string, show io.Writer) {
	if e.Test != "" && !strings.Contains(e.Test, "/") {
		r.took[e.Test] = time.Duration(e.Elapsed * float64(time.Second)).Round(time.Second)
	}
	switch {
	case e.Action == "fail":
		for _, l := range r.output[key] {
			fmt.Fprint(show, l)
		}
		if e.Test != "" {
			r.failed++
		}
	case e.Test == "":
		if e.Action == "pass" {
			fmt.Fprintf(show, "ok  %s %.1fs\n", e.Package, e.Elapsed)
		}
	case e.Action == "pass":
		r.passed++
	case e.Action == "skip":
		r.skipped++
		r.skips[key] = reason(r.output[key])
	}
}

// stepLine is the head of a demo's step, with or without the time before it and colours.
var stepLine = regexp.MustCompile(`^(?:\[ *[0-9.]+ s\] )?([0-9]+)/([0-9]+) \S`)

var colours = regexp.MustCompile("\x1b\\[[0-9;]*[mK]")

// readSteps counts the steps that a demo says it comes to: a step passed if the next one, or the end, was reached.
func readSteps(in io.Reader, sink, show io.Writer) *result {
	r := &result{skips: map[string]string{}}
	reached, all := 0, 0
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 1<<20), 64<<20)
	for lines.Scan() {
		fmt.Fprintln(show, lines.Text())
		fmt.Fprintln(sink, lines.Text())
		if head := stepLine.FindStringSubmatch(colours.ReplaceAllString(lines.Text(), "")); head != nil {
			reached, _ = strconv.Atoi(head[1])
			all, _ = strconv.Atoi(head[2])
		}
	}
	r.passed = reached
	r.ended = func(r *result) {
		r.passed, r.failed, r.skipped = max(reached-1, 0), 1, max(all-reached, 0)
		for step := reached + 1; step <= all; step++ {
			r.skips[fmt.Sprintf("step %d", step)] = fmt.Sprintf("step %d failed", reached)
		}
	}
	if reached != all {
		r.failed = 1
	}
	return r
}

// reason finds the text of t.Skip among a test's lines.
func reason(lines []string) string {
	for _, l := range lines {
		l = strings.TrimSpace(l)
		if file, text, ok := strings.Cut(l, ": "); ok && strings.Contains(file, ".go:") {
			return text
		}
	}
	return "no reason given"
}

// slowest names the tests that ran longest, those that took next to no time left out.
func (r *result) slowest() string {
	const most, shortest = 12, 5 * time.Second
	var l []string
	for _, name := range slices.SortedFunc(maps.Keys(r.took), func(a, b string) int { return cmp.Or(-cmp.Compare(r.took[a], r.took[b]), strings.Compare(a, b)) }) {
		if r.took[name] >= shortest && len(l) < most {
			l = append(l, fmt.Sprintf("%s %.0f s", name, r.took[name].Seconds()))
		}
	}
	return strings.Join(l, ", ")
}

func (r *result) skipLines() []string {
	var l []string
	for key, why := range r.skips {
		l = append(l, "skipped "+key+": "+why)
	}
	sort.Strings(l)
	return l
}
