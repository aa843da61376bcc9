package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// The programs at the cgroup root, in the order in which they are attached: those that only refuse or answer first.
var rootHooks = []string{
	weftProgBind4, weftProgBind6, weftProgPostBind4, weftProgPostBind6,
	weftProgGetpeername4, weftProgGetpeername6, weftProgSocketOps, weftProgConnect4, weftProgConnect6,
}

// The programs at Envoy's cgroup, in the order in which they are attached; the first is loaded for each generation.
var proxyHooks = []string{weftProgProxySocketOps, weftProgProxyGetsockopt, weftProgProxySetsockopt}

// Redirect is one instance: its maps, programs and links in the kernel. Its methods may be called concurrently.
type Redirect struct {
	pins       pins
	cgroupRoot string
	kubelet    kubelet
	log        *slog.Logger
	spec       *ebpf.CollectionSpec
	maps       map[string]*ebpf.Map
	programs   map[string]*ebpf.Program
	tags       map[hookCopy]string

	mu       sync.Mutex
	instance weftInstance
	pods     map[string]uint64 // uid → netns cookie
	// shortcutRefused is why this kernel cannot have the short circuit; it never changes after Load.
	shortcutRefused error
	// capturedUntil holds, by netns cookie, when outbound capture of a pod was last on, if it was switched off since.
	capturedUntil map[uint64]time.Time
	services      map[netip.AddrPort]weftService
	addresses     map[netip.Addr]uint32
	serviceID     allocator
	addressID     allocator
}

// Load opens the instance pinned under cfg.PinDir, or makes it. It attaches what is missing, replaces programs that
// changed in place, and keeps every pod, service and connection. On failure the node is as it was before. The error is
// ErrUnsupported where the kernel is too old.
func Load(cfg Config) (*Redirect, error) { return loadObject(cfg, loadWeft) }

func loadObject(cfg Config, object func() (*ebpf.CollectionSpec, error)) (*Redirect, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if err := checkFilesystem(cfg.CgroupRoot, unix.CGROUP2_SUPER_MAGIC, "cgroup2", "give the node's cgroup2 mount, see /proc/self/mountinfo"); err != nil {
		return nil, err
	}
	if err := checkFilesystem(existing(cfg.PinDir), unix.BPF_FS_MAGIC, "bpffs", "mount one, usually at /sys/fs/bpf"); err != nil {
		return nil, err
	}
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	r := &Redirect{
		pins:       pins(cfg.PinDir),
		cgroupRoot: filepath.Clean(cfg.CgroupRoot),
		kubelet:    kubelet{path: cfg.KubeletCgroup},
		log:        log,
		maps:       map[string]*ebpf.Map{},
		programs:   map[string]*ebpf.Program{},
		tags:       map[hookCopy]string{},
	}
	var undo undoList
	if err := r.load(cfg, object, &undo); err != nil {
		err = errors.Join(err, undo.run())
		r.close()
		return nil, err
	}
	undo.drop()
	return r, nil
}

// load loads everything before it attaches anything, so that a kernel without a feature is left alone.
func (r *Redirect) load(cfg Config, object func() (*ebpf.CollectionSpec, error), undo *undoList) error {
	var err error
	if r.spec, err = object(); err != nil {
		return fmt.Errorf("load hooks: read the object: %w", err)
	}
	cfg.Limits = cfg.Limits.withDefaults()
	resize(r.spec, cfg.Limits)
	stale, err := ofOtherBoot(cfg)
	if err != nil {
		return err
	}
	fresh, err := r.openMaps(stale)
	if err != nil {
		return err
	}
	if err := r.loadPrograms(); err != nil {
		return err
	}
	r.loadShortcut(tryShortcut)
	if err := r.configure(cfg); err != nil {
		return err
	}
	if stale {
		if err := Release(cfg.PinDir, false); err != nil {
			return fmt.Errorf("load hooks: %w", err)
		}
		r.log.Info("pins of another boot released")
	}
	for _, dir := range []string{"", "maps", "hooks", "proxies", "pods"} {
		path := filepath.Join(cfg.PinDir, dir)
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			undo.removeFile(path)
		}
	}
	if err := r.pins.makeDirectories(); err != nil {
		return err
	}
	for _, name := range fresh {
		if err := r.maps[name].Pin(r.pins.mapFile(name)); err != nil {
			return fmt.Errorf("pin map: %w", err)
		}
		undo.removeFile(r.pins.mapFile(name))
	}
	if err := r.readBack(); err != nil {
		return err
	}
	if err := r.ensureHooks(undo); err != nil {
		return err
	}
	if err := r.refreshPrograms(undo); err != nil {
		return err
	}
	return r.writeInstance()
}

