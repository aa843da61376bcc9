// Package kube drives a Kubernetes cluster as a user does: by kubectl and helm. Demo and e2e tests share it.
package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/weftmesh/weft/test/cluster"
)

// Cluster is a running embedded cluster. What is asked again and again goes to the API server itself: a kubectl costs a
// tenth of a second of a processor.
type Cluster struct {
	*cluster.Cluster
	// Config leads to the API server.
	Config  *rest.Config
	clients *kubernetes.Clientset
}

// Open finds the cluster that `make cluster-up` made in a clone's root.
func Open(root string) (*Cluster, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("open cluster: %w", err)
	}
	c, err := cluster.Open(root)
	if err != nil {
		return nil, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("open cluster: %w", err)
	}
	config.QPS = -1
	clients, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("open cluster: %w", err)
	}
	return &Cluster{c, config, clients}, nil
}

func (c *Cluster) run(ctx context.Context, stdin, binary string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig)
	cmd.Stdin = strings.NewReader(stdin)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(binary), strings.Join(args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

// Kubectl runs kubectl and returns what it prints.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.run(ctx, "", c.Cluster.Kubectl, args...)
}

// Pipe runs kubectl with an input.
func (c *Cluster) Pipe(ctx context.Context, stdin string, args ...string) (string, error) {
	return c.run(ctx, stdin, c.Cluster.Kubectl, args...)
}

// OwnClientAddress is the MeshConfig under which a callee's app tells by its client's address whether Envoy brought the
// connection: it is what load.View counts by.
const OwnClientAddress = "apiVersion: weft.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\nspec: {clientAddress: Own}\n"

// Helm runs helm and returns what it prints.
func (c *Cluster) Helm(ctx context.Context, args ...string) (string, error) {
	return c.run(ctx, "", c.Cluster.Helm, args...)
}

// Command returns kubectl as a command to start and to read while it runs.
func (c *Cluster) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.Cluster.Kubectl, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig)
	return cmd
}

// Admin asks a node's Envoy by its admin socket, which only the node's root reaches.
func (c *Cluster) Admin(ctx context.Context, node, path string) (string, error) {
	for _, n := range c.Nodes {
		if n.Name != node {
			continue
		}
		client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dialAdmin(ctx, n.PID) }}}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envoy"+path, nil)
		if err != nil {
			return "", fmt.Errorf("ask Envoy on %s for %s: %w", node, path, err)
		}
		resp, err := client.Do(req)
		if err != nil {
			return "", fmt.Errorf("ask Envoy on %s for %s: %w", node, path, err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			return "", fmt.Errorf("ask Envoy on %s for %s: %w", node, path, err)
		}
		return string(text), nil
	}
	return "", fmt.Errorf("ask Envoy on %s: the cluster has no such node", node)
}

// dialAdmin reaches the Envoy of a node; the one of two that began last.
func dialAdmin(ctx context.Context, machine int) (net.Conn, error) {
	sockets, err := filepath.Glob(fmt.Sprintf("/proc/%d/root/run/weft/generation-*/envoy/admin.sock", machine))
	if err != nil {
		return nil, err
	}
	began := func(path string) time.Time {
		if info, err := os.Stat(path); err == nil {
			return info.ModTime()
		}
		return time.Time{}
	}
	slices.SortFunc(sockets, func(a, b string) int { return began(b).Compare(began(a)) })
	err = errors.New("no Envoy runs there")
	for _, path := range sockets {
		var c net.Conn
		if c, err = (&net.Dialer{}).DialContext(ctx, "unix", path); err == nil {
			return c, nil
		}
	}
	return nil, err
}

// Apply applies manifests.
func (c *Cluster) Apply(ctx context.Context, manifests string) error {
	_, err := c.run(ctx, manifests, c.Cluster.Kubectl, "apply", "-f", "-")
	return err
}

