// Package attack makes what docs/HOSTILE.md lists, from inside a pod: the program `load attack` of the test image. It says
// what happened and judges nothing.
package attack

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Attempt is one try.
type Attempt struct {
	ID string `json:"id"`
	// Kind names what is done: a key of kinds.
	Kind string `json:"kind"`
	// To and From are address:port; From is bound to, or forged.
	To   string `json:"to,omitempty"`
	From string `json:"from,omitempty"`
	// Mapped dials IPv4 by an IPv6 socket.
	Mapped bool `json:"mapped,omitempty"`
	// Options of the socket, keys of options, some with a value: "device=lo".
	Options []string `json:"options,omitempty"`
	TLS     *TLS     `json:"tls,omitempty"`
	// Send is sent once connected, or looked for by a sniffer.
	Send []byte `json:"send,omitempty"`
	// Pieces sends byte by byte.
	Pieces bool `json:"pieces,omitempty"`
	// Millis limit the whole, or are how long it lasts. 0: 20 s.
	Millis int `json:"millis,omitempty"`
	// Count of connections, of packets.
	Count int `json:"count,omitempty"`
	// First and Last port of a scan or of binds.
	First int `json:"first,omitempty"`
	Last  int `json:"last,omitempty"`
	// Segment is what a forged packet says beyond addresses and payload.
	Segment *Segment `json:"segment,omitempty"`
	// Victims are told that the addresses in Claims are the attacker's.
	Victims []string `json:"victims,omitempty"`
	Claims  []string `json:"claims,omitempty"`
	// Inner are made in namespaces of the attacker's own.
	Inner []Attempt `json:"inner,omitempty"`
}

// Segment is the head of a forged TCP packet.
type Segment struct {
	Seq   uint32 `json:"seq"`
	Ack   uint32 `json:"ack"`
	Flags uint8  `json:"flags"`
}

// TCP flags.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// Outcome is what became of an attempt.
type Outcome struct {
	ID string `json:"id"`
	// Stage is how far it came: where the error arose, or "done".
	Stage string `json:"stage"`
	// Errno names a system call's error; Error is any error's text.
	Errno string `json:"errno,omitempty"`
	Error string `json:"error,omitempty"`
	// Got is the first of what came back, inside TLS if the handshake ended well.
	Got []byte `json:"got,omitempty"`
	// Local is the attacker's end.
	Local string `json:"local,omitempty"`
	Took  int    `json:"took"`
	// Counts of what is done many times, by result.
	Counts map[string]int `json:"counts,omitempty"`
	// Heard are the first bytes of connections that came to the attacker.
	Heard [][]byte  `json:"heard,omitempty"`
	Inner []Outcome `json:"inner,omitempty"`
}

func (a Attempt) limit() time.Duration {
	if a.Millis == 0 {
		return 20 * time.Second
	}
	return time.Duration(a.Millis) * time.Millisecond
}

// failure is an error and where it arose.
type failure struct {
	stage string
	err   error
}

func (f failure) Error() string { return f.stage + ": " + f.err.Error() }
func (f failure) Unwrap() error { return f.err }

func at(stage string, err error) error {
	if err == nil {
		return nil
	}
	return failure{stage, err}
}

// errno names the system call's error inside an error; "timeout" for a time limit, "EOF" for an end.
func errno(err error) string {
	var number syscall.Errno
	var late net.Error
	switch {
	case err == nil:
		return ""
	case errors.As(err, &number):
		return unix.ErrnoName(number)
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &late) && late.Timeout():
		return "timeout"
	case errors.Is(err, io.EOF):
		return "EOF"
	}
	return ""
}

// kinds of attempts.
var kinds map[string]func(Attempt, *Outcome) error

func init() {
	kinds = map[string]func(Attempt, *Outcome) error{
		"dial": dial, "hold": hold, "scan": scan, "bind": bind, "original": original,
		"inject": inject, "stack": speak, "claim": claim, "sniff": sniff,
		"nest": nest, "cgroup": joinCgroups, "unix": unixSockets,
	}
}

// Run makes one attempt.
func (a Attempt) Run() Outcome {
	o := Outcome{ID: a.ID, Stage: "done"}
	began := time.Now()
	do, known := kinds[a.Kind]
	err := fmt.Errorf("there is no kind %q", a.Kind)
	if known {
		err = do(a, &o)
	}
	o.Took = int(time.Since(began).Milliseconds())
	var f failure
	if errors.As(err, &f) {
		o.Stage = f.stage
	}
	if err != nil {
		o.Errno, o.Error = errno(err), err.Error()
		if o.Stage == "done" {
			o.Stage = "start"
		}
	}
	return o
}

// Main reads a JSON list of attempts, makes them side by side, as many at a time as the list allows, and writes the
// list of outcomes.
func Main(in io.Reader, out io.Writer, atOnce int) error {
	var attempts []Attempt
	if err := json.NewDecoder(in).Decode(&attempts); err != nil {
		return fmt.Errorf("read attempts: %w", err)
	}
	outcomes := make([]Outcome, len(attempts))
	room := make(chan struct{}, max(atOnce, 1))
	var wait sync.WaitGroup
	for i, a := range attempts {
		room <- struct{}{}
		wait.Go(func() {
			outcomes[i] = a.Run()
			<-room
		})
	}
	wait.Wait()
	if err := json.NewEncoder(out).Encode(outcomes); err != nil {
		return fmt.Errorf("write outcomes: %w", err)
	}
	return nil
}
