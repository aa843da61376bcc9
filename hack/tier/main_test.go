package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestRead(t *testing.T) {
	stream := `{"Action":"run","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"A","Output":"    a_test.go:3: broken\n"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"B","Output":"    b_test.go:9: needs a kernel of 6.9\n"}
{"Action":"skip","Package":"p","Test":"B"}
{"Action":"output","Package":"p","Test":"C","Output":"quiet\n"}
{"Action":"pass","Package":"p","Test":"C"}
{"Action":"fail","Package":"p"}
`
	var show, sink bytes.Buffer
	r := read(strings.NewReader(stream), &sink, &show)
	if r.passed != 1 || r.failed != 1 || r.skipped != 1 {
		t.Errorf("passed %d failed %d skipped %d", r.passed, r.failed, r.skipped)
	}
	if !strings.Contains(show.String(), "a_test.go:3: broken") || strings.Contains(show.String(), "quiet") {
		t.Errorf("shown: %q", show.String())
	}
	if got := r.skipLines(); len(got) != 1 || got[0] != "skipped p B: needs a kernel of 6.9" {
		t.Errorf("skips %q", got)
	}
}

func TestReadSteps(t *testing.T) {
	const output = "building 1/2 of it\n\n\x1b[1m1/3 deploy a shop\x1b[0m\n  12/12 pods\n\x1b[1m[ 0.4 s]\x1b[0m 2/3 install\n"
	for _, test := range []struct {
		name, output            string
		fails                   bool
		passed, failed, skipped int
	}{
		{"all steps", output + "3/3 leave\n", false, 3, 0, 0},
		{"the second step fails", output, true, 1, 1, 1},
		{"success before the last step", output, false, 2, 1, 0},
		{"nothing is reached", "no cluster\n", true, 0, 1, 0},
		{"no step at all", "done\n", false, 0, 0, 0},
	} {
		var show, sink bytes.Buffer
		r := readSteps(strings.NewReader(test.output), &sink, &show)
		if test.fails {
			r.ended(r)
		}
		if r.passed != test.passed || r.failed != test.failed || r.skipped != test.skipped {
			t.Errorf("%s: passed %d failed %d skipped %d", test.name, r.passed, r.failed, r.skipped)
		}
		if show.String() != test.output || sink.String() != test.output {
			t.Errorf("%s: shown %q, logged %q", test.name, &show, &sink)
		}
	}
}
