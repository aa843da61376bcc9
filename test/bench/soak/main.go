// Command soak runs the long forms of the e2e tests on the embedded Kubernetes, one part after the other, and keeps what
// each saw in soak.json and soak.md: a part that did not run this time stays there as it was, with the revision that it ran on.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/weftmesh/weft/test/bench/machine"
)

func main() {
	root := flag.String("root", ".", "the clone")
	logs := flag.String("logs", ".out/soak", "folder for the parts' whole output")
	out := flag.String("out", "docs/benchmarks", "folder for soak.json and soak.md")
	only := flag.String("parts", "", "names of parts, separated by spaces; all if empty")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *root, *logs, *out, strings.Fields(*only)); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, root, logs, out string, only []string) error {
	chosen, err := choose(only)
	if err != nil {
		return err
	}
	path := filepath.Join(out, "soak.json")
	seen, err := read(path)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return err
	}
	var failed []string
	for i, p := range chosen {
		fmt.Printf("[%d/%d] %s: %s, about %v\n", i+1, len(chosen), p.Name, p.Title, p.takes)
		r, err := p.run(ctx, root, filepath.Join(logs, p.Name+".log"))
		if err != nil {
			return fmt.Errorf("run %s: %w", p.Name, err)
		}
		fmt.Printf("[%d/%d] %s: %s after %v: %s\n", i+1, len(chosen), p.Name, r.verdict(), r.took(), r.last())
		if !r.Passed {
			failed = append(failed, p.Name)
		}
		seen[p.Name] = r
		if err := write(out, path, seen); err != nil {
			return err
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("failed: %s: their output is in %s", strings.Join(failed, ", "), logs)
	}
	return nil
}

// choose finds the parts of some names, or all, in their own order.
func choose(names []string) ([]part, error) {
	if len(names) == 0 {
		return parts, nil
	}
	var chosen, known = []part{}, []string{}
	for _, p := range parts {
		known = append(known, p.Name)
		if slices.Contains(names, p.Name) {
			chosen = append(chosen, p)
		}
	}
	for _, name := range names {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("there is no part %q: there are %s", name, strings.Join(known, ", "))
		}
	}
	return chosen, nil
}

// run is the part's test, to its end.
func (p part) run(ctx context.Context, root, log string) (result, error) {
	r := result{}
	var err error
	if r.Machine, err = machine.Here(ctx, root); err != nil {
		return r, err
	}
	file, err := os.Create(log)
	if err != nil {
		return r, err
	}
	defer file.Close()
	arguments := append([]string{"test", "-json", "-race", "-tags", "e2e", "-count=1", "-timeout", "300m", "./test/e2e", "-run", "^" + strings.ReplaceAll(p.test, "/", "$/^") + "$"}, p.arguments...)
	cmd := exec.CommandContext(ctx, "go", arguments...)
	cmd.Dir, cmd.Stderr, cmd.Env = root, os.Stderr, append(os.Environ(), "CGO_ENABLED=1")
	cmd.Cancel, cmd.WaitDelay = func() error { return cmd.Process.Signal(os.Interrupt) }, time.Minute
	output, err := cmd.StdoutPipe()
	if err != nil {
		return r, err
	}
	if err := cmd.Start(); err != nil {
		return r, err
	}
	began := time.Now()
	r.Seen, r.Passed = listen(output, file, os.Stdout, p.test)
	err = cmd.Wait()
	r.Seconds = time.Since(began).Round(time.Second).Seconds()
	if ctx.Err() != nil {
		return r, context.Cause(ctx)
	}
	var exited *exec.ExitError
	if err != nil && !errors.As(err, &exited) {
		return r, err
	}
	r.Passed = r.Passed && err == nil
	return r, nil
}

// listen follows the events of a test: all its output goes to a log, what it logged itself is shown and returned.
func listen(in io.Reader, log, show io.Writer, test string) (seen []string, passed bool) {
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 1<<20), 64<<20)
	for lines.Scan() {
		var e struct{ Action, Test, Output string }
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Fprintln(log, lines.Text())
			continue
		}
		fmt.Fprint(log, e.Output)
		if e.Test == test && e.Action == "pass" {
			passed = true
		}
		// "    chaos_test.go:92: Envoy of n1 killed: …"
		where, text, ok := strings.Cut(strings.TrimSpace(e.Output), ": ")
		if ok && e.Action == "output" && (e.Test == test || strings.HasPrefix(e.Test, test+"/")) && strings.Contains(where, "_test.go:") {
			seen = append(seen, strings.TrimSpace(text))
			fmt.Fprintln(show, " ", text)
		}
	}
	return seen, passed
}

func read(path string) (map[string]result, error) {
	seen := map[string]result{}
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return seen, nil
	}
	if err == nil {
		err = json.Unmarshal(raw, &seen)
	}
	if err != nil {
		return nil, fmt.Errorf("read what was seen before: %w", err)
	}
	return seen, nil
}

func write(folder, path string, seen map[string]result) error {
	raw, err := json.MarshalIndent(seen, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, append(raw, '\n'), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, "soak.md"), []byte(page(seen)), 0o644)
}
