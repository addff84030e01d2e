package configfile_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/portolan-io/portolan/federation/api/configfile"
)

type config struct {
	Name    string              `json:"name"`
	List    []string            `json:"list"`
	Labels  map[string]string   `json:"labels"`
	Timeout configfile.Duration `json:"timeout"`
	Count   int                 `json:"count"`
}

func environment(name string) (string, bool) {
	v, ok := map[string]string{
		"POD_NAME": "a-0", "DIGITS": "007", "WAIT": "2s", "EMPTY": "",
		"URL":  `postgres://u:"p#x: y'@h/d?q={z}`,
		"EVIL": "x\nlist: [taken]",
	}[name]
	return v, ok
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		name, in string
		want     config
	}{
		{"plain", "name: a\ncount: 3\ntimeout: 3s", config{Name: "a", Count: 3, Timeout: configfile.Duration(3 * time.Second)}},
		{"a number as text", "name: 4", config{Name: "4"}},
		{"alone", "name: ${POD_NAME}", config{Name: "a-0"}},
		{"inside a text", "name: /tokens/${POD_NAME}.${POD_NAME}", config{Name: "/tokens/a-0.a-0"}},
		{"digits stay a text", "name: ${DIGITS}", config{Name: "007"}},
		{"set but empty", "name: x${EMPTY}", config{Name: "x"}},
		{"lists and maps", "list: ['${POD_NAME}']\nlabels: {zone: '${POD_NAME}'}", config{List: []string{"a-0"}, Labels: map[string]string{"zone": "a-0"}}},
		{"a duration", "timeout: ${WAIT}", config{Timeout: configfile.Duration(2 * time.Second)}},
		{"every character survives", "name: ${URL}", config{Name: `postgres://u:"p#x: y'@h/d?q={z}`}},
		{"a value cannot add fields", "name: ${EVIL}", config{Name: "x\nlist: [taken]"}},
		{"other dollars stay", `name: "$POD_NAME ${pod} $${x} ${A-B} $"`, config{Name: "$POD_NAME ${pod} $${x} ${A-B} $"}},
		{"not in keys", "labels: {'${POD_NAME}': x}", config{Labels: map[string]string{"${POD_NAME}": "x"}}},
		{"not in comments", "name: a # ${NOWHERE}", config{Name: "a"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got config
			if err := configfile.Parse([]byte(c.in), environment, &got); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"an unknown field", "colour: blue", "colour"},
		{"a key that stands twice", "name: a\nname: b", "name"},
		{"an unknown name", "name: ${NOWHERE}", "NOWHERE"},
		{"all unknown names, first", "name: ${NOWHERE}\nlist: ['${NEITHER}']", "NEITHER"},
		{"all unknown names, second", "name: ${NOWHERE}\nlist: ['${NEITHER}']", "NOWHERE"},
		{"a duration without a unit", "timeout: 3", `like "3s"`},
		{"no YAML", "name: [", "yaml"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := configfile.Parse([]byte(c.in), environment, &config{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one about %s", err, c.want)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	t.Setenv("CONFIGFILE_NAME", "b-1")
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte("name: ${CONFIGFILE_NAME}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var c config
	if err := configfile.Load(file, &c); err != nil || c.Name != "b-1" {
		t.Errorf("%+v, %v", c, err)
	}
	if err := configfile.Load(file+".none", &c); err == nil || !strings.Contains(err.Error(), "c.yaml.none") {
		t.Errorf("error %v, want one that names the file", err)
	}
}
