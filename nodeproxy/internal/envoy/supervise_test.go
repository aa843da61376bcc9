package envoy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/nodeproxy/internal/lds"
)

// TestEnvoyRunsConfined reads from the kernel what the process may do.
func TestEnvoyRunsConfined(t *testing.T) {
	b := start(t, nil)
	s := b.live(t, 0)
	status := map[string]string{}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.PID))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.Join(strings.Fields(value), " ")
	}
	none := fmt.Sprintf("%016x", 0)
	id := strconv.Itoa(testUID)
	for key, want := range map[string]string{
		"Uid": strings.Join([]string{id, id, id, id}, " "), "Gid": strings.Join([]string{id, id, id, id}, " "), "Groups": id,
		"CapEff": none, "CapPrm": none, "CapInh": none, "CapAmb": none, "CapBnd": none, "Seccomp": "2", "NoNewPrivs": "1",
	} {
		if status[key] != want {
			t.Errorf("%s is %q, want %q", key, status[key], want)
		}
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", s.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/status", s.PID, thread.Name()))
		if len(raw) > 0 && !strings.Contains(string(raw), "Seccomp:\t2") {
			t.Errorf("thread %s runs without the filter", thread.Name())
		}
	}
	// Not dumpable: the process's own files belong to root, so that nobody of its user reads its memory.
	var file syscall.Stat_t
	if err := syscall.Stat(fmt.Sprintf("/proc/%d/mem", s.PID), &file); err != nil || file.Uid != 0 {
		t.Errorf("Envoy's memory belongs to user %d (%v), want root", file.Uid, err)
	}
	environment, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", s.PID))
	if err != nil || string(environment) != "HOME=/nonexistent\x00" {
		t.Errorf("Envoy's environment is %q (%v)", environment, err)
	}
	procs, err := os.ReadFile(filepath.Join(b.config.CgroupRoot, s.Cgroup, "cgroup.procs"))
	in := strings.Fields(string(procs))
	if err != nil || len(in) != 2 || !slices.Contains(in, strconv.Itoa(s.PID)) {
		t.Errorf("Envoy's cgroup %s holds %v (%v), want %d and its broker", s.Cgroup, in, err, s.PID)
	}
	if s.UID != testUID {
		t.Errorf("state names user %d", s.UID)
	}
}

// TestKilledEnvoyServesAgain: the goal is 1 s.
func TestKilledEnvoyServesAgain(t *testing.T) {
	b := start(t, nil)
	port := freePort(t)
	l := greeter(t, port, nil)
	b.set(t, l.Name, l)
	before := b.live(t, 0)
	until(t, patience, "the listener answers", func() bool { return answers(port) })
	for round := range uint32(3) {
		killed := time.Now()
		if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		until(t, patience, "the listener answers again", func() bool { return answers(port) })
		t.Logf("serving again %v after SIGKILL", time.Since(killed).Round(time.Millisecond))
		after := b.live(t, before.PID)
		if after.Restarts != round+1 || after.Exit != "signal: killed" || after.Generation != before.Generation || after.Cgroup != before.Cgroup {
			t.Errorf("state after the kill: %+v", after)
		}
		before = after
	}
}

// TestCrashLoopBacksOff runs a program that ends at once.
func TestCrashLoopBacksOff(t *testing.T) {
	b := start(t, func(c *Config) { c.Binary = "/bin/false" })
	until(t, 30*time.Second, "8 restarts", func() bool { _, ok := b.states.reached(8); return ok })
	for n, asked := range map[uint32]time.Duration{7: 200 * time.Millisecond, 8: 400 * time.Millisecond} {
		this, _ := b.states.reached(n)
		last, _ := b.states.reached(n - 1)
		if wait, least := this.Sub(last), asked/2; wait < least { // the news of either may be late
			t.Errorf("restart %d came %v after the one before, want at least %v", n, wait, least)
		}
	}
	if s := b.states.last(); s.Live || s.Exit != "exit status 1" {
		t.Errorf("state in a crash loop: %+v", s)
	}
}

func TestBackOff(t *testing.T) {
	s := New(Config{})
	now := time.Now()
	var waits []time.Duration
	for range 16 {
		waits = append(waits, s.backOff(now))
	}
	if slices.ContainsFunc(waits[:quickRestarts], func(w time.Duration) bool { return w != 0 }) {
		t.Errorf("the first restarts wait: %v", waits[:quickRestarts])
	}
	if !slices.IsSorted(waits) || waits[quickRestarts] == 0 || waits[15] != slowest {
		t.Errorf("waits are %v, want growing ones up to %v", waits, slowest)
	}
	if w := s.backOff(now.Add(within + time.Second)); w != 0 {
		t.Errorf("a death long after the others waits %v", w)
	}
}

