package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/weftmesh/weft/test/cluster/cgroups"
	"golang.org/x/sync/errgroup"
)

// inotifyInstances is what the nodes of one cluster need together: each container runtime, kubelet and many pods hold
// some, and they count per user, not per node. Linux's default is 128.
const inotifyInstances = 8192

const inotifySysctl = "/proc/sys/fs/inotify/max_user_instances"

// apiTimeout bounds each wait of Up, about ten times what it takes on two busy cores.
const apiTimeout = 2 * time.Minute

// Up builds what is missing and starts the cluster. A cluster that runs already with the same parameters is left as it
// is; remains of an interrupted command are removed first. If it fails, only logs are left.
func Up(ctx context.Context, c Config) error {
	if err := c.validate(); err != nil {
		return err
	}
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	old, err := loadState(c.Dir)
	if err == nil && old.interrupted() {
		return fmt.Errorf("start the cluster: it is up but for %s, which make node-stop ended: run make node-start N=%d, or make cluster-down to start anew", nodeName(old.Stopped[0]), old.Stopped[0])
	}
	if err == nil && old.healthy(ctx) {
		if old.Config != c {
			return fmt.Errorf("start the cluster: one with NODES=%d SLOT=%d runs already: run make cluster-down first", old.Nodes, old.Slot)
		}
		fmt.Fprintf(os.Stderr, "the cluster is up: kubeconfig %s\n", c.path("kubeconfig"))
		return nil
	}
	if err := progress(step{Number: 1, Of: 1, Name: "check the machine", Expected: time.Second}, func() error { return Preflight(ctx, c) }); err != nil {
		return err
	}
	if err := down(ctx, c); err != nil {
		return err
	}
	if err := os.RemoveAll(c.path("logs")); err != nil {
		return fmt.Errorf("remove the logs of the cluster before: %w", err)
	}
	cache, err := Build(ctx, c)
	if err != nil {
		return err
	}
	if err := start(ctx, c, cache); err != nil {
		cleaning, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		return errors.Join(fmt.Errorf("start the cluster: %w; see the logs in %s", err, c.path("logs")), down(cleaning, c))
	}
	fmt.Fprintf(os.Stderr, "the cluster is up: export KUBECONFIG=%s; kubectl and helm are %s and %s\n", c.path("kubeconfig"), c.path("kubectl"), c.path("helm"))
	return nil
}

func start(ctx context.Context, c Config, cache string) error {
	layout, err := cgroups.Read()
	if err != nil {
		return err
	}
	s := &state{Config: c, Layout: layout, Cache: cache}
	client := (*api)(nil)
	steps := []struct {
		name     string
		expected time.Duration
		log      string
		work     func() error
	}{
		{"make certificates and folders", time.Second, "", func() error { return s.prepare(ctx) }},
		{"start the control plane", 5 * time.Second, c.path("logs", "cp-kube-apiserver.log"), func() (err error) {
			if _, err = s.startMachine(ctx, s.controlPlaneMachine(), s.connectControlPlane); err != nil {
				return err
			}
			if client, err = s.newAPI(); err != nil {
				return err
			}
			return waitFor(ctx, "the API server", apiTimeout, func(ctx context.Context) error {
				return client.get(ctx, "/readyz", nil)
			})
		}},
		{fmt.Sprintf("start %d nodes and load their images", c.Nodes), 8 * time.Second, c.path("logs", "n1-kubelet.log"), func() error {
			return s.eachNode(func(n int) error {
				if err := s.bootNode(ctx, n); err != nil {
					return err
				}
				return s.loadImages(ctx, n, c.path("images", "pause.tar"), c.path("images", "toolbox.tar"), c.path("images", "coredns.tar"))
			})
		}},
		{"wait for the nodes", 3 * time.Second, c.path("logs", "n1-kubelet.log"), func() error { return s.awaitNodes(ctx, client) }},
		{"start CoreDNS", 4 * time.Second, c.path("logs", "cp-kube-controller-manager.log"), func() error { return s.startDNS(ctx, client) }},
	}
	for i, st := range steps {
		if err := progress(step{Number: i + 1, Of: len(steps), Name: st.name, Expected: st.expected, Log: st.log}, st.work); err != nil {
			return err
		}
	}
	return nil
}

