package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/weftmesh/weft/test/bench/report"
	"github.com/weftmesh/weft/test/contract/proxy"
	"github.com/weftmesh/weft/test/datapath/lab"
)

// commands of the workloads, but for the way's address and the length of the run.
var commands = map[string]func(o options, w way, length string) []string{
	"http-8": func(o options, w way, t string) []string {
		return fortio(o, t, "-qps", "0", "-c", "8", "http://"+w.http+"/")
	},
	"http-64": func(o options, w way, t string) []string {
		return fortio(o, t, "-qps", "0", "-c", "64", "http://"+w.http+"/")
	},
	"http-1000rps": func(o options, w way, t string) []string {
		return fortio(o, t, "-qps", "1000", "-uniform", "-c", "8", "http://"+w.http+"/")
	},
	"http-new": func(o options, w way, t string) []string {
		return fortio(o, t, "-qps", "0", "-c", "8", "-keepalive=false", "http://"+w.http+"/")
	},
	"grpc": func(o options, w way, t string) []string {
		return fortio(o, t, "-qps", "0", "-c", "8", "-grpc", "-ping", "-payload", "sixty-four bytes that stand for what a small message would have.", w.grpc)
	},
	"tcp-echo": func(o options, w way, t string) []string {
		return fortio(o, t, "-qps", "0", "-c", "8", "-payload", "sixty-four bytes that stand for what a small message would have.", "tcp://"+w.echo)
	},
	"tcp-bulk": func(o options, w way, t string) []string { return []string{"/proc/self/exe", "send", w.sink, "4", t} },
}

func fortio(o options, length string, more ...string) []string {
	return append([]string{o.fortio, "load", "-quiet", "-json", "-", "-t", length + "s", "-r", "0.00001", "-p", "50,90,99"}, more...)
}

// traffic runs all workloads on all ways.
func traffic(ctx context.Context, o options) (runs []report.Run, processes []report.Process, err error) {
	fmt.Println("two nodes, nine pods, two Envoys of weft with their supervisors, three sidecars")
	w, err := start(ctx, o)
	defer func() { err = errors.Join(err, w.stop()) }()
	if err != nil {
		for node := range w.Nodes() {
			err = fmt.Errorf("%w\nnode %d: %s", err, node, tail(safeLog(w, node)))
		}
		return nil, nil, err
	}
	type group struct {
		workload report.Workload
		ways     []way
	}
	var groups []group
	all := 0
	for _, p := range report.Placements {
		for _, work := range report.Workloads {
			if !o.wants("traffic", work.Name, p.Name) {
				continue
			}
			g := group{workload: work}
			for _, k := range kinds {
				if work.Bytes && k.judged {
					continue
				}
				i := slices.IndexFunc(w.all, func(one way) bool { return one.variant == k.variant && one.placement == p.Name })
				g.ways = append(g.ways, w.all[i])
			}
			groups = append(groups, g)
			all += len(g.ways) * o.pairs
		}
	}
	begun := time.Now()
	for _, g := range groups {
		for _, one := range g.ways { // pools and caches are filled before anything counts
			if _, err := w.once(ctx, g.workload, one, min(0.3, o.seconds)); err != nil {
				return nil, nil, err
			}
		}
		for pair := range o.pairs {
			order := slices.Clone(g.ways)
			if pair%2 == 1 {
				slices.Reverse(order)
			}
			for place, one := range order {
				r, err := w.once(ctx, g.workload, one, o.seconds)
				if err != nil {
					return nil, nil, err
				}
				r.Pair, r.Place = pair, place
				runs = append(runs, r)
				left := time.Duration(float64(time.Since(begun)) / float64(len(runs)) * float64(all-len(runs)))
				fmt.Printf("[%d/%d, %s left] %-12s %-5s pair %d %-11s %8.0f/s  proxies %6.1f µs  machine %6.1f µs  p50 %.2f ms\n", len(runs), all, left.Round(time.Second),
					g.workload.Name, one.placement, pair+1, one.variant, r.Rate(), r.Proxies/r.Operations, r.Whole/r.Operations, r.P50)
			}
		}
	}
	processes, err = w.processes()
	return runs, processes, err
}

func safeLog(w *ways, node int) (log string) {
	defer func() {
		if recover() != nil { // the lab did not come that far
			log = ""
		}
	}()
	return w.Log(node)
}

func tail(s string) string { return s[max(0, len(s)-2000):] }

// counters is processor time at one moment.
type counters struct{ proxies, app, load, whole float64 }

func (w *ways) read(one way) (c counters, err error) {
	for _, cgroup := range one.proxies {
		usec, err := used(cgroup)
		if err != nil {
			return c, err
		}
		c.proxies += usec
	}
	if c.app, err = used(one.app); err != nil {
		return c, err
	}
	if c.load, err = used(one.load); err != nil {
		return c, err
	}
	c.whole, err = busy()
	return c, err
}

