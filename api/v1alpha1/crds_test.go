package v1alpha1

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

type object = map[string]any

// TestEverythingIsBoundedAndDocumented walks the generated CRDs: what has no bound lets one object fill the API server, the
// controller and every node; what is not documented is guessed.
func TestEverythingIsBoundedAndDocumented(t *testing.T) {
	files, err := filepath.Glob("../../charts/weft-crds/templates/weft.dev_*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no CRDs: %v", err)
	}
	fields := 0
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var crd object
		if err := yaml.Unmarshal(content, &crd); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		for _, version := range crd["spec"].(object)["versions"].([]any) {
			root := version.(object)["schema"].(object)["openAPIV3Schema"].(object)
			for _, standard := range []string{"apiVersion", "kind", "metadata"} { // the API server's own
				delete(root["properties"].(object), standard)
			}
			w := walker{t: t}
			w.schema(strings.TrimSuffix(filepath.Base(file), ".yaml"), root)
			fields += w.fields
		}
	}
	if fields < 50 {
		t.Errorf("only %d fields seen: the walk misses some", fields)
	}
}

type walker struct {
	t      *testing.T
	fields int
}

func (w *walker) schema(path string, s object) {
	has := func(keys ...string) bool {
		return slices.ContainsFunc(keys, func(key string) bool { _, ok := s[key]; return ok })
	}
	switch s["type"] {
	case "string":
		if !has("maxLength", "enum", "format") {
			w.t.Errorf("%s: a string without maxLength, enum or format", path)
		}
	case "integer":
		if !has("maximum", "format") {
			w.t.Errorf("%s: an integer without a maximum", path)
		}
	case "array":
		if !has("maxItems") {
			w.t.Errorf("%s: a list without maxItems", path)
		}
		w.schema(path+"[]", s["items"].(object))
	case "object":
		if !has("properties", "maxProperties") || has("x-kubernetes-preserve-unknown-fields") {
			w.t.Errorf("%s: a map without maxProperties", path)
		}
		if values, ok := s["additionalProperties"].(object); ok {
			w.schema(path+"{}", values)
		}
		w.properties(path, s)
	default:
		w.t.Errorf("%s: type %v", path, s["type"])
	}
}

func (w *walker) properties(path string, s object) {
	properties, _ := s["properties"].(object)
	required, _ := s["required"].([]any)
	for _, name := range slices.Sorted(maps.Keys(properties)) {
		field, at := properties[name].(object), path+"."+name
		w.fields++
		text, _ := field["description"].(string)
		_, filled := field["default"]
		want := "Default: "
		if slices.Contains(required, any(name)) && !filled {
			want = "Required."
		}
		switch {
		case text == "":
			w.t.Errorf("%s: no description", at)
		case !strings.Contains(at, ".status.conditions") && !strings.Contains(text, want): // conditions are Kubernetes' own type
			w.t.Errorf("%s: the description does not say %q: %s", at, want, text)
		}
		w.schema(at, field)
	}
}
