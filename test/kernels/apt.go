package kernels

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

const (
	// release is the Debian whose kernels are tested.
	release = "bookworm"
	keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
)

// archive is apt with a state of its own: the machine's package lists stay as they are, and backports need not be among
// its sources. apt checks the signatures of the lists and by them the hashes of the packages.
type archive struct {
	folder string
}

// openArchive makes the state in folder and fetches the package lists.
func openArchive(ctx context.Context, folder string) (*archive, error) {
	targets, err := output(ctx, "", "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages")
	if err != nil {
		return nil, err
	}
	sources, err := sourcesFrom(targets)
	if err != nil {
		return nil, err
	}
	a := &archive{folder}
	for _, dir := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(folder, dir), 0o755); err != nil {
			return nil, fmt.Errorf("make a state for apt: %w", err)
		}
	}
	for name, content := range map[string]string{"sources.list": sources, "state/status": ""} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(content), 0o644); err != nil {
			return nil, fmt.Errorf("make a state for apt: %w", err)
		}
	}
	if _, err := a.apt(ctx, "", "apt-get", "-o", "APT::Update::Error-Mode=any", "update"); err != nil {
		return nil, err
	}
	return a, nil
}

// sourcesFrom makes the sources of kernels from the lines "URI release component" of the machine's own: the same mirrors,
// with backports added, main alone.
func sourcesFrom(targets string) (string, error) {
	var lines []string
	seen := map[string]bool{}
	add := func(uri, suite string) {
		options := ""
		if _, err := os.Stat(keyring); err == nil {
			options = "[signed-by=" + keyring + "] "
		}
		if line := fmt.Sprintf("deb %s%s %s main\n", options, uri, suite); !seen[line] {
			seen[line] = true
			lines = append(lines, line)
		}
	}
	for line := range strings.Lines(targets) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[2] != "main" {
			continue
		}
		switch uri, suite := fields[0], fields[1]; suite {
		case release:
			add(uri, suite)
			add(uri, release+"-backports")
		case release + "-security":
			add(uri, suite)
		}
	}
	if len(lines) == 0 {
		return "", fmt.Errorf("find a mirror of Debian %s among this machine's apt sources: there is none: add one (deb MIRROR %s main) below /etc/apt/sources.list.d", release, release)
	}
	return strings.Join(lines, ""), nil
}

// apt runs one of apt's commands on this state, in dir.
func (a *archive) apt(ctx context.Context, dir, command string, args ...string) (string, error) {
	options := []string{
		"-o", "Dir::State=" + filepath.Join(a.folder, "state"),
		"-o", "Dir::State::status=" + filepath.Join(a.folder, "state/status"),
		"-o", "Dir::Cache=" + filepath.Join(a.folder, "cache"),
		"-o", "Dir::Etc::sourcelist=" + filepath.Join(a.folder, "sources.list"),
		"-o", "Dir::Etc::sourceparts=-",
		"-o", "Dir::Etc::preferences=-", "-o", "Dir::Etc::preferencesparts=-",
		"-o", "APT::Architecture=amd64", "-o", "APT::Architectures=amd64",
		"-o", "APT::Sandbox::User=root",
		"-o", "Acquire::Languages=none", "-o", "Acquire::Retries=3",
	}
	return output(ctx, dir, command, append(options, args...)...)
}

// kernelPackage is one version of one package.
type kernelPackage struct{ name, version string }

// newest finds the newest kernel of a line ("6.12") that is built for clouds, the smallest of Debian's.
func (a *archive) newest(ctx context.Context, line string) (kernelPackage, error) {
	prefix := "linux-image-" + line + "."
	names, err := a.apt(ctx, "", "apt-cache", "pkgnames", prefix)
	if err != nil {
		return kernelPackage{}, err
	}
	names = strings.Join(kernelNames(names, line), "\n")
	if names == "" {
		return kernelPackage{}, fmt.Errorf("find %s*-cloud-amd64 in Debian %s and its backports: there is none", prefix, release)
	}
	table, err := a.apt(ctx, "", "apt-cache", append([]string{"madison"}, strings.Fields(names)...)...)
	if err != nil {
		return kernelPackage{}, err
	}
	var best kernelPackage
	for row := range strings.Lines(table) {
		columns := strings.Split(row, "|")
		if len(columns) != 3 {
			continue
		}
		p := kernelPackage{strings.TrimSpace(columns[0]), strings.TrimSpace(columns[1])}
		if best.version == "" || newer(ctx, p.version, best.version) {
			best = p
		}
	}
	if best.version == "" {
		return best, fmt.Errorf("find a version of %s: apt has none", names)
	}
	return best, nil
}

// kernelNames keeps the signed cloud kernels of a line among package names.
func kernelNames(names, line string) []string {
	pattern := regexp.MustCompile(`(?m)^linux-image-` + regexp.QuoteMeta(line) + `\.[0-9][^\s]*-cloud-amd64$`)
	return pattern.FindAllString(names, -1)
}

// newer compares Debian versions.
func newer(ctx context.Context, a, b string) bool {
	return exec.CommandContext(ctx, "dpkg", "--compare-versions", a, "gt", b).Run() == nil
}

// download fetches the package into dir and returns the file.
func (a *archive) download(ctx context.Context, p kernelPackage, dir string) (string, error) {
	if _, err := a.apt(ctx, dir, "apt-get", "download", p.name+"="+p.version); err != nil {
		return "", err
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(files) != 1 {
		return "", fmt.Errorf("download %s: found %d files, %w", p.name, len(files), err)
	}
	return files[0], nil
}

// output runs a program and returns what it prints; its complaints are in the error.
func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("run %s %s: %w: %s", name, args[len(args)-1], err, strings.TrimSpace(complaints.String()))
	}
	return string(out), nil
}
