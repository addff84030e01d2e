package distribute

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func generation(t *testing.T, revision int, kv ...string) Generation {
	g := Generation{Watermark: mark(t, revision), Resources: map[string]*Resource{}}
	for _, r := range set(t, kv...) {
		g.Resources[r.Name] = r
	}
	return g
}

func TestLastGoodFallsBackOneByOne(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "lastgood")
	l, err := OpenLastGood(dir, 3)
	if err != nil {
		t.Fatal(err)
	}
	if _, err, _ := l.Latest(); err == nil {
		t.Error("an empty directory has a generation")
	}
	for i, body := range []string{"1", "2", "3", "4"} {
		if err := l.Save(generation(t, i+1, "a="+body), []byte("meta"+body)); err != nil {
			t.Fatal(err)
		}
	}
	saved, err := l.Load()
	if err != nil || len(saved) != 3 {
		t.Fatalf("loaded %d: %v", len(saved), err)
	}
	if s := saved[0]; contents(s.Generation) != "a=4" || body(s.Watermark) != "4" || string(s.Meta) != "meta4" || s.Resources["a"].Version != res(t, "a", "4").Version || s.Resources["a"].Type != testType {
		t.Errorf("newest: %+v", s)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*"+lastGoodSuffix))
	damage(t, files[2], func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
	damage(t, files[1], func(b []byte) []byte { return b[:10] })
	l, err = OpenLastGood(dir, 3) // another process
	if err != nil {
		t.Fatal(err)
	}
	saved, err = l.Load()
	if len(saved) != 1 || contents(saved[0].Generation) != "a=2" {
		t.Fatalf("loaded %+v", saved)
	}
	if err == nil || !strings.Contains(err.Error(), "checksum") || !strings.Contains(err.Error(), "cut short") {
		t.Errorf("broken generations are not reported: %v", err)
	}
	s, err, broken := l.Latest()
	if err != nil || broken == nil || contents(s.Generation) != "a=2" {
		t.Errorf("latest: %+v %v %v", s, err, broken)
	}
	if err := l.Save(generation(t, 9, "a=9"), nil); err != nil {
		t.Fatal(err)
	}
	if s, _, _ := l.Latest(); contents(s.Generation) != "a=9" {
		t.Errorf("a new generation does not come before broken ones: %+v", s)
	}
}

func damage(t *testing.T, file string, f func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, f(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

func FuzzDecodeGeneration(f *testing.F) {
	b, err := encodeGeneration(Generation{Resources: map[string]*Resource{"a": res(f, "a", "1")}}, []byte("m"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(lastGoodMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeGeneration(b)
		if err == nil && s.Resources == nil {
			t.Error("no error and no resources")
		}
	})
}
