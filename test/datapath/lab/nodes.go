package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/test/contract/proxy"
)

// supervise has an Envoy run under nodeproxy's supervisor.
func (l *Lab) supervise(c *proxy.Config) error {
	program, err := Envoy()
	if err != nil {
		return err
	}
	c.Program, c.Supervisor = program, filepath.Join(l.scratch, "bin", "nodeproxy")
	c.XDS = c.AgentSocket()
	if err := os.MkdirAll(c.RunDir(), 0o755); err != nil {
		return fmt.Errorf("make run folder: %w", err)
	}
	return nil
}

// Scratch is a folder of the program that Enter runs; it goes with it.
func Scratch() string { return os.Getenv(scratchVariable) }

// Cgroup is the cgroup that all of the program's are in.
func Cgroup() string { return os.Getenv(cgroupVariable) }

// Envoy is the path of Envoy's program where every user can reach it.
func Envoy() (string, error) {
	from, err := proxy.Binary()
	if err != nil {
		return "", err
	}
	path := filepath.Join(Scratch(), "bin", "envoy")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := os.WriteFile(path, nil, 0o755); err != nil {
		return "", fmt.Errorf("show Envoy's program to all users: %w", err)
	}
	if err := unix.Mount(from, path, "", unix.MS_BIND, ""); err != nil {
		return "", fmt.Errorf("show Envoy's program to all users: %w", err)
	}
	return path, nil
}

// allow tells the brokers the network namespaces of the pods in the mesh, as the agent does.
func (l *Lab) allow() error {
	for i, n := range l.nodes {
		var cookies strings.Builder
		for _, pod := range l.pods {
			if pod.Node != i || pod.Account == "" {
				continue
			}
			now, err := n.redirect.Verify(pod.UID)
			if err != nil {
				return err
			}
			fmt.Fprintln(&cookies, now.Pod.Cookie)
		}
		config := proxy.Config{Node: n.name, Dir: filepath.Join(l.scratch, "envoy")}
		if err := os.WriteFile(filepath.Join(config.GenerationDir(), "namespaces"), []byte(cookies.String()), 0o600); err != nil {
			return fmt.Errorf("tell the broker the pods' namespaces: %w", err)
		}
	}
	return nil
}

// Nodes is how many there are: fewer than two if New failed.
func (l *Lab) Nodes() int {
	if l == nil {
		return 0
	}
	return len(l.nodes)
}

// Cgroup is a node's: its Envoy is in "envoy" below, and pods' processes belong beside that (AsOnNodes).
func (l *Lab) Cgroup(node int) string { return l.nodes[node].cgroup }

// Netns is the path of the pod's network namespace.
func (p *Pod) Netns() string { return p.path }

// Issue makes a certificate of the lab's CA: chain and key in PEM; Roots is the trust bundle.
func (l *Lab) Issue(id string) (chain, key []byte, err error) { return l.authority.Issue(id) }

// Roots is the trust bundle in PEM.
func (l *Lab) Roots() []byte { return l.authority.Roots() }
