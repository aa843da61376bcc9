package kernels

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strings"
)

// A file system for the kernel to start from, in cpio's "newc" format (Documentation/driver-api/early-userspace/
// buffer-format.rst in the kernel's source). Every file in it can be executed.
type initramfs struct {
	out     io.Writer
	written int
	inode   int
	err     error
}

const (
	modeFolder  = 0o040755
	modeProgram = 0o100755
)

// writeInitramfs writes the files, contents by path in the machine, with the folders they lie in and those named.
func writeInitramfs(out io.Writer, files map[string][]byte, folders ...string) error {
	i := &initramfs{out: out}
	// The root comes first: it must be open to all, for the tests look at files as other users.
	all := map[string]bool{".": true}
	for name := range files {
		for dir := path.Dir(clean(name)); dir != "."; dir = path.Dir(dir) {
			all[dir] = true
		}
	}
	for _, dir := range folders {
		all[clean(dir)] = true
	}
	for _, dir := range sorted(all) {
		i.entry(dir, modeFolder, nil)
	}
	for _, name := range sorted(files) {
		i.entry(clean(name), modeProgram, files[name])
	}
	i.entry("TRAILER!!!", 0, nil)
	if i.err != nil {
		return fmt.Errorf("write initramfs: %w", i.err)
	}
	return nil
}

// clean is a path as the archive names it: without the leading slash.
func clean(name string) string { return strings.TrimPrefix(path.Clean(name), "/") }

func sorted[V any](m map[string]V) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

func (i *initramfs) entry(name string, mode int, content []byte) {
	i.inode++
	links := 1
	if mode == modeFolder {
		links = 2
	}
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		i.inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
	i.write([]byte(header))
	i.write(append([]byte(name), 0))
	i.pad()
	i.write(content)
	i.pad()
}

// pad fills to the next multiple of four, where headers and contents start.
func (i *initramfs) pad() { i.write(bytes.Repeat([]byte{0}, -i.written&3)) }

func (i *initramfs) write(b []byte) {
	if i.err == nil {
		_, i.err = i.out.Write(b)
		i.written += len(b)
	}
}

// readFiles reads the machine's files from this machine's.
func readFiles(files map[string]string) (map[string][]byte, error) {
	contents := map[string][]byte{}
	for to, from := range files {
		content, err := os.ReadFile(from)
		if err != nil {
			return nil, fmt.Errorf("read a file for the initramfs: %w", err)
		}
		contents[to] = content
	}
	return contents, nil
}