// TestStopEndsEnvoy: nothing is left, and connections have had their time.
func TestStopEndsEnvoy(t *testing.T) {
	b := start(t, nil)
	s := b.live(t, 0)
	cgroup := filepath.Join(b.config.CgroupRoot, s.Cgroup)
	killed := folderOf(b.config.RunDir, 1) // of a supervisor that was killed
	if err := os.MkdirAll(filepath.Join(killed, envoyDirectory, "socket"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := b.stop(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(s.PID, 0); err == nil {
		t.Errorf("Envoy %d still runs", s.PID)
	}
	for _, gone := range []string{cgroup, filepath.Join(b.config.CgroupRoot, "weft", b.config.NodeID), folderOf(b.config.RunDir, 0), killed} {
		if _, err := os.Stat(gone); err == nil {
			t.Errorf("%s is left", gone)
		}
	}
	until(t, patience, "Watch tells that the supervisor is away", func() bool { return b.states.last() == State{} })
	if strings.Contains(b.log.String(), "starting it again") {
		t.Error("the supervisor took the end that it ordered for a crash")
	}
	if log := b.log.String(); !strings.Contains(log, "Envoy drains") || strings.Contains(log, "not told to go") || strings.Contains(log, "not cleared") {
		t.Errorf("the end went otherwise: %s", log)
	}
}

// TestWatchFollowsAnotherSupervisor: the agent outlives the supervisor.
func TestWatchFollowsAnotherSupervisor(t *testing.T) {
	b := start(t, nil)
	first := b.live(t, 0)
	if err := b.stop(); err != nil {
		t.Fatal(err)
	}
	until(t, patience, "Watch tells that the supervisor is away", func() bool { return b.states.last() == State{} })
	if err := os.Remove(filepath.Join(b.config.RunDir, AgentSocket)); err != nil {
		t.Fatal(err)
	}
	b.run(t)
	if second := b.live(t, first.PID); second.Restarts != 0 {
		t.Errorf("state of the new supervisor: %+v", second)
	}
}

// TestSocketsArePrivate: what leads to Envoy's configuration and to keys is out of others' reach, and no TCP port does.
func TestSocketsArePrivate(t *testing.T) {
	b := start(t, nil)
	s := b.live(t, 0)
	type want struct {
		mode     fs.FileMode
		uid, gid uint32
	}
	for path, w := range map[string]want{
		".":                             {fs.ModeDir | 0o750, 0, testUID},
		AgentSocket:                     {fs.ModeSocket | 0o660, 0, testUID},
		"generation-0":                  {fs.ModeDir | 0o750, 0, testUID},
		"generation-0/envoy":            {fs.ModeDir | 0o750, testUID, testUID},
		"generation-0/envoy/admin.sock": {fs.ModeSocket | 0o660, testUID, testUID},
		"generation-0/supervisor.sock":  {fs.ModeSocket | 0o600, 0, 0},
		"generation-0/envoy.json":       {0o640, 0, testUID},
	} {
		info, err := os.Lstat(filepath.Join(b.config.RunDir, path))
		if err != nil {
			t.Error(err)
			continue
		}
		owner := info.Sys().(*syscall.Stat_t)
		if info.Mode() != w.mode || owner.Uid != w.uid || owner.Gid != w.gid {
			t.Errorf("%s is %v of %d:%d, want %v of %d:%d", path, info.Mode(), owner.Uid, owner.Gid, w.mode, w.uid, w.gid)
		}
	}
	if ports := listening(t, s.PID); len(ports) != 0 {
		t.Errorf("Envoy without listeners listens on %v", ports)
	}
}

// listening are the TCP addresses that a process listens on.
func listening(t *testing.T, pid int) (found []string) {
	t.Helper()
	inodes := map[string]bool{}
	descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range descriptors {
		if link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, d.Name())); err == nil {
			if inode, ok := strings.CutPrefix(link, "socket:["); ok {
				inodes[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	for _, table := range []string{"tcp", "tcp6"} {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(raw)) {
			if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" && inodes[f[9]] {
				found = append(found, f[1])
			}
		}
	}
	return found
}

// TestNoKeyLeavesEnvoy gives Envoy a key that a listener uses, and looks for it everywhere but in memory.
func TestNoKeyLeavesEnvoy(t *testing.T) {
	b := start(t, func(c *Config) { c.LogLevel = "trace" })
	const id = "spiffe://cluster.local/ns/shop/sa/till"
	chain, key := certificate(t, id)
	b.set(t, id, lds.TLSCertificateSecret(id, chain, key))
	port := freePort(t)
	l := greeter(t, port, &core.TransportSocket{Name: "tls", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: wrap(t, &tls.DownstreamTlsContext{
		CommonTlsContext: &tls.CommonTlsContext{TlsCertificateSdsSecretConfigs: []*tls.SdsSecretConfig{{Name: id, SdsConfig: &core.ConfigSource{
			ResourceApiVersion: core.ApiVersion_V3, ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}}}}}},
	})}})
	b.set(t, l.Name, l)
	b.live(t, 0)
	until(t, patience, "the listener is there", func() bool {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	dump := b.admin(t, "/config_dump?include_eds")
	if !strings.Contains(dump, id) {
		t.Error("the configuration dump does not show the secret at all: this test would see nothing")
	}
	block, _ := pem.Decode(key)
	places := map[string]string{"configuration dump": dump, "certificates": b.admin(t, "/certs"), "log": b.log.String()}
	err := filepath.WalkDir(filepath.Dir(b.config.RunDir), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		places[path] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(places) < 4 {
		t.Errorf("looked at %d places only", len(places))
	}
	for place, text := range places {
		for _, secret := range []string{
			"PRIVATE KEY", string(block.Bytes), base64.StdEncoding.EncodeToString(key), base64.StdEncoding.EncodeToString(block.Bytes)[:40],
		} {
			if strings.Contains(text, secret) {
				t.Errorf("the private key is in the %s", place)
			}
		}
	}
}

// certificate makes an SVID of a throw-away CA, PEM.
func certificate(t *testing.T, id string) (chain, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Minute),
		NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{uri}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

func TestOwnCgroup(t *testing.T) {
	for name, c := range map[string]struct{ self, want string }{
		"below the container's": {"0::/kubepods/pod1/abc\n", "/kubepods/pod1/abc/envoy"},
		"hybrid, v2 root":       {"5:memory:/kubepods/pod1\n0::/\n", "/weft/node-1/pod-1"},
		"own cgroup namespace":  {"0::/../../init\n", "/weft/node-1/pod-1"},
		"no v2 at all":          {"5:memory:/kubepods/pod1\n", "/weft/node-1/pod-1"},
	} {
		if got := ownCgroup(c.self, "/sys/fs/cgroup", "/nowhere", "node-1", "pod-1"); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

func TestMemoryLimit(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		want  uint64
	}{
		"v2":             {map[string]string{"memory.max": "1048576\n"}, 1 << 20},
		"v2, none":       {map[string]string{"memory.max": "max\n"}, 0},
		"v1":             {map[string]string{"memory/memory.limit_in_bytes": "2097152\n"}, 2 << 20},
		"v1, none":       {map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 0},
		"nothing to see": {nil, 0},
	} {
		dir := t.TempDir()
		for file, text := range c.files {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, file)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := memoryLimit(dir); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

// TestMakeCgroupEndsLeftovers: a supervisor that was killed may leave an Envoy behind.
func TestMakeCgroupEndsLeftovers(t *testing.T) {
	root := cgroupRoot(t)
	path := fmt.Sprintf("/weft-envoytest-%d", os.Getpid())
	full, err := makeCgroup(root, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(full) })
	p, err := os.StartProcess("/bin/sleep", []string{"sleep", "600"}, &os.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(full, "cgroup.procs"), []byte(strconv.Itoa(p.Pid)), 0); err != nil {
		_ = p.Kill()
		t.Fatal(err)
	}
	if _, err := makeCgroup(root, path); err != nil {
		t.Error(err)
	}
	state, err := p.Wait()
	if err != nil || state.String() != "signal: killed" {
		t.Errorf("the process left behind ended with %v %v", state, err)
	}
	if _, err := makeCgroup(t.TempDir(), path); err == nil || !strings.Contains(err.Error(), "no cgroup v2") {
		t.Errorf("a folder that is no cgroup: %v", err)
	}
}

// TestOwnFolderInACgroupNamespace: the container sees its own folder as the root.
func TestOwnFolderInACgroupNamespace(t *testing.T) {
	root, self := t.TempDir(), t.TempDir()
	own := filepath.Join(root, "kubepods", "pod1", "container1")
	if err := os.MkdirAll(own, 0o755); err != nil {
		t.Fatal(err)
	}
	if got := ownCgroup("0::/\n", root, self, "node-1", "pod-1"); got != "/weft/node-1/pod-1" {
		t.Errorf("another file system's folder was found: %s", got)
	}
	if err := unix.Mount(own, self, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(self, unix.MNT_DETACH) }()
	if got := ownCgroup("0::/\n", root, self, "node-1", "pod-1"); got != "/kubepods/pod1/container1/envoy" {
		t.Errorf("Envoy's cgroup is %s", got)
	}
}

// TestLock: the second waits for the first, and has the file that others see.
func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	other := filepath.Join(t.TempDir(), "other")
	_, second, err := Lock(t.Context(), func() { t.Error("nobody has it") }, other)
	if err != nil {
		t.Fatal(err)
	}
	defer second()
	at, first, err := Lock(t.Context(), func() { t.Error("nobody has it") }, other, path)
	if at != 1 || !Locked(path) || !Locked(other) {
		t.Errorf("lock %d of two was taken, of which another has the first", at)
	}
	if err != nil {
		t.Fatal(err)
	}
	waits, got := make(chan struct{}), make(chan error)
	go func() {
		_, second, err := Lock(t.Context(), func() { close(waits) }, other, path)
		if err == nil {
			if _, err = os.Stat(path); err == nil {
				second()
			}
		}
		got <- err
	}()
	<-waits
	first()
	if err := <-got; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); err == nil || Locked(path) {
		t.Error("the file is left")
	}
}
