package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	ctrl "sigs.k8s.io/controller-runtime"

	"github.com/weftmesh/weft/api/names"
)

func newUninstallCommand() *cobra.Command {
	var namespace string
	var limit time.Duration
	command := &cobra.Command{
		Use: "uninstall", Short: "Order every pod out of the mesh and wait until it has left", Args: cobra.NoArgs, SilenceUsage: true,
		Long: "uninstall is what helm uninstall runs before it deletes anything. Pods that have left keep running, unharmed.",
		RunE: func(command *cobra.Command, _ []string) error {
			config, err := ctrl.GetConfig()
			if err != nil {
				return fmt.Errorf("find the API server: %w", err)
			}
			clients, err := kubernetes.NewForConfig(config)
			if err != nil {
				return fmt.Errorf("make Kubernetes client: %w", err)
			}
			return uninstall(command.Context(), clients, namespace, limit, command.OutOrStdout())
		},
	}
	command.Flags().StringVar(&namespace, "namespace", "weft-system", "weft's own namespace")
	command.Flags().DurationVar(&limit, "timeout", 2*time.Minute, "how long to wait for the nodes")
	return command
}

// uninstall gives the order and prints progress until no pod says that it is in the mesh.
func uninstall(ctx context.Context, clients kubernetes.Interface, namespace string, limit time.Duration, out io.Writer) error {
	order := fmt.Sprintf(`{"data":{%q:"true"}}`, names.UninstallKey)
	if _, err := clients.CoreV1().ConfigMaps(namespace).Patch(ctx, names.UninstallConfigMap, types.MergePatchType, []byte(order), metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("order the pods out of the mesh: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	last := ""
	for {
		left, err := inMesh(ctx, clients)
		if err != nil && ctx.Err() == nil {
			return err
		}
		if err == nil && len(left) == 0 {
			fmt.Fprintln(out, "every pod has left the mesh")
			return nil
		}
		var nodes []string
		for node, pods := range left {
			which := pods[0]
			if len(pods) > 1 {
				which = fmt.Sprintf("%d pods, such as %s", len(pods), pods[0])
			}
			nodes = append(nodes, node+" ("+which+")")
		}
		slices.Sort(nodes)
		if text := strings.Join(nodes, ", "); text != last && text != "" {
			fmt.Fprintln(out, "still in the mesh:", text)
			last = text
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("these nodes have not let their pods go within %s: %s. Look at their weft-nodeproxy pods and uninstall again, or uninstall without hooks "+
				"(helm uninstall --no-hooks) and run \"nodeproxy release\" on each of them: until then their Strict pods stay closed", limit, last)
		case <-tick.C:
		}
	}
}

// inMesh lists the pods whose conditions say that they are enrolled, by node.
func inMesh(ctx context.Context, clients kubernetes.Interface) (map[string][]string, error) {
	pods, err := clients.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	left := map[string][]string{}
	for _, p := range pods.Items {
		if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		for _, c := range p.Status.Conditions {
			// Unknown: its node is silent, and what was may still be.
			if string(c.Type) == names.ConditionEnrolled && (c.Status == corev1.ConditionTrue || c.Status == corev1.ConditionUnknown) {
				left[p.Spec.NodeName] = append(left[p.Spec.NodeName], p.Namespace+"/"+p.Name)
			}
		}
	}
	return left, nil
}
