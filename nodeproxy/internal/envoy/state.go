package envoy

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"time"
)

// State is what the supervisor tells the agent of its Envoy.
type State struct {
	// Generation numbers Envoy processes that may run side by side; a restart keeps it.
	Generation uint32 `json:"generation"`
	// Pod is the uid of the pod that the supervisor runs in.
	Pod string `json:"pod,omitempty"`
	// PID of the process, 0 while none runs.
	PID int `json:"pid"`
	// Cgroup is Envoy's v2 cgroup below the cgroup root, "/…"; it is there whenever PID is not 0.
	Cgroup string `json:"cgroup"`
	// UID that Envoy runs as.
	UID int `json:"uid"`
	// Live: Envoy has its first configuration and serves.
	Live bool `json:"live"`
	// Restarts since the supervisor started.
	Restarts uint32 `json:"restarts"`
	// Exit says how the process before this one ended.
	Exit string `json:"exit,omitempty"`
}

// board holds the newest state and its readers.
type board struct {
	mu      sync.Mutex
	state   State
	changed chan struct{}
}

func newBoard() *board { return &board{changed: make(chan struct{})} }

func (b *board) set(change func(*State)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change(&b.state)
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *board) get() (State, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.state, b.changed
}

// serve tells every reader of a Unix socket the state, one JSON object a line, at once and at each change.
func (b *board) serve(ctx context.Context, l net.Listener) {
	context.AfterFunc(ctx, func() { _ = l.Close() })
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			for out := json.NewEncoder(c); ; {
				s, changed := b.get()
				if err := out.Encode(s); err != nil {
					return
				}
				select {
				case <-ctx.Done():
					return
				case <-changed:
				}
			}
		}()
	}
}

// Watch gives the state of a generation's supervisor at once and at each change, and keeps trying while there is none, which is
// given as the zero State. It ends with ctx.
func Watch(ctx context.Context, runDir string, generation uint32, give func(State)) {
	for ctx.Err() == nil {
		if err := follow(ctx, folderOf(runDir, generation), give); err != nil && ctx.Err() == nil {
			give(State{})
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func follow(ctx context.Context, folder string, give func(State)) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(folder, supervisorSocket))
	if err != nil {
		return fmt.Errorf("dial supervisor: %w", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	lines := bufio.NewScanner(c)
	for lines.Scan() {
		var s State
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			return fmt.Errorf("read supervisor's state: %w", err)
		}
		give(s)
	}
	return fmt.Errorf("supervisor ended: %w", lines.Err())
}

// ask reads a supervisor's state once.
func ask(folder string) (State, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var first State
	err := follow(ctx, folder, func(s State) { first = s; cancel() })
	if first.Cgroup != "" {
		return first, nil
	}
	return first, err
}