// ApplyFile applies a file or folder of manifests.
func (c *Cluster) ApplyFile(ctx context.Context, path string) error {
	_, err := c.Kubectl(ctx, "apply", "-f", path)
	return err
}

// Delete deletes what manifests name; what is not there is no error.
func (c *Cluster) Delete(ctx context.Context, manifests string) error {
	_, err := c.run(ctx, manifests, c.Cluster.Kubectl, "delete", "--ignore-not-found", "-f", "-")
	return err
}

// Pod is the part of a pod that tests look at.
type Pod struct {
	Name, Namespace, UID, Node, Phase string
	Labels                            map[string]string
	IPs                               []string
	Restarts                          int
	Ready                             bool
	Deleting                          bool
	Conditions                        map[string]Condition
}

// Condition is one condition of an object.
type Condition struct{ Status, Reason, Message string }

// Pods lists a namespace's pods that match a label selector.
func (c *Cluster) Pods(ctx context.Context, namespace, selector string) ([]Pod, error) {
	list, err := c.clients.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, fmt.Errorf("list pods in %s: %w", namespace, err)
	}
	var pods []Pod
	for _, i := range list.Items {
		p := Pod{Name: i.Name, Namespace: i.Namespace, UID: string(i.UID), Labels: i.Labels, Node: i.Spec.NodeName,
			Phase: string(i.Status.Phase), Deleting: i.DeletionTimestamp != nil, Conditions: map[string]Condition{}}
		for _, a := range i.Status.PodIPs {
			p.IPs = append(p.IPs, a.IP)
		}
		for _, s := range i.Status.ContainerStatuses {
			p.Restarts += int(s.RestartCount)
		}
		for _, k := range i.Status.Conditions {
			p.Conditions[string(k.Type)] = Condition{string(k.Status), k.Reason, k.Message}
		}
		p.Ready = p.Conditions["Ready"].Status == "True"
		pods = append(pods, p)
	}
	return pods, nil
}

// Get asks the API server for a path.
func (c *Cluster) Get(ctx context.Context, path string) ([]byte, error) {
	raw, err := c.clients.RESTClient().Get().AbsPath(path).DoRaw(ctx)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", path, err)
	}
	return raw, nil
}

// Until asks again until done, or fails with the last detail at the deadline. show, if set, gets each detail.
func Until(ctx context.Context, limit time.Duration, what string, show func(string), ask func(context.Context) (done bool, detail string)) error {
	return Every(ctx, 100*time.Millisecond, limit, what, func(ctx context.Context) (bool, string) {
		done, detail := ask(ctx)
		if !done && show != nil {
			show(detail)
		}
		return done, detail
	})
}

// Every is Until with a period of its own, between an answer and the next question.
func Every(ctx context.Context, period, limit time.Duration, what string, ask func(context.Context) (done bool, detail string)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	last := "nothing was seen"
	for {
		done, detail := ask(ctx)
		if done {
			return nil
		}
		if ctx.Err() == nil || !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			last = detail
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w; last seen: %s", what, ctx.Err(), last)
		case <-time.After(period):
		}
	}
}

// UntilReady waits until a namespace has all pods that match, and they are ready. The error tells what keeps one that
// is not.
func (c *Cluster) UntilReady(ctx context.Context, limit time.Duration, namespace, selector string, show func(string)) error {
	var waiting string
	err := Until(ctx, limit, "pods in "+namespace+" to be ready", show, func(ctx context.Context) (bool, string) {
		pods, err := c.Pods(ctx, namespace, selector)
		if err != nil {
			return false, err.Error()
		}
		ready := 0
		for _, p := range pods {
			if p.Ready && !p.Deleting {
				ready++
			} else {
				waiting = p.Name
			}
		}
		if ready < len(pods) || len(pods) == 0 {
			return false, fmt.Sprintf("%d/%d pods ready %s", ready, len(pods), waiting)
		}
		unmade, err := c.unmade(ctx, namespace, selector, pods)
		if err != nil {
			return false, err.Error()
		}
		return len(unmade) == 0, "no pods yet of " + strings.Join(unmade, ", ")
	})
	if err == nil || waiting == "" || ctx.Err() != nil {
		return err
	}
	return fmt.Errorf("%w\n%s", err, c.Explain(ctx, namespace, waiting))
}

