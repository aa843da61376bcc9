package snapshot

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestDiff(t *testing.T) {
	before := Snapshot{Link: {"a": "veth", "b": "veth"}, Sysctl: {"x": "1"}}
	after := Snapshot{Link: {"b": "bridge", "c": "veth"}, Sysctl: {"x": "1"}, Rule: {"r": "present"}}
	var got []string
	for _, change := range Diff(before, after) {
		got = append(got, change.String())
	}
	want := []string{"lost link a (veth)", "changed link b: bridge, was veth", "new link c (veth)", "new routing rule r (present)"}
	if !slices.Equal(got, want) {
		t.Errorf("Diff: got %q, want %q", got, want)
	}
	if changes := Diff(after, after); len(changes) != 0 {
		t.Errorf("Diff of equal snapshots: got %v, want none", changes)
	}
}

// What is left behind must be seen: one process in namespaces of its own and one link are, while they exist.
func TestSettleSeesWhatIsLeft(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make a link and namespaces")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	before, err := Take(ctx)
	if err != nil {
		t.Fatal(err)
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "weftsnapshot0"}}
	if err := netlink.LinkAdd(bridge); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(bridge) })
	sleeper := exec.Command("sleep", "600")
	sleeper.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	net, err := os.Readlink("/proc/" + strconv.Itoa(sleeper.Process.Pid) + "/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	ours := func(c Change) bool {
		return c.Kind == Link && bridge.Name+" ("+strconv.Itoa(bridge.Attrs().Index)+")" == c.Key || c.Kind == NetNamespace && c.Key == net
	}
	short, cancelShort := context.WithCancel(ctx)
	defer cancelShort()
	left, err := Settle(short, before, func(c Change) bool { cancelShort(); return ours(c) })
	if err != nil || len(left) != 2 {
		t.Errorf("Settle while a link and a namespace are left: got %v, %v, want both", left, err)
	}
	if err := sleeper.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = sleeper.Wait()
	if err := netlink.LinkDel(bridge); err != nil {
		t.Fatal(err)
	}
	left, err = Settle(ctx, before, ours)
	if err != nil || len(left) != 0 {
		t.Errorf("Settle after they went: got %v, %v, want nothing", left, err)
	}
}

// Time may run out in the midst of a snapshot: what the last whole one saw is still said.
func TestSettleInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	taken := 0
	take := func(ctx context.Context) (Snapshot, error) {
		if taken++; taken > 1 {
			cancel()
			return nil, ctx.Err()
		}
		return Snapshot{Link: {"a": "veth"}}, nil
	}
	left, err := settle(ctx, take, Snapshot{}, nil)
	if err != nil || len(left) != 1 || taken != 2 {
		t.Errorf("got %v, %v after %d snapshots, want the link", left, err, taken)
	}
	if left, err := settle(ctx, take, Snapshot{}, nil); err == nil {
		t.Errorf("no whole snapshot: got %v, want an error", left)
	}
}
