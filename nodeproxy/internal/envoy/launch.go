package envoy

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Launch is what the launcher needs to know; the supervisor hands it over in an environment variable.
type Launch struct {
	Path     string
	Args     []string
	UID, GID int
	// Groups are supplementary: the one that owns the sockets' folder.
	Groups []int
	// Cgroup is the v2 cgroup to join before anything else.
	Cgroup string
}

// LaunchVariable carries a Launch as JSON.
const LaunchVariable = "WEFT_ENVOY_LAUNCH"

// DrainTime is how long Envoy lets the connections of a filter chain go on that a change of its listener took away; then it
// cuts them (docs/LIFECYCLE.md).
const DrainTime = 5 * time.Second

// launchListener is the descriptor of the socket by which the supervisor gets the listener of Envoy's notifications.
const launchListener = 3

// Exec turns the calling process into Envoy: in its cgroup, with its own uid, no capability and no way to one, and the system calls
// of the allow-list, some of which the broker answers. It returns only on failure.
func Exec() error {
	var l Launch
	if err := json.Unmarshal([]byte(os.Getenv(LaunchVariable)), &l); err != nil {
		return fmt.Errorf("read %s: %w", LaunchVariable, err)
	}
	// Credentials and the filter are this thread's; execve takes them over and ends all others.
	runtime.LockOSThread()
	if err := joinCgroup(l.Cgroup); err != nil {
		return err
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil && files.Cur < files.Max {
		files.Cur = files.Max
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
			return fmt.Errorf("raise the limit of open files: %w", err)
		}
	}
	if err := dropRights(l); err != nil {
		return err
	}
	// After the change of user, which would clear it.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("bind life to the supervisor's: %w", err)
	}
	unix.CloseOnExec(launchListener)
	handOver := func(listener int) error {
		return unix.Sendmsg(launchListener, []byte{0}, unix.UnixRights(listener), nil, 0)
	}
	if err := confine(l.Path, l.Args, []string{"HOME=/nonexistent"}, handOver); err != nil {
		return fmt.Errorf("run %s: %w", l.Path, err)
	}
	return nil
}

// dropRights changes the calling thread's user and leaves it no capability.
func dropRights(l Launch) error {
	for c := range uintptr(unix.CAP_LAST_CAP + 1) {
		// EINVAL: this kernel does not know the capability; EPERM: no SETPCAP, and no_new_privs makes the set useless.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	groups := make([]uint32, len(l.Groups)+1)
	for i, g := range l.Groups {
		groups[i] = uint32(g)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(l.Groups)), uintptr(unsafe.Pointer(&groups[0])), 0); e != 0 {
		return fmt.Errorf("set groups: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(l.GID), uintptr(l.GID), uintptr(l.GID)); e != 0 {
		return fmt.Errorf("set group %d: %w", l.GID, e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(l.UID), uintptr(l.UID), uintptr(l.UID)); e != 0 {
		return fmt.Errorf("set user %d: %w", l.UID, e)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}

type table struct{ path, argv, env uintptr }

// stringTable lays execve's arguments out in a mapping of their own, at an address that the kernel chose.
func stringTable(argv, env []string) (table, error) {
	const size = 1 << 20
	mapping, err := unix.MmapPtr(-1, 0, nil, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return table{}, fmt.Errorf("map arguments: %w", err)
	}
	base, memory := uintptr(mapping), unsafe.Slice((*byte)(mapping), size)
	at := uintptr(0)
	place := func(b []byte) (uintptr, error) {
		if at+uintptr(len(b)) > size {
			return 0, errors.New("map arguments: more than 1 MiB")
		}
		copy(memory[at:], b)
		address := base + at
		at += (uintptr(len(b)) + 7) &^ 7
		return address, nil
	}
	list := func(texts []string) (uintptr, uintptr, error) {
		var pointers []byte
		first := uintptr(0)
		for i, s := range texts {
			address, err := place(append([]byte(s), 0))
			if err != nil {
				return 0, 0, err
			}
			if i == 0 {
				first = address
			}
			pointers = appendPointer(pointers, address)
		}
		start, err := place(appendPointer(pointers, 0))
		return start, first, err
	}
	argvAt, path, err := list(argv)
	if err != nil {
		return table{}, err
	}
	envAt, _, err := list(env)
	return table{path, argvAt, envAt}, err
}

func appendPointer(b []byte, p uintptr) []byte {
	for range 8 {
		b = append(b, byte(p))
		p >>= 8
	}
	return b
}
