package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestListen(t *testing.T) {
	stream := `{"Action":"run","Test":"TestChaos"}
{"Action":"output","Test":"TestChaos","Output":"    chaos_test.go:92: Envoy of n1 killed: 10 requests, 1 failed\n"}
{"Action":"output","Test":"TestOther","Output":"    other_test.go:1: not this one\n"}
{"Action":"output","Test":"TestChaos/sub","Output":"        chaos_test.go:99: in a subtest\n"}
no event
{"Action":"pass","Test":"TestChaos/sub"}
`
	for _, end := range []string{"pass", "fail"} {
		var log, show bytes.Buffer
		seen, passed := listen(strings.NewReader(stream+`{"Action":"`+end+`","Test":"TestChaos"}`), &log, &show, "TestChaos")
		if got := strings.Join(seen, "; "); got != "Envoy of n1 killed: 10 requests, 1 failed; in a subtest" {
			t.Errorf("seen: %s", got)
		}
		if passed != (end == "pass") {
			t.Errorf("%s: passed %v", end, passed)
		}
		if !strings.Contains(log.String(), "no event") || !strings.Contains(log.String(), "not this one") {
			t.Errorf("the log lacks output: %s", log.String())
		}
	}
}

func TestPage(t *testing.T) {
	text := page(map[string]result{
		"chaos":    {Passed: true, Seconds: 1800, Seen: []string{"first kill", "in all: a|b"}},
		"upgrades": {Seen: []string{"upgrade 1", "lost one"}},
		"cycles":   {Passed: true, Seen: []string{"100 cycles", "600 cycles"}},
	})
	first, _, _ := strings.Cut(text, "\n")
	if !strings.HasPrefix(first, "Failed when they ran last: upgrades. Never run: envoy-kills, ") {
		t.Errorf("first line: %s", first)
	}
	for _, want := range []string{`| passed | in all: a\|b | 30m0s |`, "| **failed** | lost one |", "first kill\n", "upgrade 1\n", "| not run |"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if strings.Contains(text, "100 cycles\n") {
		t.Error("a part whose last line says all has its other lines on the page")
	}
}

func TestChoose(t *testing.T) {
	chosen, err := choose([]string{"upgrades", "chaos"})
	if err != nil || len(chosen) != 2 || chosen[0].Name != "chaos" {
		t.Errorf("%v, %v", chosen, err)
	}
	if _, err := choose([]string{"chaso"}); err == nil || !strings.Contains(err.Error(), "there are chaos, ") {
		t.Errorf("an unknown name: %v", err)
	}
}

// TestPartsExist: every part's test and flags are those of the e2e tests.
func TestPartsExist(t *testing.T) {
	files, err := filepath.Glob("../../e2e/*_test.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	var all []byte
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, text...)
	}
	for _, p := range parts {
		test, sub, _ := strings.Cut(p.test, "/")
		if !strings.Contains(string(all), "func "+test+"(t *testing.T)") || sub != "" && !strings.Contains(string(all), fmt.Sprintf("{%q, ", sub)) {
			t.Errorf("%s: there is no %s", p.Name, p.test)
		}
		for _, a := range p.arguments {
			if name, isFlag := strings.CutPrefix(a, "-"); isFlag && !regexp.MustCompile(`flag\.\w+\("`+name+`"`).Match(all) {
				t.Errorf("%s: there is no flag -%s", p.Name, name)
			}
		}
	}
}
