package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// buildFlags are the flags of every go build and go install. Two packages at a time: linking Kubernetes takes 2 GB.
var buildFlags = []string{"-trimpath", "-p=2"}

// Build makes what is missing in the cache and returns its folder. Finished programs are renamed into place one by
// one, so an interrupted build goes on where it stopped; one build runs at a time on the machine.
func Build(ctx context.Context, c Config) (string, error) {
	folder, err := c.cacheFolder()
	if err != nil {
		return "", err
	}
	if c.missing(folder) == 0 {
		return folder, c.buildImages(ctx, folder)
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return "", fmt.Errorf("make the cache folder: %w", err)
	}
	unlock, err := lockFile(ctx, filepath.Join(filepath.Dir(folder), "lock"), func(holder string) {
		fmt.Fprintf(os.Stderr, "another clone builds into the same cache, %s; waiting for it\n", holder)
	})
	if err != nil {
		return "", err
	}
	defer unlock()
	if err := removeAborted(folder); err != nil {
		return "", err
	}
	var todo []artefact
	for _, a := range artefacts() {
		if !a.done(folder) {
			todo = append(todo, a)
		}
	}
	for i, a := range todo {
		log := filepath.Join(folder, "logs", a.Name+".log")
		if err := progress(step{Number: i + 1, Of: len(todo), Name: "build " + a.Name + " " + a.Version, Expected: a.Expected, Log: log}, func() error {
			return c.buildArtefact(ctx, a, folder, log)
		}); err != nil {
			return "", err
		}
	}
	return folder, c.buildImages(ctx, folder)
}

// removeAborted deletes what interrupted builds left; the caller holds the lock.
func removeAborted(folder string) error {
	left, err := filepath.Glob(filepath.Join(folder, "build-*"))
	if err != nil {
		return fmt.Errorf("look for interrupted builds: %w", err)
	}
	for _, name := range left {
		if err := os.RemoveAll(name); err != nil {
			return fmt.Errorf("remove an interrupted build: %w", err)
		}
	}
	return nil
}

// missing counts the artefacts that are still to be built.
func (c Config) missing(folder string) int {
	n := 0
	for _, a := range artefacts() {
		if !a.done(folder) {
			n++
		}
	}
	return n
}

func (a artefact) done(folder string) bool {
	for _, program := range a.Programs {
		if _, err := os.Stat(filepath.Join(folder, a.Folder, program)); err != nil {
			return false
		}
	}
	return true
}

func (c Config) buildArtefact(ctx context.Context, a artefact, folder, log string) error {
	work, err := os.MkdirTemp(folder, "build-"+a.Name+"-")
	if err != nil {
		return fmt.Errorf("make a folder for the build: %w", err)
	}
	defer os.RemoveAll(work)
	flags := append(append([]string{}, buildFlags...), "-ldflags", strings.TrimSpace("-s -w "+a.LDFlags))
	var command *exec.Cmd
	if a.Source != "" {
		command = outside(ctx, "go", append(append([]string{"build"}, flags...), "-o", filepath.Join(work, a.Programs[0]), ".")...)
		command.Dir = filepath.Join(c.Dir, a.Source)
	} else {
		arguments := append([]string{"install"}, flags...)
		for _, name := range a.Packages {
			arguments = append(arguments, name+"@"+a.Version)
		}
		command = outside(ctx, "go", arguments...)
		command.Dir = work
	}
	command.Env = append(os.Environ(), "CGO_ENABLED=0", "GOTOOLCHAIN=local", "GOBIN="+work, "GOWORK=off")
	if err := runLogged(command, log); err != nil {
		return fmt.Errorf("build %s %s: %w", a.Name, a.Version, err)
	}
	if err := os.MkdirAll(filepath.Join(folder, a.Folder), 0o755); err != nil {
		return fmt.Errorf("make the folder of programs: %w", err)
	}
	for _, program := range a.Programs {
		if err := os.Rename(filepath.Join(work, program), filepath.Join(folder, a.Folder, program)); err != nil {
			return fmt.Errorf("put %s in place: %w", program, err)
		}
	}
	return nil
}

