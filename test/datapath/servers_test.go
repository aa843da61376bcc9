package datapath

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/test/contract/proxy"
	"github.com/weftmesh/weft/test/datapath/lab"
)

// real is a server as users run it, and how its client asks whom it takes it for.
type real struct {
	name string
	port uint16
	// protocol and class of the Service's port.
	class    meshv1.Class
	protocol meshv1.Protocol
	// start makes the server's command; dir is an empty directory of its own.
	start func(t *testing.T, pod *lab.Pod, dir string, port uint16) *exec.Cmd
	// ask makes the client's command, which prints the address that the server sees.
	ask func(pod *lab.Pod, host, port string) *exec.Cmd
}

func tcp(name string, port uint16, start func(*testing.T, *lab.Pod, string, uint16) *exec.Cmd, ask func(*lab.Pod, string, string) *exec.Cmd) real {
	return real{name, port, meshv1.Class_CLASS_TCP, meshv1.Protocol_PROTOCOL_TCP, start, ask}
}

func overHTTP(name string, port uint16, start func(*testing.T, *lab.Pod, string, uint16) *exec.Cmd) real {
	return real{name, port, meshv1.Class_CLASS_HTTP, meshv1.Protocol_PROTOCOL_HTTP1, start, func(pod *lab.Pod, host, port string) *exec.Cmd {
		return pod.Command("curl", "--silent", "--show-error", "--fail", "--globoff", "--max-time", "10", "http://"+net.JoinHostPort(host, port)+"/")
	}}
}

var reals = []real{
	overHTTP("nginx", 8001, func(t *testing.T, pod *lab.Pod, dir string, port uint16) *exec.Cmd {
		config := fmt.Sprintf(`daemon off; pid %[1]s/pid; error_log stderr; events {}
http { access_log off; client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
server { listen %[2]d; listen [::]:%[2]d; return 200 $remote_addr; } }`, dir, port)
		file := filepath.Join(dir, "nginx.conf")
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		return pod.Command("nginx", "-c", file)
	}),
	overHTTP("Java", 8002, func(t *testing.T, pod *lab.Pod, dir string, port uint16) *exec.Cmd {
		return pod.Command("java", "-XX:TieredStopAtLevel=1", "testdata/Who.java", fmt.Sprint(port))
	}),
	overHTTP("Python", 8003, func(t *testing.T, pod *lab.Pod, dir string, port uint16) *exec.Cmd {
		return pod.Command("python3", "testdata/who.py", fmt.Sprint(port))
	}),
	tcp("redis", 6379, func(t *testing.T, pod *lab.Pod, dir string, port uint16) *exec.Cmd {
		return pod.Command("redis-server", "--port", fmt.Sprint(port), "--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", "", "--dir", dir)
	}, func(pod *lab.Pod, host, port string) *exec.Cmd {
		return pod.Command("redis-cli", "-h", host, "-p", port, "client", "info")
	}),
	tcp("PostgreSQL", 5432, postgres, func(pod *lab.Pod, host, port string) *exec.Cmd {
		return pod.Command("psql", "-w", "-X", "-A", "-t", "-h", host, "-p", port, "-U", "postgres", "-c", "select host(inet_client_addr())", "postgres")
	}),
	{"MariaDB", 3306, meshv1.Class_CLASS_TCP, meshv1.Protocol_PROTOCOL_TCP_SERVER_FIRST, mariadb, func(pod *lab.Pod, host, port string) *exec.Cmd {
		return pod.Command("mariadb", "--no-defaults", "-N", "-B", "-h", host, "-P", port, "--protocol=tcp", "-u", "who", "-e", "select user()")
	}},
}

