//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/weftmesh/weft/test/kube"
)

// call and outcome are the toolbox's.
type call struct {
	URL     string            `json:"url,omitempty"`
	Method  string            `json:"method,omitempty"`
	Headers map[string]string `json:"headers,omitempty"`
	H2C     bool              `json:"h2c,omitempty"`
	Address string            `json:"address,omitempty"`
	Line    string            `json:"line,omitempty"`
	Timeout int               `json:"timeout,omitempty"`
}

type outcome struct {
	Status                       int
	Body, Error, Location, Local string
}

// allowed: the app answered, with 200 or by a whole line.
func (o outcome) allowed() bool {
	return o.Status == 200 || o.Status == 0 && o.Error == "" && o.Body != ""
}

// closed: the connection was refused or ended, at once and without a byte.
func (o outcome) closed() bool {
	if o.Status != 0 || o.Body != "" {
		return false
	}
	for _, end := range []string{"EOF", "reset by peer", "broken pipe", "connection refused", "server closed idle connection", "client conn could not be established"} {
		if strings.Contains(o.Error, end) {
			return true
		}
	}
	return false
}

// unserved: there was nobody to serve the call, and the caller heard so at once.
func (o outcome) unserved() bool { return o.Status == 503 || o.closed() }

// batch makes calls from a caller's pod, side by side.
func batch(ctx context.Context, p kube.Pod, calls []call) ([]outcome, error) {
	return outcomes(p, calls, func(in string) (string, error) {
		return k8s.Pipe(ctx, in, "exec", "-i", "-n", p.Namespace, p.Name, "--", "toolbox", "batch")
	})
}

// outcomes gives the toolbox's batch the calls, and reads what became of them.
func outcomes(p kube.Pod, calls []call, run func(in string) (out string, err error)) ([]outcome, error) {
	in, err := json.Marshal(calls)
	if err != nil {
		return nil, err
	}
	out, err := run(string(in))
	if err != nil {
		return nil, err
	}
	var all []outcome
	if err := json.Unmarshal([]byte(out), &all); err != nil || len(all) != len(calls) {
		return nil, fmt.Errorf("read outcomes of %s: %w: %s", p.Name, err, out)
	}
	return all, nil
}

// ask makes calls from a caller's pod on a node.
func (c caller) ask(t *testing.T, node string, calls ...call) []outcome {
	t.Helper()
	outcomes, err := batch(t.Context(), pod(t, c.namespace, c.app, node), calls)
	if err != nil {
		t.Fatal(err)
	}
	return outcomes
}

// podOn is a pod of the toolbox on a node, of the account other, with further labels and fields of its container.
func podOn(name, node, namespace, labels, fields string) string {
	if labels != "" {
		labels = ", " + labels
	}
	account := ""
	if namespace == "mesh" {
		account = "serviceAccountName: other, "
	}
	return fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {name: %[1]s, namespace: %[3]s, labels: {app: %[1]s%[4]s}}\nspec: {nodeName: %[2]s, %[6]sterminationGracePeriodSeconds: 1, containers: [{name: toolbox, image: \"docker.io/weft/toolbox:1\", %[5]s}]}\n",
		name, node, namespace, labels, fields, account)
}

func repeat(c call, n int) []call {
	var all []call
	for range n {
		all = append(all, c)
	}
	return all
}
