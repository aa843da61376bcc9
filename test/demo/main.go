// Command demo brings a running shop into the mesh and out again, and checks at each step what it shows. It exits
// non-zero if anything does not hold.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/term"

	"github.com/weftmesh/weft/test/kube"
)

type demo struct {
	cluster *kube.Cluster
	root    string
	start   time.Time
	// terminal: the output can be overwritten.
	terminal bool
	load     *kube.Traffic
	// log is what the callees' Envoys saw.
	log *kube.AccessLogs
	// before holds the shop's pods as they were before weft came.
	before map[string]kube.Pod
}

type step struct {
	title string
	run   func(*demo, context.Context) error
}

var steps = []step{
	{"deploy a shop that knows no mesh, under steady load", (*demo).deploy},
	{"install weft with helm", (*demo).install},
	{"label the namespace: running pods join the mesh", (*demo).enrol},
	{"nothing was restarted, nothing was lost", (*demo).unharmed},
	{"who talks to whom now, by the peers' certificates", (*demo).identities},
	{"an HTTPRoute sends a tenth of the requests to version 2", (*demo).split},
	{"an AccessPolicy turns one caller away, on both nodes", (*demo).deny},
	{"another label: payload between apps and Envoy goes past TCP, and back", (*demo).shortcut},
	{"Strict: a plaintext caller is refused while kubelet's probes pass", (*demo).strict},
	{"leave the mesh without a lost request", (*demo).withdraw},
}

func main() {
	root := flag.String("root", ".", "the clone")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *root); err != nil {
		fmt.Fprintf(os.Stderr, "\n\033[31mthe demo failed:\033[0m %v\n\nlook further:\n%s", err, hints)
		os.Exit(1)
	}
}

const hints = `  export KUBECONFIG=.cluster/kubeconfig PATH=$PWD/.cluster:$PATH
  kubectl get pods -A -o wide                          the pods
  kubectl describe pod -n shop NAME                    conditions weft.dev/Enrolled and weft.dev/Enforced
  kubectl logs -n weft-system ds/weft-nodeproxy -c agent     what the node did (-c envoy: the proxy)
  kubectl logs -n weft-system deploy/weft-controlplane       what the controller decided
clean up:
  make cluster-down                                    ends the Kubernetes cluster and everything in it
`

func run(ctx context.Context, root string) error {
	cluster, err := kube.Open(root)
	if err != nil {
		return err
	}
	d := &demo{cluster: cluster, root: root, start: time.Now(), terminal: term.IsTerminal(int(os.Stdout.Fd()))}
	defer func() {
		if d.load != nil {
			d.load.Stop()
		}
		if d.log != nil {
			d.log.Stop()
		}
	}()
	for i, s := range steps {
		fmt.Printf("\n\033[1m%d/%d %s\033[0m\n", i+1, len(steps), s.title)
		if err := s.run(d, ctx); err != nil {
			return fmt.Errorf("step %d, %s: %w", i+1, s.title, err)
		}
	}
	fmt.Printf("\n\033[32mall %d steps held\033[0m, %.0f s\n\nlook further:\n%s", len(steps), time.Since(d.start).Seconds(), hints)
	return nil
}

// progress overwrites one line while something is waited for; where lines cannot be overwritten it adds one every 10 s.
func (d *demo) progress(what string) func(string) {
	next := time.Now().Add(10 * time.Second)
	return func(detail string) {
		if !d.terminal {
			if time.Now().After(next) {
				next = time.Now().Add(10 * time.Second)
				fmt.Printf("  %5.1f s  %s: %.100s\n", time.Since(d.start).Seconds(), what, detail)
			}
			return
		}
		fmt.Printf("\r\033[K  %5.1f s  %s: %.100s", time.Since(d.start).Seconds(), what, detail)
	}
}

// say ends the progress line with a result.
func (d *demo) say(format string, args ...any) {
	if d.terminal {
		fmt.Print("\r\033[K")
	}
	fmt.Printf("  "+format+"\n", args...)
}

// expect turns a condition that does not hold into an error.
func expect(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}
