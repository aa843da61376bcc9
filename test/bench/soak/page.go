package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/weftmesh/weft/test/bench/report"
)

// part is the long form of a test.
type part struct {
	Name, Title string
	test        string
	arguments   []string
	takes       time.Duration
	// every: each line that the test logs belongs to the page, not just its last.
	every bool
}

// parts in the order in which they run.
var parts = []part{
	{Name: "chaos", Title: "random kills of every process every 10 to 30 s, for 30 minutes", test: "TestFailures/Chaos", arguments: []string{"-chaos", "30m"}, takes: 32 * time.Minute, every: true},
	{Name: "envoy-kills", Title: "Envoy killed 100 times", test: "TestFailures/EnvoyKilledUnderLoad", arguments: []string{"-crashes", "100"}, takes: 15 * time.Minute},
	{Name: "agent-kills", Title: "an agent killed 100 times", test: "TestFailures/AgentKilled", arguments: []string{"-kills", "100"}, takes: 15 * time.Minute},
	{Name: "upgrades", Title: "50 upgrades by helm, the first from the version of Envoy before", test: "TestUpgrade", arguments: []string{"-upgrades", "50", "-other"}, takes: 50 * time.Minute, every: true},
	{Name: "away", Title: "all controllers away for 10 minutes while pods and agents restart", test: "TestFailures/ControllersAwayForLong", arguments: []string{"-away", "10m"}, takes: 11 * time.Minute},
	{Name: "pods", Title: "200 pods that come and go", test: "TestPodsComeAndGo", arguments: []string{"-pods", "200"}, takes: 6 * time.Minute, every: true},
	{Name: "rollouts", Title: "10 rolling restarts of each of five Deployments", test: "TestRollingRestarts", arguments: []string{"-rollouts", "10"}, takes: 15 * time.Minute},
	{Name: "cycles", Title: "600 enrolments and withdrawals", test: "TestCycles", arguments: []string{"-cycles", "600"}, takes: 50 * time.Minute},
	{Name: "policies", Title: "300 policy changes", test: "TestPolicyChanges", arguments: []string{"-changes", "300"}, takes: 15 * time.Minute},
	{Name: "updates", Title: "10,000 updates of one policy", test: "TestHammer", arguments: []string{"-updates", "10000"}, takes: 10 * time.Minute},
	{Name: "rotations", Title: "SVIDs renewed every half minute for 10 minutes, and five changes of root", test: "TestRotations", arguments: []string{"-rotate"}, takes: 18 * time.Minute, every: true},
	{Name: "root", Title: "a change of root, with leaders killed under way", test: "TestRootRotation", arguments: []string{"-rotate"}, takes: 30 * time.Minute, every: true},
	{Name: "hostile", Title: "what hostile pods try (docs/HOSTILE.md)", test: "TestHostile", arguments: []string{"-hostile", "full"}, takes: 3 * time.Minute, every: true},
	{Name: "hostile-load", Title: "every port scanned, 20,000 connections beside others' traffic, and what else others would feel", test: "TestHostileAlone", arguments: []string{"-hostile", "full"}, takes: 20 * time.Minute, every: true},
}

// result is what a part saw when it ran last.
type result struct {
	Passed  bool           `json:"passed"`
	Seconds float64        `json:"seconds"`
	Machine report.Machine `json:"machine"`
	// Seen are the lines that the test logged.
	Seen []string `json:"seen"`
}

func (r result) took() time.Duration { return time.Duration(r.Seconds) * time.Second }

func (r result) verdict() string {
	if r.Passed {
		return "passed"
	}
	return "**failed**"
}

// last is what the test said in the end.
func (r result) last() string {
	if len(r.Seen) == 0 {
		return "nothing was logged"
	}
	return r.Seen[len(r.Seen)-1]
}

// page makes soak.md: what did not hold, or was never run, comes first.
func page(seen map[string]result) string {
	var b strings.Builder
	b.WriteString(headline(seen))
	b.WriteString("\n\n# Long runs\n\nMade by `make soak` from `soak.json`; do not edit. `make soak SOAK=\"chaos upgrades\"` runs some parts; each stays here as it ran last.\n" +
		"All run with load on the shop or the tests' own pods, on the two nodes of the embedded Kubernetes, which share the machine with everything else.\n\n")
	b.WriteString("| part | what | | what was seen | took | when | weft at | load average before |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n")
	for _, p := range parts {
		r, ran := seen[p.Name]
		if !ran {
			fmt.Fprintf(&b, "| %s | %s | not run | | | | | |\n", p.Name, p.Title)
			continue
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %v | %s | %s | %.1f |\n", p.Name, p.Title, r.verdict(), cell(r.last()), r.took(),
			r.Machine.Started.UTC().Format("2006-01-02 15:04 UTC"), r.Machine.Revision, r.Machine.Load[0])
	}
	for _, p := range parts {
		r, ran := seen[p.Name]
		if !ran || !(p.every || !r.Passed) || len(r.Seen) < 2 {
			continue
		}
		fmt.Fprintf(&b, "\n## %s\n\n```\n%s\n```\n", p.Title, strings.Join(r.Seen, "\n"))
	}
	return b.String()
}

func headline(seen map[string]result) string {
	var failed, missing []string
	for _, p := range parts {
		if r, ran := seen[p.Name]; !ran {
			missing = append(missing, p.Name)
		} else if !r.Passed {
			failed = append(failed, p.Name)
		}
	}
	say := func(what string, names []string) string {
		if len(names) == 0 {
			return what + ": none."
		}
		return what + ": " + strings.Join(names, ", ") + "."
	}
	return say("Failed when they ran last", failed) + " " + say("Never run", missing)
}

// cell is a text within a table.
func cell(text string) string { return strings.ReplaceAll(text, "|", "\\|") }
