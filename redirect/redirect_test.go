package redirect

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
)

// The hooks are C and repeat what api/names says.
func TestHooksAgreeWithNames(t *testing.T) {
	for _, c := range []struct {
		name      string
		hook, our int
	}{
		{"first proxy port", int(weftPortPORT_FIRST), names.PortFirst},
		{"last proxy port", int(weftPortPORT_LAST), names.PortLast},
		{"pod class port", int(weftPortPORT_OUT_POD), names.PortOutPod},
		{"ports of a generation", int(weftPortGENERATION_ROW), names.GenerationRow},
		{"outbound role", int(weftRoleROLE_OUT), int(RoleOut)},
		{"inbound role", int(weftRoleROLE_IN), int(RoleIn)},
		{"server-first role", int(weftRoleROLE_IN_FIRST), int(RoleInFirst)},
		{"option level", int(weftOptionOPTION_LEVEL), names.SocketOptionLevel},
		{"option name", int(weftOptionOPTION_NAME), names.SocketOptionName},
		{"local leg", int(weftOptionTAG_LOCAL_LEG), names.TagLocalLeg},
		{"outbound leg", int(weftOptionTAG_OUTBOUND_LEG), names.TagOutboundLeg},
		{"counters", int(weftCounterCOUNTERS), len(counterNames)},
		{"counters of the short circuit", int(weftShortcutCounterSHORTCUT_COUNTERS), len(shortcutNames)},
	} {
		if c.hook != c.our {
			t.Errorf("%s: the hooks have %d, Go has %d", c.name, c.hook, c.our)
		}
	}
	for base, role := range map[uint16]Role{names.PortOutHTTP: RoleOut, names.PortIn: RoleIn, names.PortInFirst: RoleInFirst} {
		for generation := range uint32(4) {
			port := names.ListenPort(base, generation)
			if port < names.PortFirst || port > names.PortLast || Role((port-names.PortFirst)%names.GenerationRow) != role {
				t.Errorf("generation %d listens on %d, which is not of role %d", generation, port, role)
			}
		}
	}
}

func TestCountersHaveTheNamesOfTheHooks(t *testing.T) {
	spec, err := loadWeft()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		enum, prefix string
		names        []string
	}{{"counter", "COUNT_", counterNames[:]}, {"shortcut_counter", "", shortcutNames[:]}} {
		var enum *btf.Enum
		if err := spec.Types.TypeByName(c.enum, &enum); err != nil {
			t.Fatal(err)
		}
		for i, name := range c.names {
			if want := c.prefix + strings.ToUpper(name); enum.Values[i].Name != want || enum.Values[i].Value != uint64(i) {
				t.Errorf("counter %d is %s in the hooks, %s here", i, enum.Values[i].Name, want)
			}
		}
	}
}

func TestMetricsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/METRICS.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(counterNames[:], shortcutNames[:]...) {
		if !strings.Contains(string(page), "\n| `"+name+"` | ") {
			t.Errorf("docs/METRICS.md has no kind %s", name)
		}
	}
}

func TestOldKernelsAreRefusedTheShortCircuit(t *testing.T) {
	for release, refused := range map[string]bool{
		"5.15.0-91-generic": true, "6.1.192": true, "6.12.117+deb13-cloud-amd64": true, "6.17.9": true, "of this node": true, "": true,
		"6.18.0": false, "6.18-rc7": false, "6.18.44-x": false, "6.20.1": false, "7.0.1": false, "10.2": false,
	} {
		err := checkRelease(release)
		if refused != (err != nil) || refused && !errors.Is(err, ErrUnsupported) {
			t.Errorf("kernel %q: %v", release, err)
		}
	}
	r := &Redirect{log: slog.New(slog.DiscardHandler)}
	r.loadShortcut(func() error { return fmt.Errorf("which does what it should not: %w", ErrUnsupported) })
	if err := r.ShortcutRefused(); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
	if len(r.programs) > 0 {
		t.Error("it loaded programs")
	}
}

func TestAddressesKeepTheirBytes(t *testing.T) {
	for _, s := range []string{"10.96.0.1", "0.0.0.0", "255.255.255.255", "fd99::1:2", "::1"} {
		addr := netip.MustParseAddr(s)
		if got := addrOf(words(addr)); got != addr {
			t.Errorf("%s comes back as %s", addr, got)
		}
	}
	if got := words(netip.MustParseAddr("10.96.0.1")); got != words(netip.MustParseAddr("::ffff:10.96.0.1")) {
		t.Errorf("IPv4 differs from IPv4-mapped: %x", got)
	}
	if addrOf([4]uint32{}).IsValid() {
		t.Error("no address comes back as one")
	}
	at := netip.MustParseAddrPort("[fd10::1]:80")
	if got := addrPortOf(endpointOf(at)); got != at {
		t.Errorf("%s comes back as %s", at, got)
	}
}

