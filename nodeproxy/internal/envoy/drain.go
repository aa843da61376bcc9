package envoy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/weftmesh/weft/api/names"
)

const (
	// drainPoll is how often a draining Envoy is looked at.
	drainPoll = time.Second
	// drainIdle is how long it must have shown no connection: its own count is as old as its last flush of statistics, 5 s at most.
	drainIdle = 6 * time.Second
	// drainAlone is how long an Envoy without a successor drains at most: the connections that come meanwhile have no other.
	drainAlone = 30 * time.Second
)

// admin is a client of Envoy's admin socket.
func (s *Supervisor) admin() *http.Client {
	path := filepath.Join(s.envoyFolder(), adminSocket)
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
}

func (s *Supervisor) awaitReady(ctx context.Context, pid int) {
	client := s.admin()
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		r, err := client.Get("http://envoy/ready")
		if err != nil {
			continue
		}
		_ = r.Body.Close()
		if r.StatusCode == http.StatusOK {
			s.config.Log.Info("Envoy is live")
			s.board.set(func(st *State) {
				if st.PID == pid { // else it has died since
					st.Live = true
				}
			})
			return
		}
	}
}

// drain lets connections end: HTTP ones get a hint to go with each response, new ones are still served, for pods that are
// captured may have no other way. It ends when none is left; after DrainTimeout, or sooner without a successor, there is no more
// patience.
func (s *Supervisor) drain(cmd *exec.Cmd, ended <-chan struct{}) {
	s.config.Log.Info("Envoy drains", "timeout", s.config.DrainTimeout)
	r, err := s.admin().Post("http://envoy/healthcheck/fail", "", nil)
	if err != nil {
		s.config.Log.Warn("Envoy's connections are not told to go", "error", err)
	} else {
		_ = r.Body.Close()
	}
	if left := s.awaitIdle(ended); left != 0 {
		s.config.Log.Warn("Envoy ends with connections open", "count", left)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.config.Log.Warn("stop Envoy", "error", err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		_ = cmd.Process.Kill()
	}
}

// awaitIdle waits until Envoy has had no connection for drainIdle, has ended, or may drain no longer; left is how many it has then.
func (s *Supervisor) awaitIdle(ended <-chan struct{}) (left int) {
	began := time.Now()
	busy := began
	for {
		select {
		case <-ended:
			return 0
		case <-time.After(min(drainPoll, s.config.DrainTimeout)):
		}
		left, err := s.connections()
		now := time.Now()
		if left > 0 || err != nil {
			busy = now
		}
		limit := s.config.DrainTimeout
		if !s.succeeded() {
			limit = min(limit, drainAlone)
		}
		if now.Sub(busy) >= drainIdle || now.Sub(began) >= limit {
			return left
		}
	}
}

// connections is how many clients Envoy has, as of its last flush of statistics.
func (s *Supervisor) connections() (int, error) {
	r, err := s.admin().Get("http://envoy/stats?filter=^server.total_connections$")
	if err != nil {
		return 0, fmt.Errorf("count Envoy's connections: %w", err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(io.LimitReader(r.Body, 4096))
	if err != nil {
		return 0, fmt.Errorf("count Envoy's connections: %w", err)
	}
	_, count, _ := strings.Cut(strings.TrimSpace(string(text)), ": ")
	n, err := strconv.Atoi(count)
	if err != nil {
		return 0, fmt.Errorf("count Envoy's connections: read %q: %w", text, err)
	}
	return n, nil
}

// succeeded tells whether another Envoy of the node serves.
func (s *Supervisor) succeeded() bool {
	for generation := range uint32(names.Generations) {
		if generation == s.generation {
			continue
		}
		if st, err := ask(folderOf(s.config.RunDir, generation)); err == nil && st.Live {
			return true
		}
	}
	return false
}