func resize(spec *ebpf.CollectionSpec, l Limits) {
	for name, entries := range map[string]uint32{
		weftMapPods: l.Pods, weftMapRecords: l.Pods, weftMapUsages: l.Pods, weftMapLegs: l.Pods, weftMapLostLegs: l.Pods,
		weftMapOwn: 16 * l.Pods, weftMapProbes: 16 * l.Pods, weftMapServerFirst: 16 * l.Pods, weftMapListeners: 8 * l.Pods,
		weftMapServices: l.Services, weftMapServiceIds: l.Services + l.Addresses, weftMapAddresses: l.Addresses,
		weftMapHandovers: l.Handovers, weftMapPeers: l.ShortcutSockets, weftMapJoined: l.ShortcutSockets, weftMapReceived: l.ShortcutSockets,
	} {
		spec.Maps[name].MaxEntries = entries
	}
}

// openMaps opens the pinned maps, unless they are stale, and makes the others, whose names it returns.
func (r *Redirect) openMaps(stale bool) (fresh []string, err error) {
	for name, spec := range r.spec.Maps {
		m, err := ebpf.LoadPinnedMap(r.pins.mapFile(name), nil)
		if stale && err == nil {
			err = errors.Join(fs.ErrNotExist, m.Close())
		}
		switch {
		case err == nil:
			spec.MaxEntries = m.MaxEntries()
			if err := spec.Compatible(m); err != nil {
				m.Close()
				return nil, fmt.Errorf("load hooks: the map pinned at %s is of another version; release the instance first (nodeproxy release): %w", r.pins.mapFile(name), err)
			}
		case errors.Is(err, fs.ErrNotExist):
			if m, err = ebpf.NewMap(spec); err != nil {
				return nil, explain(fmt.Errorf("make map %s: %w", name, err))
			}
			fresh = append(fresh, name)
		default:
			return nil, fmt.Errorf("load hooks: open map: %w", err)
		}
		r.maps[name] = m
	}
	return fresh, nil
}

// loadPrograms loads what every instance shares and tries the two programs that are loaded per pod and per Envoy.
func (r *Redirect) loadPrograms() error {
	spec := r.spec.Copy()
	delete(spec.Programs, weftProgLookup)
	delete(spec.Programs, weftProgProxySocketOps)
	loaded, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: r.maps})
	if err != nil {
		return explain(err)
	}
	defer loaded.Close()
	for name := range loaded.Programs {
		r.programs[name] = loaded.DetachProgram(name)
	}
	for _, name := range []string{weftProgLookup, weftProgProxySocketOps} {
		program, err := loadInstance(r.spec.Programs[name], r.maps, 0)
		if err != nil {
			return explain(err)
		}
		program.Close()
	}
	return nil
}

// configure fills the instance's own entry: whose probes pass, and the limit of new pods. A node whose kubelet cannot be
// told from other processes has no exemption, and works on.
func (r *Redirect) configure(cfg Config) error {
	r.instance = weftInstance{Limit: cfg.Limits.ConnectionsPerPod, Bound: uint16(min(cfg.Limits.ShortcutBytes>>10, math.MaxUint16))}
	if err := text(r.instance.BootId[:], "boot id", cfg.BootID); err != nil {
		return fmt.Errorf("load hooks: %w", err)
	}
	if cfg.NodeNetns != "" {
		ns, err := openNetns(cfg.NodeNetns)
		if err != nil {
			return fmt.Errorf("load hooks: node's netns: %w", err)
		}
		r.instance.NodeNetns = ns.cookie
		ns.close()
	}
	var before weftInstance
	if err := r.maps[weftMapConfig].Lookup(uint32(0), &before); err != nil {
		return fmt.Errorf("load hooks: read configuration: %w", err)
	}
	r.instance.OwnAddress = before.OwnAddress // until SetClientAddress says otherwise
	r.lookAtKubelet()
	return nil
}

// SetClientAddress says whether apps see their clients' addresses, or own: their pod's. It counts for connections that
// Envoy makes from now on.
func (r *Redirect) SetClientAddress(own bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if set := uint16(flag(own)); r.instance.OwnAddress != set {
		r.instance.OwnAddress = set
		return r.writeInstance()
	}
	return nil
}

