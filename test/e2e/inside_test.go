//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weftmesh/weft/test/cluster"
)

// inside is what weft could change inside the nodes and in the network namespaces of their pods, which the machine's own
// snapshot does not see: by place and kind, the lines.
type inside map[string]map[string]bool

// kinds of what is inside, each with the shell command that lists it, one thing a line.
var (
	networkKinds = map[string]string{
		"addresses": "ip -o address show | sed 's/ valid_lft.*//'",
		"rules":     "ip rule show && ip -6 rule show",
		"routes":    "ip route show table all && ip -6 route show table all",
		// kube-proxy rewrites its own tables whenever any Service changes.
		"nftables": `nft --stateless list ruleset | awk '/^table/ {table = $0; skip = /kube-proxy/} !skip && NF && $0 != "}" {print table, $0}'`,
		"sysctls":  `find /proc/sys/net -type f ! -name '*conntrack_count' ! -name stable_secret -perm -u=r -exec grep -H '' {} + 2>/dev/null; true`,
	}
	nodeKinds = map[string]string{
		"mounts": `awk '{for (i = 7; $i != "-"; i++); print $5, $4, $(i+1), $(i+2)}' /proc/self/mountinfo`,
		"files":  "find /sys/fs/bpf /run/weft 2>/dev/null; true",
	}
)

// lookInside lists all kinds on every node and in every pod that a namespace other than weft's own has.
func lookInside(ctx context.Context) (inside, error) {
	found := inside{}
	for _, n := range k8s.Nodes {
		for kind, script := range nodeKinds {
			if err := found.list(ctx, n, n.Name+": "+kind, script); err != nil {
				return nil, err
			}
		}
		for kind, script := range networkKinds {
			if err := found.list(ctx, n, n.Name+": "+kind, script); err != nil {
				return nil, err
			}
		}
	}
	pods, err := podNetworks(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		for kind, script := range networkKinds {
			if err := found.list(ctx, p.node, p.name+": "+kind, "nsenter --net="+p.netns+" sh -c "+quote(script)); err != nil {
				return nil, err
			}
		}
	}
	return found, nil
}

func (s inside) list(ctx context.Context, n cluster.Node, place, script string) error {
	out, err := n.Command(ctx, "sh", "-c", script).Output()
	if err != nil {
		return fmt.Errorf("list %s: %w", place, err)
	}
	s[place] = map[string]bool{}
	for l := range strings.Lines(string(out)) {
		if l = strings.TrimSpace(l); l != "" {
			s[place][l] = true
		}
	}
	return nil
}

func quote(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }

type podNetwork struct {
	name  string
	node  cluster.Node
	netns string
}

// podNetworks finds the network namespace of every pod that has one of its own, by its address.
func podNetworks(ctx context.Context) ([]podNetwork, error) {
	byAddress := map[string]string{}
	for _, namespace := range []string{"mesh", "outside", "kube-system"} {
		pods, err := k8s.Pods(ctx, namespace, "")
		if err != nil {
			return nil, err
		}
		for _, p := range pods {
			if len(p.IPs) > 0 && !p.Deleting {
				byAddress[p.IPs[0]] = p.Namespace + "/" + p.Name + " " + p.UID
			}
		}
	}
	var all []podNetwork
	for _, n := range k8s.Nodes {
		names, err := os.ReadDir(fmt.Sprintf("/proc/%d/root/run/netns", n.PID))
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			netns := filepath.Join("/run/netns", name.Name())
			out, err := n.Command(ctx, "nsenter", "--net="+netns, "ip", "-o", "-4", "address", "show", "scope", "global").Output()
			if err != nil {
				continue // it went meanwhile
			}
			for line := range strings.Lines(string(out)) {
				f := strings.Fields(line)
				if len(f) < 4 {
					continue
				}
				address, _, _ := strings.Cut(f[3], "/")
				if pod := byAddress[address]; pod != "" {
					all = append(all, podNetwork{pod, n, netns})
				}
			}
		}
	}
	return all, nil
}

// changes lists what differs at the places that both have: "place: + line" or "place: - line".
func (s inside) changes(now inside) []string {
	var out []string
	for place, before := range s {
		after, ok := now[place]
		if !ok {
			continue // the pod has gone
		}
		for l := range before {
			if !after[l] {
				out = append(out, place+": - "+l)
			}
		}
		for l := range after {
			if !before[l] {
				out = append(out, place+": + "+l)
			}
		}
	}
	slices.Sort(out)
	return out
}

// matching lists the lines that contain a text.
func (s inside) matching(text string) (found []string) {
	for place, lines := range s {
		for l := range lines {
			if strings.Contains(l, text) {
				found = append(found, place+": "+l)
			}
		}
	}
	return found
}

// common counts the places that both have.
func (s inside) common(now inside) int {
	n := 0
	for place := range maps.Keys(s) {
		if _, ok := now[place]; ok {
			n++
		}
	}
	return n
}
