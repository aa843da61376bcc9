// Command image puts files into an image and writes it as a docker archive, without Docker. The same files give the same
// bytes.
//
//	image -o out.tar -ref weft.dev/nodeproxy:dev -file bin/nodeproxy=/usr/local/bin/nodeproxy -file envoy=/usr/local/bin/envoy,0111 \
//	  -link /var/run=/run -user 15000 -entrypoint /usr/local/bin/nodeproxy
//
// A dynamically linked program brings its libraries along from this machine.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

type entry struct {
	source, target string // target: of a symbolic link
	mode           int64
}

func main() {
	var files, links, folders, env list
	out := flag.String("o", "", "archive to write")
	ref := flag.String("ref", "", "name and tag of the image")
	user := flag.String("user", "", "user that the container runs as")
	entrypoint := flag.String("entrypoint", "", "program that the container runs")
	flag.Var(&files, "file", "source=path[,mode]; may be repeated")
	flag.Var(&links, "link", "path=target; may be repeated")
	flag.Var(&folders, "dir", "empty folder, mode 1777; may be repeated")
	flag.Var(&env, "env", "NAME=value; may be repeated")
	flag.Parse()
	if err := run(*out, *ref, *user, *entrypoint, files, links, folders, env); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(out, ref, user, entrypoint string, files, links, folders, env list) error {
	if out == "" || ref == "" || entrypoint == "" {
		return errors.New("-o, -ref and -entrypoint are needed")
	}
	tag, err := name.NewTag(ref)
	if err != nil {
		return fmt.Errorf("read -ref: %w", err)
	}
	entries := map[string]entry{}
	for _, l := range links {
		path, target, ok := strings.Cut(l, "=")
		if !ok {
			return fmt.Errorf("read -link %q: want path=target", l)
		}
		entries[path] = entry{target: target, mode: 0o777}
	}
	for _, f := range files {
		source, path, ok := strings.Cut(f, "=")
		path, mode, _ := strings.Cut(path, ",")
		if !ok {
			return fmt.Errorf("read -file %q: want source=path[,mode]", f)
		}
		e := entry{source: source, mode: 0o755}
		if mode != "" {
			if e.mode, err = strconv.ParseInt(mode, 8, 64); err != nil {
				return fmt.Errorf("read -file %q: mode: %w", f, err)
			}
		}
		entries[path] = e
		libraries, err := closure(source)
		if err != nil {
			return err
		}
		for _, l := range libraries {
			entries[l] = entry{source: l, mode: 0o755}
		}
	}
	layer, err := pack(entries, folders)
	if err != nil {
		return err
	}
	content, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil })
	if err != nil {
		return fmt.Errorf("make layer: %w", err)
	}
	image, err := mutate.AppendLayers(empty.Image, content)
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	config = config.DeepCopy()
	config.Architecture, config.OS = "amd64", "linux"
	config.Config = v1.Config{Entrypoint: []string{entrypoint}, User: user, Env: append([]string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, env...)}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	if err := tarball.WriteToFile(out+".part", tag, image); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	if err := os.Rename(out+".part", out); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	digest, err := image.Digest()
	if err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	fmt.Println(ref, digest)
	return nil
}

// closure lists the libraries and the loader of a dynamically linked program, by the loader's own word.
func closure(program string) ([]string, error) {
	head := make([]byte, 4)
	f, err := os.Open(program)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", program, err)
	}
	_, err = io.ReadFull(f, head)
	_ = f.Close()
	if err != nil || string(head) != "\x7fELF" {
		return nil, nil
	}
	said, err := exec.Command("ldd", program).CombinedOutput()
	if err != nil {
		if bytes.Contains(said, []byte("not a dynamic executable")) || bytes.Contains(said, []byte("statically linked")) {
			return nil, nil
		}
		return nil, fmt.Errorf("find libraries of %s: %w: %s", program, err, said)
	}
	var out []string
	for line := range strings.Lines(string(said)) {
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "/") {
				out = append(out, word)
			}
		}
	}
	return out, nil
}

func pack(entries map[string]entry, folders []string) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	made := map[string]bool{"/": true}
	parents := func(path string) error {
		var missing []string
		for d := filepath.Dir(path); !made[d]; d = filepath.Dir(d) {
			missing = append(missing, d)
			made[d] = true
		}
		slices.Reverse(missing)
		for _, d := range missing {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d[1:] + "/", Mode: 0o755}); err != nil {
				return err
			}
		}
		return nil
	}
	for _, d := range slices.Sorted(slices.Values(folders)) {
		if err := parents(d); err != nil {
			return nil, err
		}
		made[d] = true
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d[1:] + "/", Mode: 0o1777}); err != nil {
			return nil, err
		}
	}
	for _, path := range slices.Sorted(maps.Keys(entries)) {
		e := entries[path]
		if err := parents(path); err != nil {
			return nil, err
		}
		if e.target != "" {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: path[1:], Linkname: e.target, Mode: e.mode}); err != nil {
				return nil, err
			}
			continue
		}
		content, err := os.ReadFile(e.source)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", e.source, err)
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path[1:], Mode: e.mode, Size: int64(len(content))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
