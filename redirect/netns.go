package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// namespace is an open network namespace and the two numbers by which the kernel names it.
type namespace struct {
	file   *os.File
	inode  uint64
	cookie uint64
}

// openNetns opens the namespace at path; the caller closes it. ErrNetnsGone if there is none.
func openNetns(path string) (*namespace, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open network namespace %s: %w", path, ErrNetnsGone)
	} else if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	ns := &namespace{file: file}
	var stat unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &stat); err != nil {
		file.Close()
		return nil, fmt.Errorf("read inode of network namespace %s: %w", path, err)
	}
	ns.inode = stat.Ino
	err = ns.run(func() error {
		s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		ns.cookie, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	})
	if errors.Is(err, unix.EINVAL) {
		// Setns refuses what is no namespace: the file outlived the mount on it.
		err = errors.Join(err, ErrNetnsGone)
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("read cookie of network namespace %s: %w", path, err)
	}
	return ns, nil
}

func (ns *namespace) close() { ns.file.Close() }

// run calls f on a thread inside the namespace. The thread ends with it: nothing else ever runs there.
func (ns *namespace) run(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // not unlocked, so that the thread is thrown away
		if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		result <- f()
	}()
	return <-result
}
