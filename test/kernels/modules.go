package kernels

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// wanted are the modules that the tests need where they are not part of the kernel: veth pairs, and listing listeners.
var wanted = []string{"veth", "inet_diag", "tcp_diag"}

// loadOrder sorts the modules named and all that they depend on so that each comes after its own dependencies. depends
// lists what a module depends on; it says false of one that is part of the kernel and not to be loaded.
func loadOrder(names []string, depends func(name string) ([]string, bool, error)) (order []string, err error) {
	done := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		name = moduleName(name)
		if done[name] {
			return nil
		}
		done[name] = true
		needed, load, err := depends(name)
		if err != nil || !load {
			return err
		}
		for _, n := range needed {
			if err := visit(n); err != nil {
				return fmt.Errorf("%w, which %s needs", err, name)
			}
		}
		order = append(order, name)
		return nil
	}
	for _, name := range names {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleName is the name of a module's file: "kernel/drivers/net/veth.ko.xz" is "veth". The kernel takes - for _.
func moduleName(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// dependencies reads the modules that a module names in its section .modinfo.
func dependencies(file string) ([]string, error) {
	object, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read kernel module %s: %w", file, err)
	}
	defer object.Close()
	section := object.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("read kernel module %s: it has no section .modinfo", file)
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("read kernel module %s: %w", file, err)
	}
	return dependsOf(string(info)), nil
}

func dependsOf(info string) []string {
	for entry := range strings.SplitSeq(info, "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			return strings.Split(list, ",")
		}
	}
	return nil
}

// builtinModules reads a kernel's modules.builtin.
func builtinModules(file string) (map[string]bool, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the list of modules in the kernel: %w", err)
	}
	builtin := map[string]bool{}
	for line := range strings.Lines(string(content)) {
		builtin[moduleName(strings.TrimSpace(line))] = true
	}
	return builtin, nil
}
