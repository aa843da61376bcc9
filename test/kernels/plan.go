package kernels

// Where a machine finds what it needs.
const (
	planPath    = "/plan.json"
	modulesPath = "/modules"
	testsPath   = "/tests"
	// ReportDevice is the serial port that carries the tests' output.
	ReportDevice = "/dev/ttyS1"
	// PlanPath is the machine's plan, as JSON.
	PlanPath = planPath
)

// Plan is what a machine does from its start to its end.
type Plan struct {
	// Modules are paths in the machine, in the order to load them.
	Modules []string
	Runs    []Run
}

// Run is one test binary's turn.
type Run struct {
	// Name stands for it in reports, "netns".
	Name string
	// Folder is the working directory, a path in the machine.
	Folder string
	// Command is the program, a path in the machine, and its arguments.
	Command []string
}

// The lines on the report device that are not a test's: "#weft# begin NAME", "#weft# end NAME CODE" with the exit code,
// "#weft# broken TEXT" when the machine cannot go on, and "#weft# done".
const (
	marker       = "#weft# "
	MarkerBegin  = marker + "begin "
	MarkerEnd    = marker + "end "
	MarkerBroken = marker + "broken "
	MarkerDone   = marker + "done"
)