// unmade names the Deployments and DaemonSets whose pods match and of which some are not among the pods that there are.
func (c *Cluster) unmade(ctx context.Context, namespace, selector string, pods []Pod) (names []string, err error) {
	want, err := labels.Parse(selector)
	if err != nil {
		return nil, fmt.Errorf("read selector: %w", err)
	}
	add := func(o metav1.ObjectMeta, template map[string]string, own *metav1.LabelSelector, observed int64, all, updated int32) {
		if !want.Matches(labels.Set(template)) {
			return
		}
		mine, err := metav1.LabelSelectorAsSelector(own)
		made := int32(0)
		for _, p := range pods {
			if err == nil && mine.Matches(labels.Set(p.Labels)) {
				made++
			}
		}
		if made = min(made, updated); observed < o.Generation || made < all {
			names = append(names, fmt.Sprintf("%s (%d/%d)", o.Name, made, all))
		}
	}
	deployments, err := c.clients.AppsV1().Deployments(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list Deployments in %s: %w", namespace, err)
	}
	for _, d := range deployments.Items {
		add(d.ObjectMeta, d.Spec.Template.Labels, d.Spec.Selector, d.Status.ObservedGeneration, *d.Spec.Replicas, d.Status.UpdatedReplicas)
	}
	daemons, err := c.clients.AppsV1().DaemonSets(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list DaemonSets in %s: %w", namespace, err)
	}
	for _, d := range daemons.Items {
		updated := d.Status.UpdatedNumberScheduled
		if d.Spec.UpdateStrategy.Type == appsv1.OnDeleteDaemonSetStrategyType {
			updated = d.Status.DesiredNumberScheduled // whoever deletes the old ones
		}
		add(d.ObjectMeta, d.Spec.Template.Labels, d.Spec.Selector, d.Status.ObservedGeneration, d.Status.DesiredNumberScheduled, updated)
	}
	return names, nil
}

// Explain is what kubectl knows about a pod in trouble: its containers, its events and the end of its logs.
func (c *Cluster) Explain(ctx context.Context, namespace, pod string) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var all []string
	for _, args := range [][]string{
		{"get", "pod", pod, "-o", `jsonpath={.status.phase} {.status.containerStatuses}`},
		{"events", "--for=pod/" + pod},
		{"logs", "--all-containers", "--tail=20", pod},
		{"logs", "--all-containers", "--tail=20", "--previous", pod},
	} {
		out, err := c.Kubectl(ctx, append([]string{"-n", namespace}, args...)...)
		if err != nil && out == "" {
			out = err.Error()
		}
		all = append(all, strings.TrimSpace(out))
	}
	return strings.Join(all, "\n")
}

// UntilCondition waits until a condition of all pods that match has a status.
func (c *Cluster) UntilCondition(ctx context.Context, limit time.Duration, namespace, selector, condition, status string, show func(string)) error {
	return Until(ctx, limit, condition+"="+status+" of pods in "+namespace, show, func(ctx context.Context) (bool, string) {
		pods, err := c.Pods(ctx, namespace, selector)
		if err != nil {
			return false, err.Error()
		}
		have := 0
		detail := ""
		for _, p := range pods {
			k := p.Conditions[condition]
			if k.Status == status {
				have++
			} else {
				detail = fmt.Sprintf("; %s: %s %s %s", p.Name, k.Status, k.Reason, k.Message)
			}
		}
		return len(pods) > 0 && have == len(pods), fmt.Sprintf("%d/%d pods%s", have, len(pods), detail)
	})
}