// mariadb tells a client's address only where it has users.
func mariadb(t *testing.T, pod *lab.Pod, dir string, port uint16) *exec.Cmd {
	users := filepath.Join(dir, "users.sql")
	if err := os.WriteFile(users, []byte("create user who@'%';\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	options := []string{"--no-defaults", "--user=root", "--datadir=" + dir + "/data", "--innodb-log-file-size=4M"}
	if out, err := exec.Command("mariadb-install-db", append(options, "--auth-root-authentication-method=normal", "--skip-test-db")...).CombinedOutput(); err != nil {
		t.Fatalf("mariadb-install-db: %v: %s", err, out)
	}
	return pod.Command("mariadbd", append(options, "--init-file="+users, "--skip-networking=0", "--skip-name-resolve", "--bind-address=0.0.0.0,::",
		"--port="+fmt.Sprint(port), "--socket="+dir+"/s", "--pid-file="+dir+"/pid", "--innodb-buffer-pool-size=16M")...)
}

// postgres refuses to be root.
func postgres(t *testing.T, pod *lab.Pod, dir string, port uint16) *exec.Cmd {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(found) == 0 {
		t.Fatal("no PostgreSQL is installed:", err)
	}
	owner, err := user.Lookup("postgres")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(owner.Uid)
	gid, _ := strconv.Atoi(owner.Gid)
	for at := dir; strings.HasPrefix(at, os.TempDir()+"/"); at = filepath.Dir(at) {
		if err := os.Chmod(at, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	made := exec.Command(filepath.Join(found[0], "initdb"), "--no-sync", "--auth=trust", "--username=postgres", "--pgdata="+dir+"/data")
	made.Dir, made.SysProcAttr = dir, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	if out, err := made.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v: %s", err, out)
	}
	rules, err := os.OpenFile(dir+"/data/pg_hba.conf", os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = rules.WriteString("host all all all trust\n")
		rules.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return pod.Command("setpriv", "--reuid="+owner.Uid, "--regid="+owner.Gid, "--clear-groups", "--",
		filepath.Join(found[0], "postgres"), "-D", dir+"/data", "-p", fmt.Sprint(port), "-c", "listen_addresses=*", "-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "shared_buffers=16MB")
}

// TestServersSeeTheirClients: what the real ones tell of their client, by Service and by pod address.
func TestServersSeeTheirClients(t *testing.T) {
	var ports []lab.PortSpec
	for _, r := range reals {
		ports = append(ports, lab.PortSpec{Port: r.port, Target: r.port, Class: r.class, Protocol: r.protocol})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	l, err := lab.New(ctx, lab.Spec{
		Module: "../..",
		Pods: []lab.PodSpec{{Name: "client", Account: "client", Node: 0, Last: 2}, {Name: "near", Account: "server", Node: 0, Last: 5, ServerFirst: []uint16{3306}},
			{Name: "far", Account: "server", Node: 1, Last: 6, ServerFirst: []uint16{3306}}},
		Services: []lab.ServiceSpec{{Name: "near", Last: 1, Ports: ports, Pods: []string{"near"}}, {Name: "far", Last: 2, Ports: ports, Pods: []string{"far"}}},
	})
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{Lab: l, t: t}
	for _, name := range []string{"client", "near", "far"} {
		m.Pod(name).Policy = strict()
	}
	for _, server := range []string{"near", "far"} {
		for _, r := range reals {
			r.serve(t, m.Pod(server))
		}
	}
	if err := l.Enrol(ctx); err != nil {
		t.Fatal(err)
	}
	client := m.Pod("client")
	for _, r := range reals {
		t.Run(r.name, func(t *testing.T) {
			everywhere(t, func(t *testing.T, server string, ipv6 bool) {
				for way, to := range map[string]string{"Service": m.Address(server, r.port, ipv6), "pod": m.direct(server, r.port, ipv6)} {
					r.seen(t, client, way, to)
				}
			})
		})
	}
}

// serve runs the server until the test ends.
func (r real) serve(t *testing.T, pod *lab.Pod) {
	t.Helper()
	dir, err := os.MkdirTemp("", "weft-server-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cmd := r.start(t, pod, dir, r.port)
	log, err := os.Create(dir + ".log")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = log, log, &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	log.Close()
	if err != nil {
		t.Fatalf("start %s: %v", r.name, err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		if t.Failed() {
			out, _ := os.ReadFile(log.Name())
			t.Logf("%s of %s: %s", r.name, pod.Name, tail(string(out), 10))
		}
		_ = os.Remove(log.Name())
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err = proxy.Until(ctx, func() error {
		conn, err := pod.Dial(ctx, fmt.Sprintf("127.0.0.1:%d", r.port))
		if err == nil {
			conn.Close()
		}
		return err
	})
	if err != nil {
		t.Fatalf("wait for %s: %v", r.name, err)
	}
}

// seen fails unless the server tells the client's address; by a Service in either family, for its endpoints have both.
func (r real) seen(t *testing.T, client *lab.Pod, way, to string) {
	t.Helper()
	host, port, _ := net.SplitHostPort(to)
	var last string
	eventually(t, func() error { // a database may listen before it answers
		out, err := r.ask(client, host, port).CombinedOutput()
		last = strings.TrimSpace(string(out))
		if err != nil {
			return fmt.Errorf("%s by %s %s: %w: %s", r.name, way, to, err, last)
		}
		return nil
	})
	addresses := client.Addresses
	if way == "pod" {
		addresses = addresses[:1]
		if strings.Contains(host, ":") {
			addresses = client.Addresses[1:]
		}
	}
	if !slices.ContainsFunc(addresses, func(a netip.Addr) bool { return tells(last, a) }) {
		t.Errorf("%s by %s %s: it sees %q, not %v", r.name, way, to, last, addresses)
	}
}

// tells finds an address in an answer: alone, or with its port, or as redis or MariaDB have it.
func tells(answer string, a netip.Addr) bool {
	for _, field := range strings.Fields(answer) {
		field = strings.TrimPrefix(strings.TrimPrefix(field, "addr="), "who@")
		if at, err := netip.ParseAddrPort(field); err == nil && at.Addr().Unmap() == a {
			return true
		}
		if at, err := netip.ParseAddr(field); err == nil && at.Unmap() == a {
			return true
		}
	}
	return false
}
