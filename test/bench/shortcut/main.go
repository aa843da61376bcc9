// Command shortcut measures what the short circuit saves: the CPU time per request of real Envoys, of their clients and of
// the servers, without Kubernetes (package lab), with it on and off in turn. It prints the median of the ratios of
// neighbouring runs with minimum and maximum, and writes them as JSON.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/test/datapath/lab"
)

const (
	port    = 8080
	callers = 8
	warmUp  = 500 // requests before each run
)

var (
	root = flag.String("root", ".", "the clone")
	runs = flag.Int("runs", 9, "pairs of runs")
	size = flag.Int("size", 1024, "bytes of a response")
	many = flag.Int64("requests", 8000, "requests of a run")
	out  = flag.String("out", "", "file for the results as JSON")
)

func main() {
	flag.Parse()
	os.Exit(lab.Enter(func() int {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
		defer cancel()
		if err := run(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			return 1
		}
		return 0
	}))
}

// server keeps the connections that it has, to close them between two runs: what was made while the short circuit was off
// stays on TCP.
type server struct {
	mu   sync.Mutex
	open map[net.Conn]bool
}

func (s *server) track(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state {
	case http.StateNew:
		s.open[c] = true
	case http.StateClosed, http.StateHijacked:
		delete(s.open, c)
	}
}

func (s *server) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		c.Close()
	}
}

// side is one node placement: where the server of a service runs.
type side struct {
	name   string
	server *server
}

// figure is what one placement showed: µs of CPU per request, and on/off of each pair.
type figure struct {
	Placement string    `json:"placement"`
	Bytes     int       `json:"bytes"`
	Off       float64   `json:"offMicrosecondsPerRequest"`
	On        float64   `json:"onMicrosecondsPerRequest"`
	Ratio     float64   `json:"ratio"`
	Min       float64   `json:"min"`
	Max       float64   `json:"max"`
	Ratios    []float64 `json:"ratios"`
}

func run(ctx context.Context) (err error) {
	ports := []lab.PortSpec{{Port: 80, Target: port, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP1}}
	l, err := lab.New(ctx, lab.Spec{Module: *root,
		Pods: []lab.PodSpec{{Name: "client", Account: "client", Node: 0, Last: 2}, {Name: "near", Account: "server", Node: 0, Last: 3},
			{Name: "far", Account: "server", Node: 1, Last: 4}},
		Services: []lab.ServiceSpec{{Name: "near", Last: 1, Ports: ports, Pods: []string{"near"}}, {Name: "far", Last: 2, Ports: ports, Pods: []string{"far"}}},
	})
	defer func() { err = errors.Join(err, l.Close()) }()
	if err != nil {
		return err
	}
	sides := []side{{name: "near"}, {name: "far"}}
	for i := range sides {
		if sides[i].server, err = serve(l.Pod(sides[i].name)); err != nil {
			return err
		}
	}
	for _, name := range []string{"client", "near", "far"} {
		l.Pod(name).Policy = &meshv1.InboundPolicy{DefaultPort: &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_STRICT}}
	}
	if err := l.Enrol(ctx); err != nil {
		return err
	}
	var figures []figure
	for _, s := range sides {
		f, err := measure(l, s)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		fmt.Printf("%-5s %d bytes: %.0f µs of CPU per request on TCP, %.0f by the short circuit: %.2f (%.2f–%.2f) in %d pairs\n",
			f.Placement, f.Bytes, f.Off, f.On, f.Ratio, f.Min, f.Max, len(f.Ratios))
		figures = append(figures, f)
	}
	return write(figures)
}

func serve(pod *lab.Pod) (*server, error) {
	listener, err := pod.Listen(port)
	if err != nil {
		return nil, err
	}
	s := &server{open: map[net.Conn]bool{}}
	body := strings.Repeat("x", *size)
	web := &http.Server{ConnState: s.track, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) })}
	go web.Serve(listener)
	return s, nil
}

// measure runs pairs, the order within a pair changing, so that what drifts meanwhile weighs on both.
func measure(l *lab.Lab, s side) (figure, error) {
	f := figure{Placement: s.name, Bytes: *size}
	var all [2][]float64
	for i := range *runs {
		var cost [2]float64
		for _, on := range []int{i % 2, 1 - i%2} {
			moved := redirected(l)
			var err error
			if cost[on], err = once(l, s, on == 1); err != nil {
				return f, err
			}
			if took := redirected(l) - moved; (took > 0) != (on == 1) {
				return f, fmt.Errorf("short circuit %v, and %d bytes went past TCP", on == 1, took)
			}
			all[on] = append(all[on], cost[on])
		}
		f.Ratios = append(f.Ratios, cost[1]/cost[0])
	}
	f.Off, f.On, f.Ratio = median(all[0]), median(all[1]), median(f.Ratios)
	f.Min, f.Max = slices.Min(f.Ratios), slices.Max(f.Ratios)
	return f, nil
}

func redirected(l *lab.Lab) (n uint64) {
	for node := range 2 {
		if counters, err := l.Kernel(node); err == nil {
			n += counters["shortcut_redirected_bytes"]
		}
	}
	return n
}

// once returns the CPU time of a request, in µs.
func once(l *lab.Lab, s side, on bool) (float64, error) {
	if err := l.Shortcut(on); err != nil {
		return 0, err
	}
	s.server.drop()
	pod := l.Pod("client")
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: callers, DialContext: func(ctx context.Context, _, to string) (net.Conn, error) {
		return pod.Dial(ctx, to)
	}}}
	defer client.CloseIdleConnections()
	url := "http://" + l.Address(s.name, 80, false) + "/"
	if _, err := ask(client, url, warmUp); err != nil {
		// The connections that the server dropped: one request each may meet its end.
		if _, err := ask(client, url, warmUp); err != nil {
			return 0, err
		}
	}
	before, err := spent(l)
	if err != nil {
		return 0, err
	}
	n, err := ask(client, url, *many)
	if err != nil {
		return 0, err
	}
	after, err := spent(l)
	return (after - before).Seconds() * 1e6 / float64(n), err
}

func ask(client *http.Client, url string, n int64) (int64, error) {
	var left atomic.Int64
	left.Store(n)
	var wait sync.WaitGroup
	errs := make(chan error, callers)
	for range callers {
		wait.Go(func() {
			for left.Add(-1) >= 0 {
				response, err := client.Get(url)
				if err == nil {
					_, err = io.Copy(io.Discard, response.Body)
					response.Body.Close()
				}
				if err == nil && response.StatusCode != http.StatusOK {
					err = errors.New(response.Status)
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wait.Wait()
	close(errs)
	return n, <-errs
}

// spent is the CPU time of the Envoys and of this process, which holds the client and the servers.
func spent(l *lab.Lab) (time.Duration, error) {
	var own unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &own); err != nil {
		return 0, err
	}
	sum := time.Duration(own.Utime.Nano() + own.Stime.Nano())
	for node := range 2 {
		used, err := l.CPU(node)
		if err != nil {
			return 0, err
		}
		sum += used
	}
	return sum, nil
}

func median(l []float64) float64 {
	l = slices.Sorted(slices.Values(l))
	return l[len(l)/2]
}

func write(figures []figure) error {
	if *out == "" {
		return nil
	}
	raw, err := json.MarshalIndent(map[string]any{"machine": fmt.Sprintf("%d processors, %s", runtime.NumCPU(), runtime.GOARCH), "results": figures}, "", "  ")
	if err == nil {
		err = os.MkdirAll(filepath.Dir(*out), 0o755)
	}
	if err == nil {
		err = os.WriteFile(*out, append(raw, '\n'), 0o644)
	}
	return err
}
