package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/weftmesh/weft/nodeproxy/internal/envoy"
)

// During an upgrade a node has two agents. One owns the node: the kernel's maps, the pods, the socket that Envoys ask. The
// agent of the later pod asks for it, and the other lets go as it does when it ends: kernel and Envoys stay as they are. It stands
// by from then on, and takes over if its successor dies.

// ErrSucceeded is Run's error when the agent of a later pod has asked for the node.
var ErrSucceeded = errors.New("another agent takes the node")

// Files below the run folder.
const (
	ownerLock = "agent.lock"   // its holder owns the node
	nextLock  = "agent.next"   // its holder asks for it
	ownerList = "agent.owners" // uids of the pods whose agents have begun on the node, the first first
	// mostOwners bounds the list.
	mostOwners = 16
	nextPoll   = 100 * time.Millisecond
)

// ownerFiles are those that stay when an agent ends, or is killed.
var ownerFiles = []string{ownerList, ownerList + envoy.NextFile, nextLock}

// own takes the node, from the agent of an earlier pod if there is one.
func own(ctx context.Context, c Config) (release func(), err error) {
	if err := os.MkdirAll(c.RunDir, 0o750); err != nil {
		return nil, fmt.Errorf("make run folder: %w", err)
	}
	lock, next := filepath.Join(c.RunDir, ownerLock), filepath.Join(c.RunDir, nextLock)
	if err := noteOwner(c); err != nil { // first, so that who has to let go does not ask in turn
		return nil, err
	}
	first := asks(c)
	if first {
		_, asked, err := envoy.Lock(ctx, func() { c.Log.Info("yet another agent asks for the node, waiting") }, next)
		if err != nil {
			return nil, fmt.Errorf("ask for the node: %w", err)
		}
		defer asked()
	}
	for told := false; ; told = true {
		if first || !envoy.Locked(next) { // who asks goes first
			if release, err = envoy.TryLock(lock); err != nil || release != nil {
				return release, err
			}
		}
		if !told {
			c.Log.Info("another agent has the node, waiting for it to go")
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("take the node: %w", ctx.Err())
		case <-time.After(nextPoll):
		}
	}
}

// asks tells whether the agent may have the node of who has it now: that of the last pod may, after it died too.
func asks(c Config) bool {
	owners := readOwners(c)
	return c.PodUID != "" && len(owners) > 0 && owners[len(owners)-1] == c.PodUID
}

func readOwners(c Config) []string {
	text, _ := os.ReadFile(filepath.Join(c.RunDir, ownerList))
	return strings.Fields(string(text))
}

// noteOwner keeps which pods came first: an agent that comes back stays where it was.
func noteOwner(c Config) error {
	owners := readOwners(c)
	if c.PodUID == "" || slices.Contains(owners, c.PodUID) {
		return nil
	}
	owners = append(owners, c.PodUID)
	owners = owners[max(0, len(owners)-mostOwners):]
	if err := envoy.ReplaceFile(filepath.Join(c.RunDir, ownerList), []byte(strings.Join(owners, "\n")+"\n")); err != nil {
		return fmt.Errorf("note who has the node: %w", err)
	}
	return nil
}

// succeeded waits until another agent asks for the node; false: ctx ended.
func succeeded(ctx context.Context, c Config) bool {
	tick := time.NewTicker(nextPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
		if envoy.Locked(filepath.Join(c.RunDir, nextLock)) {
			return true
		}
	}
}
