package redirect

import (
	"fmt"
	"log/slog"
	"path/filepath"
)

// Config says where one instance attaches and keeps its state. The zero Limits are the defaults.
type Config struct {
	// CgroupRoot is the cgroup2 directory whose processes the hooks see: the node's pods, Envoy and, for probes,
	// kubelet must live in it or below. Usually the cgroup2 mount itself.
	CgroupRoot string
	// PinDir is a directory on a bpffs that belongs to this instance alone. Load makes it.
	PinDir string
	// NodeNetns is the path of the node's own network namespace, from which kubelet probes. Empty, for an agent that
	// cannot open it (a container needs SYS_PTRACE for that): probes are known by KubeletCgroup alone.
	NodeNetns string
	// KubeletCgroup is the cgroup2 directory of kubelet, which need not be there yet. While it is the root, or holds
	// another process, or if it is empty, no probe passes a Strict pod: see ProbesRefused.
	KubeletCgroup string
	// BootID names the node's boot. Pins made under another one are released by Load, for they speak of pods that are
	// gone. Empty: pins are always kept.
	BootID string
	// Limits bound the kernel maps. They count for new pins; existing maps keep their sizes.
	Limits Limits
	// Log receives what is repaired or replaced. Nil: nothing is logged.
	Log *slog.Logger
}

// Limits bound the entries of the kernel maps. Zero means the default named with each field.
type Limits struct {
	// Pods is the number of enrolled or gated pods on the node. Default 1024.
	Pods uint32
	// Services is the number of service addresses (address and port). Default 65536, most 2097151.
	Services uint32
	// Addresses is the number of enrolled pods' addresses in the whole cluster. Default 65536, most 1048575.
	Addresses uint32
	// Handovers is the number of connections on their way from connect(2) to the accepting socket, all pods together.
	// Default 65536.
	Handovers uint32
	// ConnectionsPerPod bounds the captured connections that one pod holds open, outbound and inbound each. Default 4000.
	ConnectionsPerPod uint32
	// ShortcutSockets is the number of sockets, of apps and Envoy, in the short circuit; those beyond stay on TCP. Default 32768.
	ShortcutSockets uint32
	// ShortcutBytes bounds what waits in one socket by the short circuit; the rest goes by TCP. In whole KiB,
	// most 64 MiB. Default 1 MiB.
	ShortcutBytes uint32
}

func (l Limits) withDefaults() Limits {
	for _, f := range []struct {
		field    *uint32
		fallback uint32
	}{{&l.Pods, 1024}, {&l.Services, 65536}, {&l.Addresses, 65536}, {&l.Handovers, 65536}, {&l.ConnectionsPerPod, 4000},
		{&l.ShortcutSockets, 32768}, {&l.ShortcutBytes, 1 << 20}} {
		if *f.field == 0 {
			*f.field = f.fallback
		}
	}
	return l
}

func (c Config) validate() error {
	for _, d := range []struct{ name, path string }{{"CgroupRoot", c.CgroupRoot}, {"PinDir", c.PinDir}} {
		if !filepath.IsAbs(d.path) {
			return fmt.Errorf("load hooks: %s %q is not an absolute path", d.name, d.path)
		}
	}
	if c.Limits.Services > maxServiceID || c.Limits.Addresses > maxAddressID {
		return fmt.Errorf("load hooks: at most %d services and %d addresses fit into the steering range", maxServiceID, maxAddressID)
	}
	if c.NodeNetns != "" && c.KubeletCgroup == "" {
		return fmt.Errorf("load hooks: NodeNetns alone lets no probe pass: set KubeletCgroup too")
	}
	return nil
}
