package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// Versions of what the cluster is built from.
const (
	kubernetesVersion = "v1.36.3"
	etcdVersion       = "v3.6.6"
	containerdVersion = "v2.4.2"
	cniVersion        = "v1.9.1"
	coreDNSVersion    = "v1.15.0"
	helmVersion       = "v4.3.1"
)

// References of the images that every node has.
const (
	// PauseImage is every pod's sandbox.
	PauseImage = "docker.io/weft/pause:1"
	// ToolboxImage holds the tests' servers and clients (see test/cluster/toolbox) and a shell.
	ToolboxImage = "docker.io/weft/toolbox:1"
	coreDNSImage = "docker.io/weft/coredns:" + coreDNSVersion
)

// artefact is one step of the build: programs made from one Go module.
type artefact struct {
	Name string
	// Source is a folder of this repository with a module of its own, or empty if Packages are installed at Version.
	Source   string
	Packages []string
	Version  string
	// Folder is where the programs go, below the cache folder.
	Folder string
	// Programs are the files the step makes.
	Programs []string
	// LDFlags are added to those that strip the programs.
	LDFlags string
	// Expected is how long the step takes on two cores with an empty Go cache.
	Expected time.Duration
}

const kubernetesLDFlags = "-X k8s.io/component-base/version.gitVersion=" + kubernetesVersion +
	" -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36" +
	" -X k8s.io/client-go/pkg/version.gitVersion=" + kubernetesVersion

// artefacts are all steps, the longest first.
func artefacts() []artefact {
	const plugins = "github.com/containernetworking/plugins/plugins"
	return []artefact{
		{Name: "kubernetes", Source: "test/cluster/k8s", Version: kubernetesVersion, Folder: "bin", Programs: []string{"k8s"}, LDFlags: kubernetesLDFlags, Expected: 5 * time.Minute},
		{Name: "etcd", Source: "test/cluster/etcd", Version: etcdVersion, Folder: "bin", Programs: []string{"etcd"}, Expected: 45 * time.Second},
		{Name: "containerd", Version: containerdVersion, Folder: "bin", Programs: []string{"containerd", "containerd-shim-runc-v2", "ctr"}, Expected: 30 * time.Second,
			Packages: []string{"github.com/containerd/containerd/v2/cmd/containerd", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/ctr"}},
		{Name: "cni-plugins", Version: cniVersion, Folder: "cni", Programs: []string{"bridge", "loopback", "host-local", "portmap"}, Expected: 10 * time.Second,
			Packages: []string{plugins + "/main/bridge", plugins + "/main/loopback", plugins + "/ipam/host-local", plugins + "/meta/portmap"}},
		{Name: "coredns", Version: coreDNSVersion, Folder: "bin", Programs: []string{"coredns"}, Packages: []string{"github.com/coredns/coredns"}, Expected: 2 * time.Minute},
		{Name: "helm", Version: helmVersion, Folder: "bin", Programs: []string{"helm"}, Packages: []string{"helm.sh/helm/v4/cmd/helm"},
			LDFlags: "-X helm.sh/helm/v4/internal/version.version=" + helmVersion, Expected: 90 * time.Second},
	}
}

// CacheRoot is the folder that all clones share: ${XDG_CACHE_HOME:-~/.cache}/weft.
func CacheRoot() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache folder: set XDG_CACHE_HOME or HOME: %w", err)
	}
	return filepath.Join(base, "weft"), nil
}

// cacheFolder is the part of the cache for exactly these versions, recipes and Go: any change makes a new folder.
func (c Config) cacheFolder() (string, error) {
	root, err := CacheRoot()
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	fmt.Fprintln(sum, runtime.Version(), runtime.GOARCH, buildFlags)
	for _, a := range artefacts() {
		fmt.Fprintln(sum, a.Name, a.Version, a.Packages, a.Programs, a.LDFlags)
		if a.Source == "" {
			continue
		}
		for _, name := range []string{"main.go", "go.mod", "go.sum"} {
			content, err := os.ReadFile(filepath.Join(c.Dir, a.Source, name))
			if err != nil {
				return "", fmt.Errorf("read the recipe of %s: %w", a.Name, err)
			}
			fmt.Fprintln(sum, name, len(content))
			sum.Write(content)
		}
	}
	return filepath.Join(root, "kubernetes-"+kubernetesVersion+"-"+hex.EncodeToString(sum.Sum(nil))[:10]), nil
}
