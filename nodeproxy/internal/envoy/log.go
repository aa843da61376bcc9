package envoy

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"strings"
)

// longestLine is what is kept of a line of Envoy's log.
const longestLine = 64 << 10

// forward writes Envoy's log, level and logger apart. It reads until Envoy ends, whatever the lines are like: Envoy would
// block on a pipe that nobody empties.
func (s *Supervisor) forward(out io.Reader) {
	levels := map[string]slog.Level{"trace": slog.LevelDebug, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warning": slog.LevelWarn, "error": slog.LevelError, "critical": slog.LevelError}
	r := bufio.NewReaderSize(out, longestLine)
	for {
		raw, long, err := r.ReadLine()
		line := string(raw)
		for long && err == nil { // the rest is not kept
			_, long, err = r.ReadLine()
		}
		f := strings.SplitN(line, " ", 3)
		level, known := levels[f[0]]
		switch {
		case line == "":
		case known && len(f) == 3:
			s.config.Log.Log(context.Background(), level, "envoy", "logger", f[1], "text", f[2])
		default:
			s.config.Log.Warn("envoy", "text", line)
		}
		if err != nil {
			return
		}
	}
}
