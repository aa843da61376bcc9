package envoy

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// TestLogIsReadToItsEnd: a line of any length is cut, and what follows it is read, or Envoy would block on its log.
func TestLogIsReadToItsEnd(t *testing.T) {
	var log bytes.Buffer
	s := &Supervisor{config: Config{Log: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))}}
	r, w := io.Pipe()
	read := make(chan struct{})
	go func() { defer close(read); s.forward(r) }()
	wrote := make(chan error, 1)
	go func() {
		_, err := io.WriteString(w, "info main before\n\nerror config "+strings.Repeat("x", 3<<20)+"\nno level\ndebug upstream at the end")
		_ = w.Close()
		wrote <- err
	}()
	select {
	case err := <-wrote:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("nobody reads Envoy's log any more")
	}
	<-read
	type line struct{ Level, Logger, Text string }
	var got []line
	for l := range strings.Lines(log.String()) {
		var one line
		if err := json.Unmarshal([]byte(l), &one); err != nil {
			t.Fatal(err)
		}
		if len(one.Text) > longestLine {
			t.Errorf("a line of %d bytes is kept whole", len(one.Text))
		}
		one.Text = one.Text[:min(len(one.Text), 10)]
		got = append(got, one)
	}
	want := []line{{"INFO", "main", "before"}, {"ERROR", "config", "xxxxxxxxxx"}, {"WARN", "", "no level"}, {"DEBUG", "upstream", "at the end"}}
	if len(got) != len(want) {
		t.Fatalf("%d lines: %v", len(got), got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("line %d is %v, want %v", i, got[i], want[i])
		}
	}
}
