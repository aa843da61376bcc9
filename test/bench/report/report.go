// Package report holds what the benchmark of the data path measured, and makes summary, page and chart of it. All of it is
// pure: the same runs give the same bytes.
package report

import "time"

// Report is the whole of a benchmark, as its JSON has it.
type Report struct {
	Machine  Machine  `json:"machine"`
	Settings Settings `json:"settings"`
	// Runs are the raw measurements in the order in which they were made.
	Runs []Run `json:"runs,omitempty"`
	// Processes are those that carry traffic or serve those that do, with their memory after the runs.
	Processes []Process `json:"processes,omitempty"`
	// Figures stand alone: they are not compared in pairs.
	Figures []Figure `json:"figures,omitempty"`
	// Summary is what Summarise makes of all that.
	Summary Summary `json:"summary"`
}

// Machine is where it ran.
type Machine struct {
	Started    time.Time  `json:"started"`
	Processors int        `json:"processors"`
	Model      string     `json:"model"`
	Arch       string     `json:"arch"`
	Kernel     string     `json:"kernel"`
	MemoryMiB  uint64     `json:"memoryMiB"`
	Load       [3]float64 `json:"load"`
	Envoy      string     `json:"envoy"`
	Fortio     string     `json:"fortio"`
	Revision   string     `json:"revision"`
}

// Settings are how it ran.
type Settings struct {
	Pairs   int     `json:"pairs"`
	Seconds float64 `json:"seconds"`
	// Workers are the threads of each Envoy.
	Workers int `json:"workers"`
}

// Run is one workload on one way, once.
type Run struct {
	Workload  string `json:"workload"`
	Placement string `json:"placement"`
	Variant   string `json:"variant"`
	// Pair is the round; runs of one workload, placement and pair are compared. Place is its turn in that.
	Pair    int     `json:"pair"`
	Place   int     `json:"place"`
	Seconds float64 `json:"seconds"`
	// Operations done: requests, calls, echoes or MiB.
	Operations float64 `json:"operations"`
	// P50, P90 and P99 are milliseconds; 0 where an operation has no beginning and end.
	P50 float64 `json:"p50,omitempty"`
	P90 float64 `json:"p90,omitempty"`
	P99 float64 `json:"p99,omitempty"`
	// Processor time in microseconds, user and system: of all Envoys (and their brokers) on the way, of the app, of the
	// generator, and whatever the machine did in all.
	Proxies   float64 `json:"proxies"`
	App       float64 `json:"app"`
	Generator float64 `json:"generator"`
	Whole     float64 `json:"whole"`
}

// Rate is operations per second.
func (r Run) Rate() float64 { return r.Operations / r.Seconds }

// Process is one process and its memory in KiB.
type Process struct {
	// Of is "weft" or "sidecars"; Node the node's number.
	Of   string `json:"of"`
	Name string `json:"name"`
	Node int    `json:"node"`
	RSS  uint64 `json:"rss"`
	PSS  uint64 `json:"pss"`
}

// Figure is one number with its goal.
type Figure struct {
	Name  string  `json:"name"`
	Unit  string  `json:"unit"`
	Value float64 `json:"value"`
	// AtMost is the goal; 0: none.
	AtMost float64 `json:"atMost,omitempty"`
	// How it was taken.
	How string `json:"how,omitempty"`
}

// Workload is a kind of traffic.
type Workload struct {
	Name, Title string
	// Unit of an operation.
	Unit string
	// Fixed: the rate is given, so that it is not compared. Bytes: HTTP is not parsed by anybody.
	Fixed, Bytes bool
}

// Variant is a way from caller to callee.
type Variant struct{ Name, Title string }

// Names of variants.
const (
	Weft       = "weft"
	WeftL7     = "weft-l7"
	Sidecars   = "sidecars"
	SidecarsL7 = "sidecars-l7"
	None       = "none"
)

// Variants in the order in which they are shown.
var Variants = []Variant{
	{None, "no mesh"}, {Sidecars, "two sidecars"}, {Weft, "weft"}, {WeftL7, "weft, L7 policy"}, {SidecarsL7, "two sidecars, L7 policy"},
}

// Workloads in the order in which they run.
var Workloads = []Workload{
	{Name: "http-8", Title: "HTTP/1.1, 1 KB, 8 connections", Unit: "requests"},
	{Name: "http-64", Title: "HTTP/1.1, 1 KB, 64 connections", Unit: "requests"},
	{Name: "http-1000rps", Title: "HTTP/1.1, 1 KB, 1,000 requests/s", Unit: "requests", Fixed: true},
	{Name: "grpc", Title: "gRPC unary, 8 connections", Unit: "calls"},
	{Name: "http-new", Title: "a new connection per request", Unit: "requests"},
	{Name: "tcp-echo", Title: "TCP, 64-byte echo, 8 connections", Unit: "echoes", Bytes: true},
	{Name: "tcp-bulk", Title: "TCP, one way, 4 connections", Unit: "MiB", Bytes: true},
}

// Placements of caller and callee.
var Placements = []struct{ Name, Title string }{{"same", "one node"}, {"cross", "across nodes"}}

// Comparisons that the summary makes: a variant over its base.
var Comparisons = [][2]string{{Weft, Sidecars}, {WeftL7, SidecarsL7}, {Weft, None}, {WeftL7, None}, {Sidecars, None}, {SidecarsL7, None}}

func title(variant string) string {
	for _, v := range Variants {
		if v.Name == variant {
			return v.Title
		}
	}
	return variant
}
