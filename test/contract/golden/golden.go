// Package golden keeps Envoy resources in YAML files beside the code that builds them. `go test -update` rewrites the
// files and removes those that no case makes any more; the contract tier loads every one into the real Envoy.
package golden

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "rewrite golden files and remove those that no case makes any more")

// File is the content of a golden file.
type File struct {
	Listeners []proto.Message
	Clusters  []proto.Message
	Endpoints []proto.Message
	Scopes    []proto.Message
	Routes    []proto.Message
	Secrets   []proto.Message
	// Mesh holds weft's own resources.
	Mesh []proto.Message
	// Notes is anything else that the case yields, kept as JSON.
	Notes any
}

func (f *File) sections() map[string]*[]proto.Message {
	return map[string]*[]proto.Message{
		"listeners": &f.Listeners, "clusters": &f.Clusters, "endpoints": &f.Endpoints, "scopes": &f.Scopes,
		"routes": &f.Routes, "secrets": &f.Secrets, "mesh": &f.Mesh,
	}
}

// Messages turns a typed slice into proto.Messages.
func Messages[M proto.Message](in []M) []proto.Message {
	var out []proto.Message
	for _, m := range in {
		out = append(out, m)
	}
	return out
}

// Dir is a folder of golden files.
type Dir struct {
	path string
	made map[string]bool
}

// Open begins a comparison with the files in a folder. At the end of the test, files that no Check named are an error,
// or are removed under -update.
func Open(t *testing.T, path string) *Dir {
	d := &Dir{path: path, made: map[string]bool{}}
	t.Cleanup(func() {
		if f := flag.Lookup("test.run"); f != nil && strings.Contains(f.Value.String(), "/") || t.Failed() {
			return // only some cases ran
		}
		files, err := filepath.Glob(filepath.Join(path, "*.yaml"))
		if err != nil {
			t.Error(err)
		}
		for _, file := range files {
			switch {
			case d.made[file]:
			case *update:
				if err := os.Remove(file); err != nil {
					t.Error(err)
				}
			default:
				t.Errorf("no case makes %s: run make golden to remove it", file)
			}
		}
	})
	return d
}

// Check compares a case with its file, or writes it under -update.
func (d *Dir) Check(t *testing.T, name string, file File) {
	t.Helper()
	path := filepath.Join(d.path, name+".yaml")
	d.made[path] = true
	got, err := file.encode()
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.MkdirAll(d.path, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v: run make golden to write it", err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s differs (-file +built); run make golden if this is meant:\n%s", path, diff)
	}
}

func (f *File) encode() ([]byte, error) {
	out := map[string]any{}
	for key, section := range f.sections() {
		var list []json.RawMessage
		for _, m := range *section {
			encoded, err := encodeMessage(m)
			if err != nil {
				return nil, err
			}
			list = append(list, encoded)
		}
		if list != nil {
			out[key] = list
		}
	}
	if f.Notes != nil {
		out["notes"] = f.Notes
	}
	return yaml.Marshal(out)
}

// encodeMessage adds "@type", so that a file can be read without knowing what is in it.
func encodeMessage(m proto.Message) ([]byte, error) {
	plain, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	var fields map[string]any
	decoder := json.NewDecoder(bytes.NewReader(plain))
	decoder.UseNumber()
	if err := decoder.Decode(&fields); err != nil {
		return nil, err
	}
	fields["@type"] = "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName())
	return json.Marshal(fields)
}

// Find lists the golden files below a folder of the repository.
func Find(root string) ([]string, error) {
	var files []string
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && filepath.Base(filepath.Dir(path)) == "testdata" && filepath.Ext(path) == ".yaml" {
			files = append(files, path)
		}
		return err
	})
	return files, err
}

// Load reads a golden file. The types in it must be linked into the program.
func Load(path string) (File, error) {
	var file File
	raw, err := os.ReadFile(path)
	if err != nil {
		return file, err
	}
	err = Decode(raw, &file)
	return file, err
}

// Decode reads what encode wrote.
func Decode(raw []byte, file *File) error {
	encoded, err := yaml.YAMLToJSON(raw)
	if err != nil {
		return err
	}
	var sections map[string]json.RawMessage
	if err := json.Unmarshal(encoded, &sections); err != nil {
		return err
	}
	for key, section := range file.sections() {
		var list []json.RawMessage
		if sections[key] == nil {
			continue
		}
		if err := json.Unmarshal(sections[key], &list); err != nil {
			return fmt.Errorf("read %s: %w", key, err)
		}
		for _, item := range list {
			m, err := decodeMessage(item)
			if err != nil {
				return fmt.Errorf("read %s: %w", key, err)
			}
			*section = append(*section, m)
		}
	}
	if notes := sections["notes"]; notes != nil {
		if err := json.Unmarshal(notes, &file.Notes); err != nil {
			return fmt.Errorf("read notes: %w", err)
		}
	}
	return nil
}
