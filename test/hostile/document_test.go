package hostile

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite docs/HOSTILE.md")

const (
	root = "../.."
	page = root + "/docs/HOSTILE.md"
)

// TestDocument: docs/HOSTILE.md is what the list makes.
func TestDocument(t *testing.T) {
	want := Document()
	if *update {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Error("docs/HOSTILE.md is not what the list makes: go test ./test/hostile -update")
	}
}

// TestList: no attempt stands twice, each says what it needs to, and what is open is known.
func TestList(t *testing.T) {
	all := All()
	if len(all) < 150 {
		t.Errorf("%d attempts, want at least 150", len(all))
	}
	ids, texts := map[string]bool{}, map[string]bool{}
	for _, a := range all {
		if a.ID == "" || a.What == "" || a.Where == "" || a.Verdict == "" || ids[a.ID] || texts[a.Group+a.What] {
			t.Errorf("the attempt %q, %q is incomplete or stands twice", a.ID, a.What)
		}
		ids[a.ID], texts[a.Group+a.What] = true, true
		if (a.Shown == byHand) != (a.Verdict == Open && a.ID != "header-l4") {
			t.Errorf("%s: an attempt is shown by a test, or is open", a.ID)
		}
		if a.Make != nil && a.Shown != Here {
			t.Errorf("%s: the attempt is not made by %s", a.ID, Here)
		}
		if strings.Contains(a.What, "|") && !strings.Contains(a.What, `\|`) {
			t.Errorf("%s: %q breaks its table", a.ID, a.What)
		}
	}
}

var function = regexp.MustCompile(`(?m)^func (Test\w+)\(`)

// TestShownByTests: every test and subtest that the list names is in the sources. A subtest's name stands there in quotes,
// as the test's own name of a case.
func TestShownByTests(t *testing.T) {
	tests, texts := map[string]bool{}, map[string]string{}
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && strings.HasPrefix(e.Name(), ".") && path != root {
			return fs.SkipDir
		}
		if e.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name := filepath.Base(filepath.Dir(path))
		texts[name] += string(source)
		for _, m := range function.FindAllStringSubmatch(string(source), -1) {
			tests[name+"."+m[1]] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range All() {
		if a.Shown == byHand {
			continue
		}
		test, subtest, _ := strings.Cut(a.Shown, "/")
		name, _, _ := strings.Cut(test, ".")
		if !tests[test] {
			t.Errorf("%s: there is no test %s", a.ID, test)
		} else if subtest != "" && !strings.Contains(texts[name], fmt.Sprintf("%q", subtest)) {
			t.Errorf("%s: %s has no subtest %q", a.ID, test, subtest)
		}
	}
}