// once runs one workload on one way. An operation that fails spoils it.
func (w *ways) once(ctx context.Context, work report.Workload, one way, seconds float64) (r report.Run, err error) {
	arguments := commands[work.Name](w.options, one, strconv.FormatFloat(seconds, 'f', -1, 64))
	if arguments[0] == "/proc/self/exe" {
		if arguments[0], err = os.Executable(); err != nil {
			return r, err
		}
	}
	cmd, done, err := command(ctx, one.from, one.load, arguments...)
	if err != nil {
		return r, err
	}
	defer done()
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := renew(ctx, one); err != nil {
		return r, err
	}
	before, err := w.read(one)
	if err != nil {
		return r, err
	}
	if err := cmd.Run(); err != nil {
		return r, fmt.Errorf("run %s on %s, %s: %w: %s", work.Name, one.variant, one.placement, err, tail(complaint.String()))
	}
	after, err := w.read(one)
	if err != nil {
		return r, err
	}
	read := result
	if work.Name == "tcp-bulk" {
		read = resultOfSend
	}
	if r, err = read(out.Bytes()); err != nil {
		return r, fmt.Errorf("run %s on %s, %s: %w: %s", work.Name, one.variant, one.placement, err, tail(complaint.String()))
	}
	r.Workload, r.Placement, r.Variant = work.Name, one.placement, one.variant
	r.Proxies, r.App, r.Generator, r.Whole = after.proxies-before.proxies, after.app-before.app, after.load-before.load, after.whole-before.whole
	return r, nil
}

// renew ends the connections that Envoys keep. Each is on one of its callee's workers for as long as it lasts: kept from run to
// run, chance would favour one way in all its runs alike. It forgets those that have ended, too: a sidecar's redirection makes one
// address of all destinations, and a new connection whose source port was another's would lose its first SYN, and a second.
func renew(ctx context.Context, one way) error {
	for _, pod := range []*lab.Pod{one.from, one.to} {
		// Its exit code says nothing; what is left does.
		_ = exec.CommandContext(ctx, "nsenter", "--net="+pod.Netns(), "ss", "-K", "-t", "state", "established", "state", "time-wait").Run()
	}
	wait, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return proxy.Until(wait, func() error {
		for _, pod := range []*lab.Pod{one.from, one.to} {
			left, err := exec.CommandContext(ctx, "nsenter", "--net="+pod.Netns(), "ss", "-H", "-t", "state", "established", "state", "time-wait").Output()
			if err != nil {
				return fmt.Errorf("list connections: %w", err)
			}
			if len(left) > 0 {
				return fmt.Errorf("end connections of pod %s: some are left; the kernel needs CONFIG_INET_DIAG_DESTROY", pod.Name)
			}
		}
		return nil
	})
}

func resultOfSend(raw []byte) (r report.Run, err error) {
	var s sent
	if err := json.Unmarshal(raw, &s); err != nil {
		return r, fmt.Errorf("read the result: %w", err)
	}
	return report.Run{Operations: float64(s.Bytes) / (1 << 20), Seconds: s.Seconds}, nil
}

// result reads fortio's.
func result(raw []byte) (r report.Run, err error) {
	var f struct {
		ActualDuration    int64
		RetCodes          map[string]int64
		DurationHistogram struct {
			Count       int64
			Percentiles []struct{ Percentile, Value float64 }
		}
	}
	if err := json.Unmarshal(raw, &f); err != nil {
		return r, fmt.Errorf("read fortio's result: %w", err)
	}
	for code := range f.RetCodes {
		if code != "200" && code != "SERVING" && code != "OK" {
			return r, fmt.Errorf("not every operation succeeded: %v", f.RetCodes)
		}
	}
	if f.DurationHistogram.Count == 0 || f.ActualDuration == 0 {
		return r, errors.New("fortio counted nothing")
	}
	r = report.Run{Operations: float64(f.DurationHistogram.Count), Seconds: time.Duration(f.ActualDuration).Seconds()}
	for _, p := range f.DurationHistogram.Percentiles {
		if at := map[float64]*float64{50: &r.P50, 90: &r.P90, 99: &r.P99}[p.Percentile]; at != nil {
			*at = p.Value * 1000
		}
	}
	return r, nil
}

// processes lists those of weft's nodes and the sidecars, with their memory.
func (w *ways) processes() (out []report.Process, err error) {
	add := func(of, name string, node int, cgroup string) error {
		all, err := pids(cgroup)
		if err != nil {
			return err
		}
		for _, pid := range all {
			p := report.Process{Of: of, Node: node, Name: name + program(pid)}
			if p.RSS, p.PSS, err = memory(pid); err != nil {
				return err
			}
			out = append(out, p)
		}
		return nil
	}
	for node := range 2 {
		for _, cgroup := range []string{filepath.Join(w.Cgroup(node), "envoy"), w.Cgroup(node)} {
			if err := add(report.Weft, "weft: ", node, cgroup); err != nil {
				return nil, err
			}
		}
	}
	for _, name := range []string{"client", "near", "far"} {
		pod := w.Pod(sidecarPods + name)
		if err := add(report.Sidecars, "sidecar of "+name+": ", pod.Node, filepath.Join(lab.Cgroup(), "plain", "proxy-"+pod.Name)); err != nil {
			return nil, err
		}
	}
	return out, nil
}