// eachNode works on all nodes at once.
func (s *state) eachNode(work func(n int) error) error {
	var group errgroup.Group
	for n := 1; n <= s.Nodes; n++ {
		group.Go(func() error { return work(n) })
	}
	return group.Wait()
}

// prepare changes what must change of the machine itself and writes the state that outlives reboots.
func (s *state) prepare(ctx context.Context) error {
	if err := s.changeMachine(ctx); err != nil {
		return err
	}
	for _, folder := range []string{"logs", "cp/etcd"} {
		// etcd wants its folder closed to others.
		if err := os.MkdirAll(s.path(folder), 0o700); err != nil {
			return fmt.Errorf("make a state folder: %w", err)
		}
	}
	if err := s.makePKI(); err != nil {
		return err
	}
	for n := 1; n <= s.Nodes; n++ {
		if err := s.prepareNode(n); err != nil {
			return err
		}
	}
	return s.writeCommands()
}

// changeMachine raises the inotify limit and loads kernel modules. What was there before is saved first: down restores it.
func (s *state) changeMachine(ctx context.Context) error {
	others, err := s.neighbours()
	if err != nil {
		return err
	}
	before, err := os.ReadFile(inotifySysctl)
	if err != nil {
		return fmt.Errorf("read the inotify limit: %w", err)
	}
	limit, err := strconv.Atoi(strings.TrimSpace(string(before)))
	if err != nil {
		return fmt.Errorf("read the inotify limit: %w", err)
	}
	if limit < inotifyInstances {
		s.InotifyInstances = limit
	}
	modules := thisKernel().absentModules(ctx)
	s.Modules = modules
	for _, other := range others {
		if running, err := loadState(other.Dir); err == nil {
			s.inherit(running.former)
		}
	}
	if err := s.save(); err != nil {
		return err
	}
	if limit < inotifyInstances {
		if err := os.WriteFile(inotifySysctl, []byte(strconv.Itoa(inotifyInstances)), 0); err != nil {
			return fmt.Errorf("raise the inotify limit: %w", err)
		}
	}
	return loadModules(ctx, modules)
}

// restoreMachine undoes changeMachine and the enabling of controllers.
func (s *state) restoreMachine(ctx context.Context) error {
	s.Layout.Disable(s.Controllers)
	unloadModules(ctx, s.Modules)
	if s.InotifyInstances == 0 {
		return nil
	}
	if err := os.WriteFile(inotifySysctl, []byte(strconv.Itoa(s.InotifyInstances)), 0); err != nil {
		return fmt.Errorf("restore the inotify limit: %w", err)
	}
	return nil
}

// writeCommands makes .cluster/kubectl and .cluster/helm, which talk to this cluster and keep their caches in it.
func (s *state) writeCommands() error {
	kubectl := fmt.Sprintf("#!/bin/sh\nexport KUBECONFIG='%s' KUBECACHEDIR='%s'\nexec '%s/bin/k8s' kubectl \"$@\"\n", s.path("kubeconfig"), s.path("client", "kubectl"), s.Cache)
	helm := fmt.Sprintf("#!/bin/sh\nexport KUBECONFIG='%s' HELM_CACHE_HOME='%[2]s/cache' HELM_CONFIG_HOME='%[2]s/config' HELM_DATA_HOME='%[2]s/data'\nexec '%s/bin/helm' \"$@\"\n",
		s.path("kubeconfig"), s.path("client", "helm"), s.Cache)
	if err := writeFile(s.path("kubectl"), []byte(kubectl), 0o755); err != nil {
		return err
	}
	return writeFile(s.path("helm"), []byte(helm), 0o755)
}

// awaitNodes waits until every node is Ready, and tells the API which range its pods have.
func (s *state) awaitNodes(ctx context.Context, client *api) error {
	return s.eachNode(func(n int) error {
		path := "/api/v1/nodes/" + nodeName(n)
		err := waitFor(ctx, "node "+nodeName(n)+" to be Ready", apiTimeout, func(ctx context.Context) error {
			var node apiNode
			if err := client.get(ctx, path, &node); err != nil {
				return err
			}
			if !node.ready() {
				return errors.New("it is not Ready")
			}
			return nil
		})
		if err != nil {
			return err
		}
		pods4, pods6 := s.podRange(n)
		patch, err := json.Marshal(map[string]any{"spec": map[string]any{"podCIDR": pods4.String(), "podCIDRs": []string{pods4.String(), pods6.String()}}})
		if err != nil {
			return fmt.Errorf("encode the range of pods: %w", err)
		}
		return client.do(ctx, http.MethodPatch, path, "application/strategic-merge-patch+json", patch, nil)
	})
}

