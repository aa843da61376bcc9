//go:build e2e

package cluster_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/cluster"
	"golang.org/x/sys/unix"
)

// load puts the toolbox under a name of its own on all nodes, from both kinds of tarballs, and runs it there.
func (h harness) load() {
	content, err := os.ReadFile(filepath.Join(h.dir, ".cluster/images/toolbox.tar"))
	if err != nil {
		h.Fatal(err)
	}
	file := filepath.Join(h.TempDir(), "image.tar")
	for kind, tarball := range map[string][]byte{
		"docker": bytes.Replace(content, []byte("docker.io/weft/toolbox:1"), []byte("docker.io/test/renamed:1"), 1),
		"oci":    ociLayout(h.T, content, "docker.io/test/oci:1"),
	} {
		if err := os.WriteFile(file, tarball, 0o644); err != nil {
			h.Fatal(err)
		}
		if err := cluster.Load(h.ctx, h.dir, file); err != nil {
			h.Fatalf("%s: %v", kind, err)
		}
	}
	var pods []string
	for name, image := range map[string]string{"docker": "docker.io/test/renamed:1", "oci": "docker.io/test/oci:1"} {
		for n := 1; n <= 2; n++ {
			pods = append(pods, h.run(fmt.Sprintf("%s-n%d", name, n), image, n))
		}
	}
	h.succeed(pods...)
	if err := os.WriteFile(file, []byte("no tarball"), 0o644); err != nil {
		h.Fatal(err)
	}
	if err := cluster.Load(h.ctx, h.dir, file); err == nil {
		h.Error("load a file that is no tarball: want an error")
	}
}

// run starts a pod on node n that does its work and ends.
func (h harness) run(name, image string, n int) string {
	h.Helper()
	h.kubectl("run", name, "--image="+image, "--image-pull-policy=Never", "--restart=Never",
		fmt.Sprintf(`--overrides={"spec":{"nodeName":"n%d"}}`, n), "--", "resolve", "localhost")
	return name
}

// succeed waits for pods to end well and deletes them.
func (h harness) succeed(pods ...string) {
	h.Helper()
	for _, pod := range pods {
		h.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=120s", "pod/"+pod)
	}
	h.kubectl(append([]string{"delete", "pod"}, pods...)...)
}

// runsOn runs a pod on each node.
func (h harness) runsOn(nodes int) {
	h.Helper()
	var pods []string
	for n := 1; n <= nodes; n++ {
		pods = append(pods, h.run(fmt.Sprintf("run-n%d", n), cluster.ToolboxImage, n))
	}
	h.succeed(pods...)
}

