// Package proxy runs the real Envoy for tests.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Version of Envoy that weft is made for.
const Version = "1.40.0"

// Binary finds Envoy where `make envoy` puts it.
func Binary() (string, error) {
	cache := os.Getenv("XDG_CACHE_HOME")
	if cache == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		cache = filepath.Join(home, ".cache")
	}
	path := filepath.Join(cache, "weft", "envoy", Version, "envoy")
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("find Envoy %s: %w: run make envoy", Version, err)
	}
	return path, nil
}

// Config says how one Envoy runs.
type Config struct {
	// Node is its name in xDS.
	Node string
	// Dir takes its sockets and log. The path must be short, for Unix sockets.
	Dir string
	// XDS is the Unix socket of its xDS server.
	XDS string
	// Cgroup, if set, is an open cgroup2 directory to start it in.
	Cgroup *os.File
	// Netns, if set, is the path of the network namespace that it starts in.
	Netns string
	// Stats is Envoy's StatsConfig as JSON; "": it keeps all.
	Stats string
	// Concurrency is the number of worker threads; 0: 2.
	Concurrency int
	// Supervisor, if set, is nodeproxy's program, and runs Envoy as on a node: with its own user, without capabilities, with a
	// broker. XDS must then be AgentSocket; Stats is the supervisor's own.
	Supervisor string
	// Program is Envoy's, where another user than root can reach it; "": Binary.
	Program string
}

// User of an Envoy that a supervisor runs.
const User = 15001

// RunDir is the folder that a supervisor shares with its agent. Everybody may enter it.
func (c Config) RunDir() string { return filepath.Join(c.Dir, c.Node) }

// GenerationDir is the folder in it of the one generation that runs.
func (c Config) GenerationDir() string { return filepath.Join(c.RunDir(), "generation-0") }

// AgentSocket is where the Envoy of a supervisor asks its agent.
func (c Config) AgentSocket() string { return filepath.Join(c.RunDir(), "agent.sock") }

func (c Config) adminSocket() string {
	if c.Supervisor != "" {
		return filepath.Join(c.GenerationDir(), "envoy", "admin.sock")
	}
	return filepath.Join(c.Dir, c.Node+".admin")
}

// Envoy is a running process.
type Envoy struct {
	cmd   *exec.Cmd
	dir   string
	admin *http.Client
	done  chan struct{}
	err   error
}

const bootstrap = `{
"node": {"id": %[1]q, "cluster": "weft"},
"admin": {"address": {"pipe": {"path": %[2]q}}},
"layered_runtime": {"layers": [{"name": "static", "static_layer": {"re2.max_program_size.error_level": 65536}}]},
"stats_config": %[4]s, "deferred_stat_options": {"enable_deferred_creation_stats": true},
"dynamic_resources": {
 "ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": "agent"}}]},
 "lds_config": {"ads": {}, "resource_api_version": "V3"}, "cds_config": {"ads": {}, "resource_api_version": "V3"}},
"static_resources": {"clusters": [{"name": "agent", "type": "STATIC",
 "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
  "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": {"http2_protocol_options": {}}}},
 "load_assignment": {"cluster_name": "agent", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": %[3]q}}}}]}]}}]}
}`

func (c Config) stats() string {
	if c.Stats == "" {
		return "{}"
	}
	return c.Stats
}

// command is what is started, but for the namespace.
func (c Config) command() ([]string, error) {
	workers := strconv.Itoa(c.Concurrency)
	if c.Supervisor != "" {
		mount, err := cgroup2()
		return []string{c.Supervisor, "envoy", "--envoy", c.Program, "--run-dir", c.RunDir(), "--node-name", c.Node, "--pod-uid", "lab",
			"--cgroup-root", mount, "--self-cgroup", "/nonexistent", "--concurrency", workers, "--drain-timeout", "1s", "--log-level", "warn"}, err
	}
	config := filepath.Join(c.Dir, c.Node+".json")
	if err := os.WriteFile(config, fmt.Appendf(nil, bootstrap, c.Node, c.adminSocket(), c.XDS, c.stats()), 0o600); err != nil {
		return nil, fmt.Errorf("write Envoy's bootstrap: %w", err)
	}
	return []string{c.Program, "-c", config, "--use-dynamic-base-id", "--disable-hot-restart", "--concurrency", workers, "--drain-time-s", "5", "--file-flush-interval-msec", "100", "-l", "warning"}, nil
}

