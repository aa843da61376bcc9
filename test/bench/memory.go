package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const strictPods = "apiVersion: weft.dev/v1alpha1\nkind: AuthenticationPolicy\nmetadata: {name: strict, namespace: bench}\nspec: {mtls: {mode: Strict}}\n"

// everyChain lets callers in and out of the mesh call, by rules about requests: mesh HTTP/1.1, mesh HTTP/2 and plaintext.
const everyChain = `
apiVersion: weft.dev/v1alpha1
kind: AccessPolicy
metadata: {name: chains, namespace: bench}
spec: {selector: {matchLabels: {app: more}}, rules: [{to: [{methods: [GET]}]}]}
`

// memory compares Envoy's resident memory on a node without enrolled pods and with many.
func (b *bench) memory(ctx context.Context) error {
	if _, err := b.cluster.Kubectl(ctx, "delete", "pods", "-n", namespace, "--all", "--wait"); err != nil {
		return err
	}
	objects := ""
	for i := range b.pods {
		objects += strings.Replace(podManifest(fmt.Sprintf("more-%d", i)), "labels: {app: bench}", "labels: {app: more}", 1)
	}
	fmt.Printf("starting %d pods on one node\n", b.pods)
	if err := b.cluster.Apply(ctx, objects); err != nil {
		return err
	}
	if err := b.cluster.UntilReady(ctx, 10*time.Minute, namespace, "app=more", nil); err != nil {
		return err
	}
	for _, m := range []struct{ name, policy string }{{"Strict with L4 chains alone", strictPods}, {"all chains", everyChain}} {
		if err := b.grown(ctx, m.name, m.policy); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
	}
	return nil
}

func (b *bench) grown(ctx context.Context, name, policy string) error {
	if err := b.cluster.Apply(ctx, policy); err != nil {
		return err
	}
	// A fresh Envoy: memory that an earlier measurement left free would hide growth.
	if _, err := b.cluster.Kubectl(ctx, "delete", "pods", "-n", system, "-l", "app=weft-nodeproxy"); err != nil {
		return err
	}
	if err := b.cluster.UntilReady(ctx, 3*time.Minute, system, "", nil); err != nil {
		return err
	}
	before, err := b.envoyMemory(ctx)
	if err != nil {
		return err
	}
	started := time.Now()
	if _, err := b.cluster.Kubectl(ctx, "label", "pods", "-n", namespace, "-l", "app=more", "weft.dev/mesh=enabled", "--overwrite"); err != nil {
		return err
	}
	if err := b.cluster.UntilCondition(ctx, 5*time.Minute, namespace, "app=more", enforced, "True", nil); err != nil {
		return err
	}
	b.add(fmt.Sprintf("%d pods at once to Enforced=True, %s", b.pods, name), "ms", []float64{milliseconds(time.Since(started))})
	after, err := b.envoyMemory(ctx)
	if err != nil {
		return err
	}
	b.add(fmt.Sprintf("Envoy's memory per pod, %s, %d pods", name, b.pods), "KB", []float64{math.Round((after - before) / float64(b.pods))})
	if _, err := b.cluster.Kubectl(ctx, "label", "pods", "-n", namespace, "-l", "app=more", "weft.dev/mesh=disabled", "--overwrite"); err != nil {
		return err
	}
	if err := b.cluster.UntilCondition(ctx, 5*time.Minute, namespace, "app=more", enrolled, "False", nil); err != nil {
		return err
	}
	return b.cluster.Delete(ctx, policy)
}

// envoyMemory is the resident memory of n1's Envoy in KB.
func (b *bench) envoyMemory(ctx context.Context) (float64, error) {
	out, err := exec.CommandContext(ctx, "pgrep", "-x", "envoy").Output()
	if err != nil {
		return 0, fmt.Errorf("find Envoy: %w", err)
	}
	group := filepath.Base(filepath.Dir(b.cluster.Nodes[0].CgroupV2)) + "/" + b.cluster.Nodes[0].Name + "/"
	for _, pid := range strings.Fields(string(out)) {
		where, err := os.ReadFile("/proc/" + pid + "/cgroup")
		if err != nil || !strings.Contains(string(where), group) {
			continue
		}
		raw, err := os.ReadFile("/proc/" + pid + "/status")
		if err != nil {
			return 0, fmt.Errorf("read Envoy's memory: %w", err)
		}
		for l := range strings.Lines(string(raw)) {
			if f := strings.Fields(l); len(f) > 1 && f[0] == "VmRSS:" {
				return strconv.ParseFloat(f[1], 64)
			}
		}
	}
	return 0, fmt.Errorf("find Envoy: none runs on %s", b.cluster.Nodes[0].Name)
}