// ociLayout turns a docker tarball of one image of one layer into a tarball of an OCI image layout.
func ociLayout(t *testing.T, docker []byte, ref string) []byte {
	t.Helper()
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(docker)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	var manifest []struct {
		Config string
		Layers []string
	}
	if err := json.Unmarshal(files["manifest.json"], &manifest); err != nil || len(manifest) != 1 || len(manifest[0].Layers) != 1 {
		t.Fatalf("manifest of the docker tarball: %v, %v", manifest, err)
	}
	blobs := map[string][]byte{}
	blob := func(kind string, content []byte) map[string]any {
		sum := fmt.Sprintf("%x", sha256.Sum256(content))
		blobs["blobs/sha256/"+sum] = content
		return map[string]any{"mediaType": "application/vnd.oci.image." + kind, "digest": "sha256:" + sum, "size": len(content)}
	}
	encode := func(value any) []byte {
		raw, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	top := blob("manifest.v1+json", encode(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": blob("config.v1+json", files[manifest[0].Config]), "layers": []any{blob("layer.v1.tar", files[manifest[0].Layers[0]])}}))
	top["annotations"] = map[string]string{"org.opencontainers.image.ref.name": ref}
	blobs["oci-layout"] = encode(map[string]string{"imageLayoutVersion": "1.0.0"})
	blobs["index.json"] = encode(map[string]any{"schemaVersion": 2, "manifests": []any{top}})
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, content := range blobs {
		if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(content)), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// bpffs is each node's own: what one pins there shows neither on the other nor on the machine.
func (h harness) bpffs() {
	nodes := h.open().Nodes
	const folder = "/sys/fs/bpf/weft-probe"
	if out, err := nodes[0].Command(h.ctx, "mkdir", folder).CombinedOutput(); err != nil {
		h.Fatalf("%v: %s", err, out)
	}
	if err := nodes[0].Command(h.ctx, "test", "-d", folder).Run(); err != nil {
		h.Errorf("%s does not show on n1, which made it: %v", folder, err)
	}
	if err := nodes[1].Command(h.ctx, "test", "-e", folder).Run(); err == nil {
		h.Errorf("%s of n1 shows on n2", folder)
	}
	if _, err := os.Lstat(folder); !errors.Is(err, os.ErrNotExist) {
		h.Errorf("%s of n1 shows on the machine: %v", folder, err)
	}
}

// reboot stops and starts a node: the API must see it go and come back with a new boot id, and its pods run again.
func (h harness) reboot(n int, hard bool) {
	node := h.open().Nodes[n-1]
	bootID := func() string {
		return h.kubectl("get", "node", node.Name, "-o", "jsonpath={.status.nodeInfo.bootID}")
	}
	ready := func() string {
		return h.kubectl("get", "node", node.Name, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
	}
	before := bootID()
	// bpffs takes folders, no files.
	if out, err := node.Command(h.ctx, "sh", "-c", "touch /run/gone /var/lib/kubelet/kept; mkdir /sys/fs/bpf/gone").CombinedOutput(); err != nil {
		h.Fatalf("%v: %s", err, out)
	}
	started := time.Now()
	if err := cluster.StopNode(h.ctx, h.dir, n, hard); err != nil {
		h.Fatal(err)
	}
	h.Logf("stopped after %s", time.Since(started).Round(10*time.Millisecond))
	h.eventually("pid 1 of "+node.Name+" is gone", func() error {
		if unix.Kill(node.PID, 0) == nil {
			return errors.New("it still runs")
		}
		return nil
	})
	if stopped := h.open().Nodes[n-1]; stopped.PID != 0 {
		h.Errorf("the stopped node has pid 1 %d", stopped.PID)
	}
	if err := cluster.Up(h.ctx, config(h.T)); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("make node-start N=%d", n)) {
		h.Errorf("cluster-up while %s is stopped on purpose: got %v, want the way to start it", node.Name, err)
	}
	h.eventually(node.Name+" is seen to be away", func() error {
		if got := ready(); got == "True" {
			return errors.New("it is Ready")
		}
		return nil
	})
	started = time.Now()
	if err := cluster.StartNode(h.ctx, h.dir, n); err != nil {
		h.Fatal(err)
	}
	h.eventually(node.Name+" has a new boot id and is Ready", func() error {
		if id := bootID(); id == before {
			return errors.New("its boot id is " + id)
		}
		if got := ready(); got != "True" {
			return errors.New("Ready is " + got)
		}
		return nil
	})
	h.Logf("Ready after %s", time.Since(started).Round(10*time.Millisecond))
	server, client := fmt.Sprintf("server-n%d", n), fmt.Sprintf("client-n%d", 3-n)
	for family, service := range h.addresses("service", server) {
		h.eventually("the pods of "+node.Name+" serve again", func() error {
			_, err := h.toolbox(client, "get", "http://"+netip.AddrPortFrom(service, 80).String()+"/pod")
			return err
		})
		h.sees(client, netip.AddrPortFrom(service, 80), server, h.addresses("pod", client)[family])
	}
	h.Logf("pods serve after %s", time.Since(started).Round(10*time.Millisecond))
	node = h.open().Nodes[n-1]
	for _, gone := range []string{"/run/gone", "/sys/fs/bpf/gone"} {
		if err := node.Command(h.ctx, "test", "-e", gone).Run(); err == nil {
			h.Errorf("%s outlived the reboot", gone)
		}
	}
	if err := node.Command(h.ctx, "test", "-e", "/var/lib/kubelet/kept").Run(); err != nil {
		h.Error("/var/lib/kubelet did not outlive the reboot")
	}
}

// secondClone: another clone must not get the same addresses, and is told whose they are.
func (h harness) secondClone() {
	c := config(h.T)
	other := c
	other.Dir = h.TempDir()
	for _, part := range []string{"k8s", "etcd"} {
		if err := os.CopyFS(filepath.Join(other.Dir, "test/cluster", part), os.DirFS(filepath.Join(c.Dir, "test/cluster", part))); err != nil {
			h.Fatal(err)
		}
	}
	err := cluster.Preflight(h.ctx, other)
	if err == nil || !strings.Contains(err.Error(), "the cluster of "+c.Dir) || !strings.Contains(err.Error(), "remedy:") {
		h.Errorf("preflight of a second clone: got %v, want it to name %s", err, c.Dir)
	}
	// Further clones may have taken some of the other addresses.
	for other.Slot = 0; other.Slot <= cluster.MaxSlot && err != nil; other.Slot++ {
		err = cluster.Preflight(h.ctx, other)
	}
	if err != nil {
		h.Errorf("preflight of a second clone with addresses of its own: %v", err)
	}
	conn, err := net.DialTimeout("tcp", h.open().ControlPlane.IPv4.String()+":6443", deadline)
	if err != nil {
		h.Fatalf("the API server from the machine: %v", err)
	}
	conn.Close()
}
