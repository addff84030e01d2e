// Package configfile reads the configuration files of the planes' binaries:
// strict YAML, with ${NAME} in values taken from the environment. It owns their
// syntax, never their fields, defaults or checks, which stay with each binary.
// Its functions are safe for concurrent use.
package configfile

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"time"

	"sigs.k8s.io/yaml"
)

// placeholder is what is taken from the environment. All other dollar signs stay
// as they are.
var placeholder = regexp.MustCompile(`\$\{[A-Z][A-Z0-9_]*\}`)

// Load reads a file into a struct, with placeholders from the process's
// environment.
func Load(path string, into any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	if err := Parse(b, os.LookupEnv, into); err != nil {
		return fmt.Errorf("read the configuration %s: %w", path, err)
	}
	return nil
}

// Parse reads YAML into a struct. Fields that it does not have, and keys that
// stand twice, are refused. ${NAME}, upper case, in a value stands for what
// lookup gives; the value is put in after parsing, so that nothing in it can
// change the file's shape. Each name that lookup does not know is an error.
func Parse(b []byte, lookup func(name string) (string, bool), into any) error {
	var tree any
	if err := yaml.UnmarshalStrict(b, &tree); err != nil {
		return err
	}
	var errs []error
	tree = expand(tree, func(ref string) string {
		name := ref[len("${") : len(ref)-len("}")]
		v, ok := lookup(name)
		if !ok {
			errs = append(errs, fmt.Errorf("%s: the environment has no %s", ref, name))
		}
		return v
	})
	if err := errors.Join(errs...); err != nil {
		return err
	}
	b, err := yaml.Marshal(tree)
	if err != nil {
		return err
	}
	return yaml.UnmarshalStrict(b, into)
}

// expand replaces the placeholders in the text values of a tree.
func expand(tree any, value func(ref string) string) any {
	switch v := tree.(type) {
	case string:
		return placeholder.ReplaceAllStringFunc(v, value)
	case []any:
		for i := range v {
			v[i] = expand(v[i], value)
		}
	case map[string]any:
		for k := range v {
			v[k] = expand(v[k], value)
		}
	}
	return tree
}

// Duration is written as in Go: "3s", "500ms".
type Duration time.Duration

// UnmarshalJSON implements json.Unmarshaler.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("a duration is a text like \"3s\": %w", err)
	}
	v, err := time.ParseDuration(s)
	*d = Duration(v)
	return err
}