// startDNS waits for what every pod needs (the default service account) and deploys CoreDNS.
func (s *state) startDNS(ctx context.Context, client *api) error {
	for _, namespace := range []string{"default", "kube-system"} {
		err := waitFor(ctx, "the default service account of "+namespace, apiTimeout, func(ctx context.Context) error {
			return client.get(ctx, "/api/v1/namespaces/"+namespace+"/serviceaccounts/default", nil)
		})
		if err != nil {
			return err
		}
	}
	manifest, err := manifests.ReadFile("manifests/coredns.yaml")
	if err != nil {
		return fmt.Errorf("read the manifest of CoreDNS: %w", err)
	}
	dns4, dns6 := s.dnsService()
	apply := outside(ctx, s.path("kubectl"), "apply", "--validate=ignore", "-f", "-")
	apply.Stdin = strings.NewReader(strings.NewReplacer("@DNS4@", dns4.String(), "@DNS6@", dns6.String(), "@COREDNS@", coreDNSImage).Replace(string(manifest)))
	if out, err := apply.CombinedOutput(); err != nil {
		return fmt.Errorf("apply the manifest of CoreDNS: %w: %s", err, out)
	}
	return waitFor(ctx, "CoreDNS", apiTimeout, func(ctx context.Context) error {
		var deployment struct {
			Status struct {
				Available int `json:"availableReplicas"`
			} `json:"status"`
		}
		if err := client.get(ctx, "/apis/apps/v1/namespaces/kube-system/deployments/coredns", &deployment); err != nil {
			return err
		}
		if deployment.Status.Available == 0 {
			return errors.New("it has no available pod")
		}
		return nil
	})
}

// interrupted says that the cluster runs but for nodes that were stopped on purpose.
func (s *state) interrupted() bool {
	_, err := s.initPID(controlPlaneName)
	return err == nil && len(s.Stopped) > 0
}

// healthy says that every machine of the cluster runs and the API server answers.
func (s *state) healthy(ctx context.Context) bool {
	for n := 1; n <= s.Nodes; n++ {
		if _, err := s.initPID(nodeName(n)); err != nil {
			return false
		}
	}
	if _, err := s.initPID(controlPlaneName); err != nil {
		return false
	}
	client, err := s.newAPI()
	return err == nil && client.get(ctx, "/readyz", nil) == nil
}

// Down ends the cluster and removes all it made on the machine; logs stay. It needs no state file, only the clone's
// path, and may be repeated.
func Down(ctx context.Context, c Config) error {
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return down(ctx, c)
}

// kept are the entries of .cluster that outlive a cluster.
var kept = map[string]bool{"lock": true, "logs": true, "bin": true, "programs": true, "images": true}

func down(ctx context.Context, c Config) error {
	s, err := loadState(c.Dir)
	if err != nil {
		s = &state{Config: c}
		if s.Layout, err = cgroups.Read(); err != nil {
			return err
		}
	}
	if err := s.Layout.Kill(s.Prefix(), machineTimeout); err != nil {
		return err
	}
	if err := s.disconnectMachine(ctx); err != nil {
		return err
	}
	if err := s.Layout.Remove(s.Prefix(), machineTimeout); err != nil {
		return err
	}
	others, err := c.neighbours()
	if err != nil {
		return err
	}
	if len(others) == 0 { // else the last of them restores it: see former.inherit
		if err := s.restoreMachine(ctx); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(c.path())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list the state folder: %w", err)
	}
	// cluster.json goes last: an interrupted down still finds what it must restore.
	for _, last := range []bool{false, true} {
		for _, entry := range entries {
			if kept[entry.Name()] || (entry.Name() == "cluster.json") != last {
				continue
			}
			if err := os.RemoveAll(c.path(entry.Name())); err != nil {
				return fmt.Errorf("remove the cluster's state: %w", err)
			}
		}
	}
	return nil
}
