package kernels

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
)

// Section is what one test binary said in a machine.
type Section struct {
	Name string
	// Output is in the form of -test.v=test2json.
	Output []byte
	// Ended says that the binary ended by itself, with Code.
	Ended bool
	Code  int
}

// Sections takes a machine's report apart. The error says why the machine did not come to the end of its plan.
func Sections(report []byte) (sections []Section, err error) {
	err = errors.New("it ended before its plan did: see its console")
	var open *Section
	lines := bufio.NewScanner(bytes.NewReader(report))
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		line := lines.Text()
		if name, ok := strings.CutPrefix(line, MarkerBegin); ok {
			sections = append(sections, Section{Name: name})
			open = &sections[len(sections)-1]
		} else if end, ok := strings.CutPrefix(line, MarkerEnd); ok && open != nil {
			code := strings.TrimPrefix(end, open.Name+" ")
			if open.Code, err = strconv.Atoi(code); err != nil {
				return sections, fmt.Errorf("read how %s ended: %w", open.Name, err)
			}
			err = errors.New("it ended before its plan did: see its console")
			open.Ended, open = true, nil
		} else if why, ok := strings.CutPrefix(line, MarkerBroken); ok {
			err = errors.New(why)
		} else if line == MarkerDone {
			err = nil
		} else if open != nil {
			open.Output = append(append(open.Output, line...), '\n')
		}
	}
	return sections, errors.Join(err, lines.Err())
}

// Outcome is how a test or one of its parts went.
type Outcome struct {
	Name string
	// Action is "pass", "fail" or "skip", and "" of one that did not end.
	Action string
	// Seconds is how long it took, in the machine.
	Seconds float64
	// Output are the lines it printed.
	Output []string
	Parts  []*Outcome
}

// Outcomes reads a section by test2json. The root stands for the binary; its parts are the tests.
func (s *Section) Outcomes(ctx context.Context) (*Outcome, error) {
	cmd := exec.CommandContext(ctx, "go", "tool", "test2json", "-p", s.Name)
	cmd.Stdin = bytes.NewReader(s.Output)
	var complaints strings.Builder
	cmd.Stderr = &complaints
	events, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("read the output of %s: %w: %s", s.Name, err, complaints.String())
	}
	return readEvents(s.Name, events)
}

func readEvents(name string, events []byte) (*Outcome, error) {
	root := &Outcome{Name: name}
	for decoder := json.NewDecoder(bytes.NewReader(events)); decoder.More(); {
		var e struct {
			Action, Test, Output string
			Elapsed              float64
		}
		if err := decoder.Decode(&e); err != nil {
			return nil, fmt.Errorf("read the output of %s: %w", name, err)
		}
		o := root
		if e.Test != "" {
			for part := range strings.SplitSeq(e.Test, "/") {
				o = o.part(part)
			}
		}
		switch e.Action {
		case "output":
			o.Output = append(o.Output, e.Output)
		case "pass", "fail", "skip":
			o.Action, o.Seconds = e.Action, e.Elapsed
		}
	}
	return root, nil
}

// part finds or makes the part of the name.
func (o *Outcome) part(name string) *Outcome {
	for _, p := range o.Parts {
		if p.Name == name {
			return p
		}
	}
	p := &Outcome{Name: name}
	o.Parts = append(o.Parts, p)
	return p
}

// Reason is why a test was skipped: the last line it printed that names a place in a file.
func (o *Outcome) Reason() string {
	for i := len(o.Output) - 1; i >= 0; i-- {
		if place, text, ok := strings.Cut(strings.TrimSpace(o.Output[i]), ": "); ok && strings.Contains(place, ".go:") {
			return text
		}
	}
	return "no reason given"
}

// Faults finds the lines of a console by which a kernel says that it is broken, not the tests. A soft lockup is none: it
// tells that this machine did not give the emulator its turn.
func Faults(console string) (faults []string) {
	for line := range strings.Lines(console) {
		for _, sign := range []string{"BUG:", "Oops", "WARNING:", "Kernel panic", "general protection fault", "Out of memory"} {
			if strings.Contains(line, sign) && !strings.Contains(line, "soft lockup") {
				faults = append(faults, strings.TrimSpace(line))
				break
			}
		}
	}
	return faults
}