// SetConnectionsPerPod changes the limit of captured connections, in each direction, for pods enrolled from now on.
// 0 is the default.
func (r *Redirect) SetConnectionsPerPod(n uint32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	limits := Limits{ConnectionsPerPod: n}.withDefaults()
	if r.instance.Limit == limits.ConnectionsPerPod {
		return nil
	}
	r.instance.Limit = limits.ConnectionsPerPod
	return r.writeInstance()
}

// Alive tells the hooks that there is an agent. Call it every few seconds: 30 s after the last time, where no Envoy listens
// either, a pod that is not Strict is as it would be without weft, in and out. Before the first call there is no such end.
func (r *Redirect) Alive() error {
	var now unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	if err == nil {
		err = r.maps[weftMapSeen].Put(uint32(0), uint64(now.Nano()))
	}
	if err != nil {
		return fmt.Errorf("say that the agent lives: %w", err)
	}
	return nil
}

// writeInstance puts r.instance into effect.
func (r *Redirect) writeInstance() error {
	if err := r.maps[weftMapConfig].Put(uint32(0), r.instance); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return nil
}

// cgroupID is the number that bpf_get_current_cgroup_id returns for processes of the directory.
func cgroupID(path string) (uint64, error) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return 0, fmt.Errorf("find cgroup %s: %w", path, err)
	}
	return stat.Ino, nil
}

func openCgroup(path string, attach ebpf.AttachType) (target, error) {
	file, err := os.Open(path)
	if err != nil {
		return target{}, fmt.Errorf("open cgroup: %w", err)
	}
	id, err := cgroupID(path)
	if err != nil {
		file.Close()
		return target{}, err
	}
	return target{file: file, attach: attach, id: id}, nil
}

// ensureHooks attaches what is missing at the cgroup root, and to sockets that join the short circuit.
func (r *Redirect) ensureHooks(undo *undoList) error {
	root, err := openCgroup(r.cgroupRoot, 0)
	if err != nil {
		return err
	}
	defer root.file.Close()
	for _, name := range rootHooks {
		root.attach = r.spec.Programs[name].AttachType
		change, err := ensureLink(r.pins.hook(name), root, r.programs[name], undo)
		if err != nil {
			return err
		}
		r.logChange(change, name)
	}
	return r.ensureShortcut(undo)
}

// keepHooks is ensureHooks of an instance that is loaded: what one hook lacks, the others keep.
func (r *Redirect) keepHooks() error {
	var undo undoList
	defer undo.drop()
	return r.ensureHooks(&undo)
}

func (r *Redirect) logChange(change linkChange, hook string) {
	switch change {
	case linkMade:
		r.log.Info("hook attached", "hook", hook)
	case linkReplaced:
		r.log.Info("hook replaced", "hook", hook)
	}
}

// refreshPrograms gives the links of pods and Envoys the programs of this version.
func (r *Redirect) refreshPrograms(undo *undoList) error {
	for uid, cookie := range r.pods {
		// One that is missing Enrol attaches, and Verify names.
		if err := r.refresh(r.pins.pod(cookie), weftProgLookup, cookie, undo); err != nil {
			return fmt.Errorf("refresh pod %s: %w", uid, err)
		}
	}
	generations, err := os.ReadDir(r.pins.proxies())
	if err != nil {
		return fmt.Errorf("list Envoys: %w", err)
	}
	for _, entry := range generations {
		generation, err := strconv.ParseUint(entry.Name(), 10, 32)
		if err != nil {
			continue
		}
		for _, name := range proxyHooks {
			if err := r.refresh(filepath.Join(r.pins.proxies(), entry.Name(), name), name, generation, undo); err != nil {
				return fmt.Errorf("refresh generation %d of Envoy: %w", generation, err)
			}
		}
	}
	return nil
}

// refresh replaces the program of the link pinned at path if it is of another version.
func (r *Redirect) refresh(path, name string, number uint64, undo *undoList) error {
	existing, err := openAttachment(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer existing.link.Close()
	if existing.id == 0 {
		return nil // detached: nothing runs there any more
	}
	program, err := r.program(name, number)
	if err != nil {
		return err
	}
	defer program.Close()
	same, err := sameProgram(existing.program, program)
	if err != nil || same {
		return err
	}
	if err := undo.replace(path, existing, program); err != nil {
		return err
	}
	r.logChange(linkReplaced, name)
	return nil
}

// Close lets go of the instance and leaves it working in the kernel.
func (r *Redirect) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.close()
}

func (r *Redirect) close() error {
	var errs []error
	for _, p := range r.programs {
		errs = append(errs, p.Close())
	}
	for _, m := range r.maps {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}