// cgroup2 is where cgroup v2 is mounted.
func cgroup2() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup v2: %w", err)
	}
	for line := range strings.Lines(string(mounts)) {
		before, after, _ := strings.Cut(line, " - ")
		if f := strings.Fields(before); strings.HasPrefix(after, "cgroup2 ") && len(f) > 4 {
			return f[4], nil
		}
	}
	return "", errors.New("find cgroup v2: it is not mounted")
}

// Start runs Envoy and waits until its admin socket answers.
func Start(ctx context.Context, cfg Config) (*Envoy, error) {
	if cfg.Program == "" {
		var err error
		if cfg.Program, err = Binary(); err != nil {
			return nil, err
		}
	}
	if cfg.Concurrency == 0 {
		cfg.Concurrency = 2
	}
	args, err := cfg.command()
	if err != nil {
		return nil, err
	}
	admin := cfg.adminSocket()
	log, err := os.Create(filepath.Join(cfg.Dir, cfg.Node+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if cfg.Netns != "" {
		args = append([]string{"nsenter", "--net=" + cfg.Netns}, args...)
	}
	e := &Envoy{cmd: exec.Command(args[0], args[1:]...), dir: cfg.Dir, done: make(chan struct{}), admin: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", admin)
		},
	}}}
	e.cmd.Stdout, e.cmd.Stderr = log, log
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if cfg.Cgroup != nil {
		e.cmd.SysProcAttr.UseCgroupFD, e.cmd.SysProcAttr.CgroupFD = true, int(cfg.Cgroup.Fd())
	}
	started := make(chan error)
	go func() {
		// Pdeathsig counts from the thread that starts the process: keep it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		started <- e.cmd.Start()
		if e.cmd.Process != nil {
			e.err = e.cmd.Wait()
		}
		close(e.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start Envoy: %w", err)
	}
	err = Until(ctx, func() error {
		select {
		case <-e.done:
			return Final(fmt.Errorf("Envoy ended: %v", e.err))
		default:
		}
		_, err := e.Admin("GET", "/server_info")
		return err
	})
	if err != nil {
		e.Stop()
		return nil, fmt.Errorf("start Envoy: %w\n%s", err, e.Log())
	}
	return e, nil
}

// Stop ends Envoy. It may be called twice.
func (e *Envoy) Stop() {
	select {
	case <-e.done:
		return
	default:
	}
	_ = e.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-e.done:
	case <-time.After(10 * time.Second):
		_ = e.cmd.Process.Kill()
		<-e.done
	}
}

// Done is closed when Envoy has ended; Exit says how.
func (e *Envoy) Done() <-chan struct{} { return e.done }

// Exit is how Envoy ended, nil for an exit without an error. Call it after Done.
func (e *Envoy) Exit() error { return e.err }

// PID is the process id.
func (e *Envoy) PID() int { return e.cmd.Process.Pid }

// Resident is the memory that Envoy holds, in bytes.
func (e *Envoy) Resident() (uint64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", e.PID()))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		var kib uint64
		if _, err := fmt.Sscanf(line, "Rss: %d kB", &kib); err == nil {
			return kib << 10, nil
		}
	}
	return 0, errors.New("read Envoy's memory: no Rss in smaps_rollup")
}

// Log is what Envoy has written, its access log included.
func (e *Envoy) Log() string {
	raw, _ := os.ReadFile(e.cmd.Stdout.(*os.File).Name())
	return string(raw)
}

// Admin calls the admin interface.
func (e *Envoy) Admin(method, path string) (string, error) {
	request, err := http.NewRequest(method, "http://envoy"+path, nil)
	if err != nil {
		return "", err
	}
	response, err := e.admin.Do(request)
	if err != nil {
		return "", fmt.Errorf("ask Envoy %s: %w", path, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("ask Envoy %s: %s: %s", path, response.Status, body)
	}
	return string(body), err
}

// Stat reads one counter or gauge; 0 when Envoy does not have it (yet).
func (e *Envoy) Stat(name string) (uint64, error) {
	body, err := e.Admin("GET", "/stats?filter=^"+name+"$")
	if err != nil {
		return 0, err
	}
	var value uint64
	if _, found, ok := strings.Cut(body, ": "); ok {
		_, err = fmt.Sscan(found, &value)
	}
	return value, err
}

type final struct{ error }

// Final marks an error that waiting cannot cure.
func Final(err error) error { return final{err} }

// Until calls a condition until it holds (nil), gives a Final error, or ctx ends; then its last error is returned.
func Until(ctx context.Context, condition func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := condition()
		if err == nil {
			return nil
		}
		var end final
		if errors.As(err, &end) {
			return end.error
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		}
	}
}
