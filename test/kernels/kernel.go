package kernels

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Kernel is one kernel in the cache.
type Kernel struct {
	// Version is the Debian package's, "6.1.192-2".
	Version string
	// Image is the file to boot.
	Image string
	// Modules are the modules' files, in the order to load them.
	Modules []string
}

// Lines are the kernels that the tests run on, each the newest of its line in Debian 12 and its backports.
var Lines = []string{"6.1", "6.12"}

// Cache is where kernels are kept, for all clones of the repository.
func Cache() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache: %w: set HOME or XDG_CACHE_HOME", err)
	}
	return filepath.Join(dir, "weft", "kernels"), nil
}

// Find returns the newest kernel of a line that is in the cache, or fetches the newest there is.
func Find(ctx context.Context, cache, line string) (*Kernel, error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, fmt.Errorf("make the cache of kernels: %w", err)
	}
	unlock, err := lock(filepath.Join(cache, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if k := cached(ctx, cache, line); k != nil {
		return k, nil
	}
	k, err := fetch(ctx, cache, line)
	if err != nil {
		return nil, fmt.Errorf("fetch Debian's kernel %s, which is not in %s: connect this machine to its Debian mirror, or copy that folder from a machine where `make test-kernels` ran: %w", line, cache, err)
	}
	return k, nil
}

// lock waits until no other process fetches.
func lock(path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock the cache of kernels: %w", err)
	}
	for {
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("lock the cache of kernels: %w", err)
	}
	return func() { file.Close() }, nil
}

// cached finds the newest complete kernel of a line.
func cached(ctx context.Context, cache, line string) (best *Kernel) {
	folders, _ := filepath.Glob(filepath.Join(cache, line+".*"))
	for _, folder := range folders {
		k, err := open(folder)
		if err == nil && (best == nil || newer(ctx, k.Version, best.Version)) {
			best = k
		}
	}
	return best
}

// open reads a kernel's folder: vmlinuz, modules/*.ko and modules.builtin.
func open(folder string) (*Kernel, error) {
	k := &Kernel{Version: filepath.Base(folder), Image: filepath.Join(folder, "vmlinuz")}
	if _, err := os.Stat(k.Image); err != nil {
		return nil, err
	}
	builtin, err := builtinModules(filepath.Join(folder, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	paths, err := filepath.Glob(filepath.Join(folder, "modules", "*.ko"))
	if err != nil {
		return nil, err
	}
	files := map[string]string{}
	for _, path := range paths {
		files[moduleName(path)] = path
	}
	order, err := loadOrder(wanted, func(name string) ([]string, bool, error) {
		if builtin[name] {
			return nil, false, nil
		}
		if files[name] == "" {
			return nil, false, fmt.Errorf("find kernel module %s: it is neither in %s nor in the kernel", name, folder)
		}
		needed, err := dependencies(files[name])
		return needed, true, err
	})
	for _, name := range order {
		k.Modules = append(k.Modules, files[name])
	}
	return k, err
}

// fetch downloads the newest kernel of a line and puts what the tests need of it into the cache.
func fetch(ctx context.Context, cache, line string) (*Kernel, error) {
	work, err := os.MkdirTemp(cache, "fetch-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	apt, err := openArchive(ctx, filepath.Join(work, "apt"))
	if err != nil {
		return nil, err
	}
	p, err := apt.newest(ctx, line)
	if err != nil {
		return nil, err
	}
	download := filepath.Join(work, "download")
	if err := os.Mkdir(download, 0o755); err != nil {
		return nil, err
	}
	deb, err := apt.download(ctx, p, download)
	if err != nil {
		return nil, err
	}
	tree := filepath.Join(work, "tree")
	if _, err := output(ctx, "", "dpkg-deb", "-x", deb, tree); err != nil {
		return nil, err
	}
	made := filepath.Join(work, p.version)
	if err := arrange(ctx, tree, made); err != nil {
		return nil, fmt.Errorf("unpack %s: %w", p.name, err)
	}
	if _, err := open(made); err != nil {
		return nil, fmt.Errorf("unpack %s: %w", p.name, err)
	}
	folder := filepath.Join(cache, p.version)
	if err := errors.Join(os.RemoveAll(folder), os.Rename(made, folder)); err != nil {
		return nil, err
	}
	return open(folder)
}

// arrange moves what the tests need from a package's tree into the form that open reads.
func arrange(ctx context.Context, tree, folder string) error {
	images, err := filepath.Glob(filepath.Join(tree, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return fmt.Errorf("find the kernel: %d are in the package, %w", len(images), err)
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	modules := filepath.Join(tree, "lib", "modules", release)
	if _, err := os.Stat(modules); err != nil {
		modules = filepath.Join(tree, "usr", "lib", "modules", release)
	}
	builtin, err := builtinModules(filepath.Join(modules, "modules.builtin"))
	if err != nil {
		return err
	}
	files := map[string]string{}
	err = filepath.WalkDir(modules, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && strings.Contains(entry.Name(), ".ko") {
			files[moduleName(path)] = path
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(folder, "modules"), 0o755); err != nil {
		return err
	}
	_, err = loadOrder(wanted, func(name string) ([]string, bool, error) {
		if builtin[name] || files[name] == "" {
			return nil, false, nil // open says what is missing
		}
		plain := filepath.Join(folder, "modules", name+".ko")
		if err := unpackModule(ctx, files[name], plain); err != nil {
			return nil, false, err
		}
		needed, err := dependencies(plain)
		return needed, true, err
	})
	if err != nil {
		return err
	}
	return errors.Join(
		os.Rename(filepath.Join(modules, "modules.builtin"), filepath.Join(folder, "modules.builtin")),
		os.Rename(images[0], filepath.Join(folder, "vmlinuz")))
}

func unpackModule(ctx context.Context, from, to string) error {
	if filepath.Ext(from) == ".xz" {
		content, err := output(ctx, "", "xz", "-dc", from)
		if err != nil {
			return err
		}
		return os.WriteFile(to, []byte(content), 0o644)
	}
	return os.Rename(from, to)
}
