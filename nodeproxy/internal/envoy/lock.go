package envoy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const lockPoll = 100 * time.Millisecond

// Lock takes the first of some lock files that is free, for as long as this process lives, or until release, which removes the
// file. While other processes have all of them, Lock waits, and says so by waits once.
func Lock(ctx context.Context, waits func(), paths ...string) (taken int, release func(), err error) {
	for told := false; ; {
		for i, path := range paths {
			release, err := TryLock(path)
			if err != nil {
				return 0, nil, err
			}
			if release != nil {
				return i, release, nil
			}
		}
		if !told {
			waits()
			told = true
		}
		select {
		case <-ctx.Done():
			return 0, nil, ctx.Err()
		case <-time.After(lockPoll):
		}
	}
}

// TryLock takes a lock file if no process has it; release is nil if one does.
func TryLock(path string) (release func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil && named(f, path) {
		return func() { _ = os.Remove(path); _ = f.Close() }, nil
	}
	_ = f.Close()
	if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return nil, nil
}

// Running tells whether any generation of Envoy has a supervisor.
func Running(runDir string) bool { return slices.ContainsFunc(locks(runDir), Locked) }

// Locked tells whether a process has a lock file.
func Locked(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// named tells whether the file still has that name: who had the lock may have removed it.
func named(f *os.File, path string) bool {
	own, err := f.Stat()
	there, err2 := os.Stat(path)
	return err == nil && err2 == nil && os.SameFile(own, there)
}
