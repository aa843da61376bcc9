//go:build e2e

package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// envoyUser is the user and group of Envoy alone.
const envoyUser = 15001

// TestAgentRights: §3, the agent's account can do nothing on the Kubernetes API, and its token is worth nothing there.
func TestAgentRights(t *testing.T) {
	apply(t, "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: nobody, namespace: outside}\n")
	list := func(account string) string {
		out, err := k8s.Kubectl(t.Context(), "auth", "can-i", "--list", "--as", "system:serviceaccount:"+account, "--as-group", "system:serviceaccounts", "--as-group", "system:authenticated")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if agent, fresh := list(system+":weft-nodeproxy"), list("outside:nobody"); agent != fresh {
		t.Errorf("the agent's rights are not those of a fresh account:\n%s\nfresh:\n%s", agent, fresh)
	}
	raw, err := k8s.Kubectl(t.Context(), "get", "pod", "-n", system, proxy(t, "n1"), "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(raw, "/var/run/secrets/kubernetes.io/serviceaccount") {
		t.Error("an API token is mounted into the agent")
	}
	var spec struct{ Metadata struct{ UID string } }
	if err := json.Unmarshal([]byte(raw), &spec); err != nil {
		t.Fatal(err)
	}
	token, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/var/lib/kubelet/pods/%s/volumes/kubernetes.io~projected/token/token", machine(t, "n1").PID, spec.Metadata.UID))
	if err != nil {
		t.Fatal(err)
	}
	out, err := k8s.Kubectl(t.Context(), "config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}")
	if err != nil {
		t.Fatal(err)
	}
	answer, err := k8s.ControlPlane.NetCommand(t.Context(), "curl", "-sk", "-o", "/dev/null", "-w", "%{http_code}", "-H", "Authorization: Bearer "+strings.TrimSpace(string(token)), strings.TrimSpace(out)+"/api/v1/pods").Output()
	if err != nil {
		t.Fatal(err)
	}
	if string(answer) != strconv.Itoa(http.StatusUnauthorized) {
		t.Errorf("the API server answers the agent's token with %s, want 401", answer)
	}
}

// nodeproxyPod is the part of a nodeproxy pod's object that says what it may do.
type nodeproxyPod struct {
	Metadata struct{ UID string }
	Spec     struct {
		HostNetwork, HostPID, HostIPC, ShareProcessNamespace bool
		Containers                                           []struct {
			Name            string
			SecurityContext struct {
				Privileged, ReadOnlyRootFilesystem bool
				Capabilities                       struct{ Add, Drop []string }
			}
		}
		Volumes []struct {
			Name     string
			HostPath *struct{ Path string }
		}
	}
}

func nodeproxyOn(t *testing.T, node string) nodeproxyPod {
	t.Helper()
	out, err := k8s.Kubectl(t.Context(), "get", "pod", "-n", system, proxy(t, node), "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var p nodeproxyPod
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		t.Fatal(err)
	}
	return p
}

func processOf(t *testing.T, uid, program, argument string) int {
	t.Helper()
	pid, found := findProcess(uid, program, argument)
	if !found {
		t.Fatalf("no process %s %s in pod %s", program, argument, uid)
	}
	return pid
}

// findProcess finds the process of a pod whose command line begins with a program and an argument.
func findProcess(uid, program, argument string) (pid int, found bool) {
	groups, _ := filepath.Glob("/proc/[0-9]*/cgroup") // fails for a bad pattern alone
	for _, file := range groups {
		group, err := os.ReadFile(file)
		if err != nil || !strings.Contains(strings.ReplaceAll(string(group), "_", "-"), uid) {
			continue
		}
		command, err := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
		words := strings.Split(string(command), "\x00")
		if err == nil && filepath.Base(words[0]) == program && (argument == "" || len(words) > 1 && words[1] == argument) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			return pid, err == nil
		}
	}
	return 0, false
}

