package bundle

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/portolan-io/portolan/federation/api"
)

func TestLoad(t *testing.T) {
	files, err := Load(fstest.MapFS{
		"a.rego": {Data: []byte("a")}, "lib/b.rego": {Data: []byte("b")}, "README.md": {Data: []byte("x")},
		".git/c.rego": {Data: []byte("c")}, ".d.rego": {Data: []byte("d")}, "lib/a_test.rego": {Data: []byte("t")},
	}, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Sorted(maps.Keys(files)); !slices.Equal(got, []string{"a.rego", "lib/a_test.rego", "lib/b.rego"}) {
		t.Errorf("%v", got)
	}
}

func TestLoadDirStaysInside(t *testing.T) {
	dir, outside := t.TempDir(), filepath.Join(t.TempDir(), "secret.rego")
	for p, text := range map[string]string{outside: "secret", filepath.Join(dir, "a.rego"): "a"} {
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if files, err := LoadDir(dir, Limits{}); err != nil || files["a.rego"] != "a" {
		t.Fatalf("%v %v", files, err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "b.rego")); err != nil {
		t.Fatal(err)
	}
	if files, err := LoadDir(dir, Limits{}); err == nil {
		t.Errorf("followed a link out of the folder: %v", files)
	}
	if _, err := LoadDir(filepath.Join(dir, "none"), Limits{}); api.KindOf(err) != api.NotFound {
		t.Errorf("%v", err)
	}
}

func TestLimits(t *testing.T) {
	l := Limits{Files: 2, FileBytes: 10, TotalBytes: 15}
	for name, files := range map[string]map[string]string{
		"nothing": {}, "too many": {"a.rego": "", "b.rego": "", "c.rego": ""}, "a big one": {"a.rego": strings.Repeat("x", 11)},
		"too much": {"a.rego": strings.Repeat("x", 8), "b.rego": strings.Repeat("x", 8)}, "no text": {"a.rego": "\xff"},
	} {
		if vs := Validate(files, l); len(vs) != 1 {
			t.Errorf("%s: %v", name, vs)
		}
		fsys := fstest.MapFS{}
		for p, text := range files {
			fsys[p] = &fstest.MapFile{Data: []byte(text)}
		}
		if _, err := Load(fsys, l); api.KindOf(err) != api.Invalid {
			t.Errorf("%s: loaded: %v", name, err)
		}
	}
	for _, p := range []string{"/a.rego", "../a.rego", "a//b.rego", "a/./b.rego", "a/../b.rego", "", ".", "a.rego/", "a.txt", "a b.rego", "a\x00.rego", "ä.rego", `a\b.rego`, strings.Repeat("d/", 9) + "a.rego", strings.Repeat("a", 300) + ".rego"} {
		if vs := Validate(map[string]string{p: "x"}, Limits{}); len(vs) != 1 {
			t.Errorf("%q: %v", p, vs)
		}
	}
	if vs := Validate(map[string]string{"a-b/C_1.rego": "x"}, Limits{}); len(vs) > 0 {
		t.Errorf("%v", vs)
	}
}

func TestDigest(t *testing.T) {
	base := Digest(map[string]string{"a.rego": "x", "b.rego": "y"})
	if !strings.HasPrefix(base, "sha256:") || len(base) != 71 {
		t.Error(base)
	}
	if base != Digest(map[string]string{"b.rego": "y", "a.rego": "x"}) {
		t.Error("depends on order")
	}
	for name, files := range map[string]map[string]string{
		"text": {"a.rego": "x", "b.rego": "z"}, "path": {"a.rego": "x", "c.rego": "y"}, "moved border": {"a.rego": "xb.rego", "": "y"}, "fewer": {"a.rego": "x"}, "none": {},
	} {
		if Digest(files) == base {
			t.Errorf("%s: the same digest", name)
		}
	}
}
