package cluster

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sort"
)

// image describes a container image of one layer.
type image struct {
	// Ref is its full name, "docker.io/weft/pause:1".
	Ref        string
	Entrypoint []string
	// Files maps a path in the image to the file it is copied from, with mode 0755.
	Files map[string]string
	// Links maps a path in the image to the target of a symbolic link.
	Links map[string]string
	// Folders are made with mode 01777.
	Folders []string
}

// tarball is the image in the format of "docker save", which containerd imports.
func (i image) tarball() ([]byte, error) {
	layer, err := i.layer()
	if err != nil {
		return nil, fmt.Errorf("build image %s: %w", i.Ref, err)
	}
	layerSum := digest(layer)
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config":  map[string]any{"Entrypoint": i.Entrypoint, "Env": []string{"PATH=/bin"}},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + layerSum}},
		"history": []any{},
	})
	if err != nil {
		return nil, fmt.Errorf("build image %s: %w", i.Ref, err)
	}
	configName, layerName := digest(config)+".json", layerSum+"/layer.tar"
	manifest, err := json.Marshal([]any{map[string]any{"Config": configName, "RepoTags": []string{i.Ref}, "Layers": []string{layerName}}})
	if err != nil {
		return nil, fmt.Errorf("build image %s: %w", i.Ref, err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, entry := range []struct {
		name    string
		content []byte
	}{{configName, config}, {layerName, layer}, {"manifest.json", manifest}} {
		if err := addFile(w, entry.name, entry.content, 0o644); err != nil {
			return nil, fmt.Errorf("build image %s: %w", i.Ref, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("build image %s: %w", i.Ref, err)
	}
	return out.Bytes(), nil
}

// layer has sorted entries and no times: the same files make the same bytes.
func (i image) layer() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, folder := range i.Folders {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: folder + "/", Mode: 0o1777}); err != nil {
			return nil, err
		}
	}
	for _, name := range sortedKeys(i.Files) {
		content, err := os.ReadFile(i.Files[name])
		if err != nil {
			return nil, err
		}
		if err := addFile(w, name, content, 0o755); err != nil {
			return nil, err
		}
	}
	for _, name := range sortedKeys(i.Links) {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: i.Links[name], Mode: 0o777}); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func addFile(w *tar.Writer, name string, content []byte, mode fs.FileMode) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(content)), Mode: int64(mode)}); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}

func digest(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	return keys
}