// TestNodeRights: §3, the node pod has what the chart says and no more, and Envoy no capability.
func TestNodeRights(t *testing.T) {
	for _, at := range placements {
		p := nodeproxyOn(t, at.node)
		if p.Spec.HostNetwork || p.Spec.HostPID || p.Spec.HostIPC || p.Spec.ShareProcessNamespace {
			t.Errorf("%s: the pod shares a namespace: %+v", at.node, p.Spec)
		}
		for container, want := range map[string][]string{
			"agent": {"BPF", "CHOWN", "NET_ADMIN", "PERFMON", "SYS_ADMIN"},
			"envoy": {"CHOWN", "KILL", "SETGID", "SETPCAP", "SETUID", "SYS_ADMIN", "SYS_PTRACE"},
		} {
			found := false
			for _, c := range p.Spec.Containers {
				if c.Name != container {
					continue
				}
				found = true
				got := slices.Sorted(slices.Values(c.SecurityContext.Capabilities.Add))
				if !slices.Equal(got, want) || !slices.Equal(c.SecurityContext.Capabilities.Drop, []string{"ALL"}) {
					t.Errorf("%s: container %s has the capabilities %v, want %v", at.node, container, got, want)
				}
				if c.SecurityContext.Privileged || !c.SecurityContext.ReadOnlyRootFilesystem {
					t.Errorf("%s: container %s is privileged or may write its root file system: %+v", at.node, container, c.SecurityContext)
				}
			}
			if !found || len(p.Spec.Containers) != 2 {
				t.Errorf("%s: the pod has the containers %+v, want agent and envoy", at.node, p.Spec.Containers)
			}
		}
		var paths []string
		for _, v := range p.Spec.Volumes {
			if v.HostPath != nil {
				paths = append(paths, v.Name)
			}
		}
		slices.Sort(paths)
		if want := []string{"boot-id", "bpffs", "cgroup", "netns", "nri", "run"}; !slices.Equal(paths, want) {
			t.Errorf("%s: the pod sees the host's %v, want %v", at.node, paths, want)
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", processOf(t, p.Metadata.UID, "envoy", "")))
		if err != nil {
			t.Fatal(err)
		}
		const none = "0000000000000000"
		for _, want := range []string{
			fmt.Sprintf("Uid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d\n", envoyUser), fmt.Sprintf("Gid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d\n", envoyUser),
			"CapInh:\t" + none, "CapEff:\t" + none, "CapPrm:\t" + none, "CapAmb:\t" + none, "CapBnd:\t" + none, "NoNewPrivs:\t1\n", "Seccomp:\t2\n",
		} {
			if !strings.Contains(string(status), want) {
				t.Errorf("%s: Envoy's status lacks %q:\n%s", at.node, want, status)
			}
		}
	}
}

// TestSockets: §5.12, what is listened to is on Unix sockets in private folders; by TCP only the metrics.
func TestSockets(t *testing.T) {
	for _, at := range placements {
		agent := processOf(t, nodeproxyOn(t, at.node).Metadata.UID, "nodeproxy", "agent")
		if ports := listening(t, agent); !slices.Equal(ports, []int{15021}) {
			t.Errorf("%s: the node pod listens on the TCP ports %v, want 15021 alone", at.node, ports)
		}
		sockets := 0
		walkRun(t, at.node, func(path string, info fs.FileInfo) {
			owner := info.Sys().(*syscall.Stat_t)
			if owner.Uid != 0 && owner.Uid != envoyUser || owner.Gid != 0 && owner.Gid != envoyUser {
				t.Errorf("%s: %s belongs to %d:%d, want root or Envoy", at.node, path, owner.Uid, owner.Gid)
			}
			if info.Mode()&fs.ModeSymlink == 0 && info.Mode().Perm()&0o007 != 0 {
				t.Errorf("%s: everybody may use %s (%v)", at.node, path, info.Mode())
			}
			if info.Mode()&fs.ModeSocket != 0 {
				sockets++
			}
		})
		if sockets < 2 {
			t.Errorf("%s: %d sockets, want the agent's and Envoy's", at.node, sockets)
		}
		// The supervisor, whom no capability lets past permissions, reaches Envoy all the same.
		log, err := k8s.Kubectl(t.Context(), "logs", "-n", system, proxy(t, at.node), "-c", "envoy")
		if err != nil || !strings.Contains(log, "Envoy is live") {
			t.Errorf("%s: the supervisor did not see Envoy live: %v", at.node, err)
		}
	}
}

// listening are the TCP ports that anything listens on in a process's network namespace.
func listening(t *testing.T, pid int) []int {
	t.Helper()
	var ports []int
	for _, family := range []string{"tcp", "tcp6"} {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, family))
		if err != nil {
			t.Fatal(err)
		}
		for l := range strings.Lines(string(raw)) {
			f := strings.Fields(l)
			if len(f) < 4 || f[3] != "0A" {
				continue
			}
			_, port, _ := strings.Cut(f[1], ":")
			n, err := strconv.ParseUint(port, 16, 16)
			if err != nil {
				t.Fatal(err)
			}
			ports = append(ports, int(n))
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// walkRun visits weft's folder on a node and all that is in it.
func walkRun(t *testing.T, node string, visit func(path string, info fs.FileInfo)) {
	t.Helper()
	err := filepath.WalkDir(fmt.Sprintf("/proc/%d/root/run/weft", machine(t, node).PID), func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // replaced meanwhile
		}
		if err != nil {
			return err
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		visit(path, info)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSecrets: §5.12, no key of a workload on disk, in logs, in an object or in what Envoy tells of itself. The keys that
// are looked for are the real ones, out of the agent's memory.
func TestSecrets(t *testing.T) {
	objects, err := k8s.Kubectl(t.Context(), "get", "secrets,configmaps", "-A", "-o", "yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range placements {
		dump := admin(t, at.node, "/config_dump?include_eds")
		agent := processOf(t, nodeproxyOn(t, at.node).Metadata.UID, "nodeproxy", "agent")
		var keys []memoryKey
		// The memory changes while it is read: a look may miss what moves.
		until(t, time.Minute, "a key in the agent's memory whose certificate is in the config dump", func() (bool, string) {
			keys = keysInMemory(t, agent)
			return owns(dump, spiffe+"client", keys), fmt.Sprintf("%s: %d keys, none of them for the certificate", at.node, len(keys))
		})
		control(t, at.node, keys)
		logs, err := k8s.Kubectl(t.Context(), "logs", "-n", system, proxy(t, at.node), "--all-containers", "--tail=-1")
		if err != nil {
			t.Fatal(err)
		}
		places := map[string]string{"the config dump": dump, "the certificates": admin(t, at.node, "/certs"), "the logs": logs, "an object": objects}
		files := 0
		walkRun(t, at.node, func(path string, info fs.FileInfo) {
			if !info.Mode().IsRegular() {
				return
			}
			raw, err := os.ReadFile(path)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			files++
			places[path] = string(raw)
		})
		if files == 0 {
			t.Errorf("%s: weft's folder has no file at all", at.node)
		}
		for place, text := range places {
			for _, key := range keys {
				if form := key.foundIn(t, text); form != "" {
					t.Errorf("%s: a private key stands in %s, as %s", at.node, place, form)
				}
			}
			if place != "an object" && strings.Contains(text, "PRIVATE KEY") {
				t.Errorf("%s: %s tells of a private key", at.node, place)
			}
		}
	}
}

// memoryKey is a key as a process holds it.
type memoryKey struct {
	*ecdsa.PrivateKey
	pem, der []byte
}

var pemKey = regexp.MustCompile(`-----BEGIN PRIVATE KEY-----\n(?:[A-Za-z0-9+/=]+\n)+-----END PRIVATE KEY-----\n`)

// keysInMemory reads the private keys out of a process's memory.
func keysInMemory(t *testing.T, pid int) []memoryKey {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	found := map[string]memoryKey{}
	for l := range strings.Lines(string(maps)) {
		var from, to int64
		var rights string
		if _, err := fmt.Sscanf(l, "%x-%x %s", &from, &to, &rights); err != nil || !strings.HasPrefix(rights, "rw") || to-from > 1<<30 {
			continue
		}
		// What the process gives back meanwhile ends the region early.
		region, _ := io.ReadAll(io.NewSectionReader(memory, from, to-from))
		for _, text := range pemKey.FindAll(region, -1) {
			block, _ := pem.Decode(text)
			if block == nil {
				continue
			}
			parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if key, ok := parsed.(*ecdsa.PrivateKey); ok && err == nil {
				found[string(text)] = memoryKey{key, bytes.Clone(text), block.Bytes}
			}
		}
	}
	var keys []memoryKey
	for _, k := range found {
		keys = append(keys, k)
	}
	return keys
}

// foundIn names the form in which a text holds the key; empty: it does not.
func (k memoryKey) foundIn(t *testing.T, text string) string {
	t.Helper()
	scalar, err := k.PrivateKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	for form, secret := range map[string]string{
		"DER": string(k.der), "PEM": strings.Split(string(k.pem), "\n")[1], "base64 of PEM": base64.StdEncoding.EncodeToString(k.pem)[100:200],
		"the bare number": string(scalar), "hexadecimal digits": hex.EncodeToString(scalar),
	} {
		if strings.Contains(text, secret) {
			return form
		}
	}
	return ""
}

// owns: one of the keys belongs to the certificate of a SPIFFE ID in a config dump.
func owns(dump, id string, keys []memoryKey) bool {
	for _, raw := range inlineBytes.FindAllString(dump, -1) {
		text, err := base64.StdEncoding.DecodeString(raw)
		if err != nil {
			continue
		}
		block, _ := pem.Decode(text)
		if block == nil || block.Type != "CERTIFICATE" {
			continue
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil || len(certificate.URIs) != 1 || certificate.URIs[0].String() != id {
			continue
		}
		if slices.ContainsFunc(keys, func(k memoryKey) bool { return k.PublicKey.Equal(certificate.PublicKey) }) {
			return true
		}
	}
	return false
}

var inlineBytes = regexp.MustCompile(`[A-Za-z0-9+/]{200,}=*`)

// control shows that the search would see a key in every form in which it may be written.
func control(t *testing.T, node string, keys []memoryKey) {
	t.Helper()
	for _, k := range keys {
		for _, text := range []string{
			string(k.pem), string(k.der), strings.ReplaceAll(string(k.pem), "\n", `\n`), `{"private_key": {"inline_bytes": "` + base64.StdEncoding.EncodeToString(k.pem) + `"}}`,
		} {
			if k.foundIn(t, text) == "" {
				t.Errorf("%s: the search does not see a key in %d bytes", node, len(text))
			}
		}
	}
}
