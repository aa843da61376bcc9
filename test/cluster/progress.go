package cluster

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// step is one line of progress.
type step struct {
	Number, Of int
	Name       string
	Expected   time.Duration
	// Log is where the step writes; may be empty.
	Log string
}

// progress runs work and reports on standard error: on a terminal one line that counts the seconds, elsewhere a line
// at the start, one each minute and one at the end.
func progress(s step, work func() error) error {
	started := time.Now()
	_, err := unix.IoctlGetTermios(int(os.Stderr.Fd()), unix.TCGETS)
	terminal := err == nil
	head := fmt.Sprintf("[%d/%d] %s", s.Number, s.Of, s.Name)
	rest := fmt.Sprintf("expected %s", s.Expected)
	if s.Log != "" {
		rest += ", log " + s.Log
	}
	interval := time.Minute
	if terminal {
		interval = time.Second
	}
	show := func() {
		line := fmt.Sprintf("%s: %s, %s", head, time.Since(started).Round(time.Second), rest)
		if terminal {
			fmt.Fprintf(os.Stderr, "\r\033[K%s", line)
		} else {
			fmt.Fprintln(os.Stderr, line)
		}
	}
	show()
	result := make(chan error, 1)
	go func() { result <- work() }()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			show()
		case err := <-result:
			if terminal {
				fmt.Fprint(os.Stderr, "\r\033[K")
			}
			word := "done"
			if err != nil {
				word = "failed"
			}
			fmt.Fprintf(os.Stderr, "%s: %s after %s\n", head, word, time.Since(started).Round(100*time.Millisecond))
			return err
		}
	}
}
