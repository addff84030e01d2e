// Package configtest gives the binaries' tests the configuration that the Helm
// charts render, so that a chart cannot drift from what its binary reads. It only
// reads the goldens.
package configtest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// FromChart writes the named file of the ConfigMap in a rendered chart to a
// temporary folder and returns its path.
func FromChart(t testing.TB, golden, name string) string {
	t.Helper()
	b, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	for doc := range strings.SplitSeq(string(b), "\n---\n") {
		var object struct {
			Kind string            `json:"kind"`
			Data map[string]string `json:"data"`
		}
		if err := yaml.Unmarshal([]byte(doc), &object); err != nil {
			t.Fatalf("%s: %v", golden, err)
		}
		if text, ok := object.Data[name]; ok && object.Kind == "ConfigMap" {
			file := filepath.Join(t.TempDir(), name)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			return file
		}
	}
	t.Fatalf("%s has no ConfigMap with %s", golden, name)
	return ""
}