// buildImages makes the cluster's own images. Those with code of this repository are made anew in each clone, in
// seconds: Go's own cache knows what changed.
func (c Config) buildImages(ctx context.Context, folder string) error {
	programs := c.path("programs")
	if err := os.MkdirAll(programs, 0o755); err != nil {
		return fmt.Errorf("make the folder of programs: %w", err)
	}
	command := outside(ctx, "go", append(append([]string{"build"}, buildFlags...), "-ldflags=-s -w", "-o", programs+"/", "./test/cluster/pause", "./test/cluster/toolbox")...)
	command.Dir = c.Dir
	command.Env = append(os.Environ(), "CGO_ENABLED=0", "GOTOOLCHAIN=local")
	if err := runLogged(command, c.path("logs", "build-images.log")); err != nil {
		return fmt.Errorf("build the programs of the test images: %w", err)
	}
	for name, i := range c.images(folder) {
		content, err := i.tarball()
		if err != nil {
			return err
		}
		if err := writeFile(c.path("images", name+".tar"), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// images are loaded into every node when it first starts.
func (c Config) images(folder string) map[string]image {
	toolbox := image{
		Ref:        ToolboxImage,
		Entrypoint: []string{"/bin/toolbox"},
		Files:      map[string]string{"bin/toolbox": c.path("programs", "toolbox"), "bin/busybox": "/bin/busybox"},
		Links:      map[string]string{"var/run": "/run"},
		Folders:    []string{"tmp", "var"},
	}
	for _, applet := range applets {
		toolbox.Links["bin/"+applet] = "busybox"
	}
	return map[string]image{
		"pause":   {Ref: PauseImage, Entrypoint: []string{"/pause"}, Files: map[string]string{"pause": c.path("programs", "pause")}},
		"toolbox": toolbox,
		"coredns": {Ref: coreDNSImage, Entrypoint: []string{"/coredns"}, Files: map[string]string{"coredns": filepath.Join(folder, "bin", "coredns")}},
	}
}

// applets of the static busybox that the toolbox image offers. Its wget is left out: Debian's static build crashes in it.
var applets = []string{"sh", "awk", "cat", "cut", "date", "dd", "df", "env", "false", "find", "free", "grep", "head", "hostname", "id", "ifconfig",
	"ip", "kill", "ln", "ls", "mkdir", "mount", "mv", "nc", "netstat", "nslookup", "ping", "ping6", "ps", "readlink", "rm", "route", "sed", "seq", "sha256sum",
	"sleep", "sort", "stat", "tail", "tar", "tee", "test", "time", "timeout", "top", "touch", "tr", "true", "umount", "uname", "uniq", "wc", "xargs"}

// runLogged runs a command with its output in a log file and quotes the log's last lines if it fails.
func runLogged(command *exec.Cmd, log string) error {
	if err := os.MkdirAll(filepath.Dir(log), 0o755); err != nil {
		return fmt.Errorf("make the folder of logs: %w", err)
	}
	file, err := os.Create(log)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer file.Close()
	command.Stdout, command.Stderr = file, file
	command.WaitDelay = 5 * time.Second
	if err := command.Run(); err != nil {
		return fmt.Errorf("%w; the end of %s:\n%s", err, log, tail(log, 15))
	}
	return nil
}

// tail returns the last lines of a file, as far as it can be read.
func tail(name string, count int) string {
	raw, _ := os.ReadFile(name)
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	return strings.Join(lines[max(0, len(lines)-count):], "\n")
}

// CleanCache deletes what Build made, for all versions, and the Envoy that make envoy put beside it. It refuses while a
// cluster runs from it.
func CleanCache(ctx context.Context, c Config) error {
	root, err := CacheRoot()
	if err != nil {
		return err
	}
	running, err := c.neighbours()
	if err != nil {
		return err
	}
	if _, err := loadState(c.Dir); err == nil {
		return fmt.Errorf("clean the cache: the cluster of this clone runs from it: run make cluster-down first")
	}
	if len(running) > 0 {
		return fmt.Errorf("clean the cache: the cluster of %s runs from it: run make cluster-down there first", running[0].Dir)
	}
	if _, err := os.Stat(root); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	// A build that works in it is not waited for.
	once, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	unlock, err := lockFile(once, filepath.Join(root, "lock"), func(string) { cancel(errors.New("wait for its build to end")) })
	if err != nil {
		return fmt.Errorf("clean the cache: %w", err)
	}
	defer unlock()
	for _, pattern := range []string{"kubernetes-*", "envoy"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return fmt.Errorf("clean the cache: %w", err)
		}
		for _, folder := range found {
			if err := os.RemoveAll(folder); err != nil {
				return fmt.Errorf("clean the cache: %w", err)
			}
		}
	}
	return nil
}