func TestTextFitsItsField(t *testing.T) {
	field := [4]byte{9, 9, 9, 9}
	if err := text(field[:], "name", "ab"); err != nil || textOf(field[:]) != "ab" {
		t.Errorf("%q, %v", textOf(field[:]), err)
	}
	if err := text(field[:], "name", "abcd"); err == nil {
		t.Error("four bytes fit into three")
	}
}

func TestReservedPortsKeepTheirForm(t *testing.T) {
	for _, s := range []string{"", "8080", "1-3", "1-3,8,65535", "0-65535"} {
		ports, err := parsePorts(s)
		if err != nil {
			t.Errorf("%q: %v", s, err)
		} else if got := formatPorts(ports); got != s {
			t.Errorf("%q comes back as %q", s, got)
		}
	}
	for _, s := range []string{"x", "1-", "70000", "1-70000"} {
		if _, err := parsePorts(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
}

func TestListenersAreFoundInEitherWay(t *testing.T) {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		if l, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	defer l.Close()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	for name, list := range map[string]func() ([]uint16, error){"netlink": listeningPorts, "proc": listeningPortsOfProc} {
		// Other processes' listeners come and go meanwhile, and /proc then skips one at times.
		ports, err := list()
		for tries := 0; err == nil && !slices.Contains(ports, port) && tries < 10; tries++ {
			ports, err = list()
		}
		if errors.Is(err, unix.ENOENT) {
			t.Log("this kernel has no inet_diag, which the other way is for")
		} else if err != nil || !slices.Contains(ports, port) {
			t.Errorf("%s: port %d is not among %v, %v", name, port, ports, err)
		}
	}
}

func TestListsThatChangeMeanwhileAreAskedForAgain(t *testing.T) {
	interrupted := 3
	got, err := whole(func() ([]int, error) {
		if interrupted--; interrupted >= 0 {
			return []int{1}, netlink.ErrDumpInterrupted
		}
		return []int{1, 2}, nil
	})
	if err != nil || len(got) != 2 {
		t.Errorf("got %d entries, %v", len(got), err)
	}
	if _, err := whole(func() ([]int, error) { return nil, netlink.ErrDumpInterrupted }); !errors.Is(err, netlink.ErrDumpInterrupted) {
		t.Errorf("a list that never stands still: %v", err)
	}
}

func TestSteeringIDsAreUniqueAndReturnLate(t *testing.T) {
	a := newAllocator(1, 3)
	for want := range uint32(3) {
		if id := a.take(netip.AddrPort{}); id != want+1 {
			t.Errorf("id %d, want %d", id, want+1)
		}
	}
	a.free(2)
	a.free(1)
	if first, second := a.take(netip.AddrPort{}), a.take(netip.AddrPort{}); first != 1 || second != 2 {
		t.Errorf("freed ids return as %d, %d", first, second)
	}
	a.free(1)
	a.free(3)
	if id := a.take(netip.AddrPort{}); id != 3 {
		t.Errorf("id %d is given out before 3, which is next in turn", id)
	}
}

func TestLoadFailureNamesWhatIsMissing(t *testing.T) {
	cause := errors.New("the verifier's words")
	missing := []feature{
		{"an old thing", "4.13", func() error { return nil }},
		{"a new thing", "5.18", func() error { return fmt.Errorf("probe: %w", ebpf.ErrNotSupported) }},
	}
	err := explainFor("5.10.0", missing, nil, cause)
	for _, want := range []string{"kernel 5.10.0 lacks a new thing", "Linux 5.18", MinimumKernel, cause.Error()} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
	if !errors.Is(err, ErrUnsupported) || !errors.Is(err, cause) {
		t.Errorf("%v is neither ErrUnsupported nor its cause", err)
	}
	if err := explainFor("6.1.0", missing, []string{"CAP_BPF"}, cause); !strings.Contains(err.Error(), "CAP_BPF") || errors.Is(err, ErrUnsupported) {
		t.Errorf("without rights: %v", err)
	}
	if err := explainFor("6.1.0", missing[:1], nil, cause); errors.Is(err, ErrUnsupported) || !errors.Is(err, cause) {
		t.Errorf("another failure: %v", err)
	}
}

func TestConfigIsCheckedFirst(t *testing.T) {
	for want, cfg := range map[string]Config{
		"CgroupRoot":    {PinDir: "/x"},
		"PinDir":        {CgroupRoot: "/x", PinDir: filepath.Join("x", "y")},
		"KubeletCgroup": {CgroupRoot: "/x", PinDir: "/x", NodeNetns: "/x"},
		"steering":      {CgroupRoot: "/x", PinDir: "/x", Limits: Limits{Addresses: maxAddressID + 1}},
	} {
		if err := cfg.validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
	if l := (Limits{Pods: 7}).withDefaults(); l.Pods != 7 || l.ConnectionsPerPod != 4000 || l.Handovers == 0 || l.Services == 0 || l.Addresses == 0 {
		t.Errorf("defaults: %+v", l)
	}
}
