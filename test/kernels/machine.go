package kernels

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// Machine is one kernel with what runs on it.
type Machine struct {
	Kernel *Kernel
	// Folder is where the initramfs is made and the console is kept ("console.log"), on this machine.
	Folder string
	// Init is the program that ./init compiles to, without cgo.
	Init string
	// Tests are compiled tests, without cgo, by the name that reports give them.
	Tests []Test
	// Programs are further programs by name, which the tests find on their PATH; they must be static.
	Programs map[string]string
	// MemoryMB is the machine's memory; CPUs are its processors.
	MemoryMB, CPUs int
}

// Test is a compiled test.
type Test struct {
	Name string
	// Binary is what `go test -c` makes.
	Binary string
	// Files are further files of its working directory: path there to path on this machine.
	Files map[string]string
	Args  []string
}

// Console is where the kernel's own messages are.
func (m *Machine) Console() string { return filepath.Join(m.Folder, "console.log") }

// Boot runs the machine to its end and copies what the tests say to report.
func (m *Machine) Boot(ctx context.Context, report io.Writer) error {
	image := filepath.Join(m.Folder, "initramfs")
	if err := m.assemble(image); err != nil {
		return err
	}
	defer os.Remove(image)
	// Mitigations cost an emulated processor a quarter of its time and protect nothing here: nobody else is in the
	// machine. What root's BPF programs must satisfy stays the same, for root is exempt from the verifier's share of them.
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg", "-cpu", "max", "-m", strconv.Itoa(m.MemoryMB), "-smp", strconv.Itoa(m.CPUs),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "file:"+m.Console(), "-serial", "stdio",
		"-kernel", m.Kernel.Image, "-initrd", image,
		"-append", "console=ttyS0 loglevel=5 panic=-1 mitigations=off rdinit=/init")
	cmd.Stdout = report
	var complaints strings.Builder
	cmd.Stderr = &complaints
	err := cmd.Run()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("boot kernel %s: install the Debian package qemu-system-x86 (make deps): %w", m.Kernel.Version, err)
	case ctx.Err() != nil:
		return fmt.Errorf("boot kernel %s: it did not end in time, its console is in %s: %w", m.Kernel.Version, m.Console(), ctx.Err())
	case err != nil:
		return fmt.Errorf("boot kernel %s: %w: %s", m.Kernel.Version, err, complaints.String())
	}
	return nil
}

// assemble writes the initramfs.
func (m *Machine) assemble(image string) error {
	var plan Plan
	files := map[string]string{"/init": m.Init}
	for _, module := range m.Kernel.Modules {
		to := path.Join(modulesPath, filepath.Base(module))
		files[to] = module
		plan.Modules = append(plan.Modules, to)
	}
	for name, program := range m.Programs {
		files["/bin/"+name] = program
	}
	for _, test := range m.Tests {
		folder := path.Join(testsPath, test.Name)
		binary := path.Join(folder, "run")
		files[binary] = test.Binary
		for to, from := range test.Files {
			files[path.Join(folder, to)] = from
		}
		plan.Runs = append(plan.Runs, Run{Name: test.Name, Folder: folder, Command: append([]string{binary}, test.Args...)})
	}
	contents, err := readFiles(files)
	if err != nil {
		return err
	}
	if contents[planPath], err = json.Marshal(plan); err != nil {
		return fmt.Errorf("write the machine's plan: %w", err)
	}
	out, err := os.Create(image)
	if err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return errors.Join(writeInitramfs(out, contents, "/proc", "/sys", "/dev", "/tmp", "/run"), out.Close())
}
