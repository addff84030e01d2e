package admit

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

var (
	labelName   = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$`)
	dnsName     = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	envName     = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,127}$`)
	headerName  = regexp.MustCompile("^[a-z0-9!#$%&'*+.^_`|~-]+$")
	methodToken = regexp.MustCompile(`^[A-Z]+$`)
	autoName    = regexp.MustCompile(`^r[0-9]+$`)
)

// bounds of a duration field.
type bounds struct{ min, max time.Duration }

var (
	anyDelay    = bounds{0, time.Hour}
	probePeriod = bounds{100 * time.Millisecond, time.Hour}
	probeWait   = bounds{10 * time.Millisecond, 5 * time.Minute}
	longWait    = bounds{time.Second, 24 * time.Hour}
	callWait    = bounds{time.Millisecond, time.Hour}
)

// at writes "list[i]".
func at(list string, i int) string { return fmt.Sprintf("%s[%d]", list, i) }

// key writes `map["k"]`.
func key(m, k string) string { return fmt.Sprintf("%s[%q]", m, clip(k)) }

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

func (c *checker) id(field, value string) bool {
	if _, err := api.ParseID(value); err != nil {
		c.add(field, "%v", err)
		return false
	}
	return true
}

func (c *checker) dns(field, value string) bool {
	if len(value) > 253 || !dnsName.MatchString(value) {
		c.add(field, "%q is no DNS name: use lower-case labels of a-z, 0-9 and '-', joined by '.'", clip(value))
		return false
	}
	return true
}

func (c *checker) duration(field string, d *durationpb.Duration, b bounds) {
	if d == nil {
		return
	}
	if err := d.CheckValid(); err != nil {
		c.add(field, "is no valid duration")
		return
	}
	if v := d.AsDuration(); v < b.min || v > b.max {
		c.add(field, "%v is not between %v and %v", v, b.min, b.max)
	}
}

// labelKey checks "name" or "prefix.example/name".
func (c *checker) labelKey(field, k string) {
	name := k
	if prefix, rest, ok := strings.Cut(k, "/"); ok {
		name = rest
		if len(prefix) > 253 || !dnsName.MatchString(prefix) {
			c.add(field, "label key %q: the part before '/' is no DNS name", clip(k))
			return
		}
	}
	if !labelName.MatchString(name) {
		c.add(field, "label key %q: use 1 to 63 characters A-Z, a-z, 0-9, '-', '_' and '.', beginning and ending with a letter or digit", clip(k))
	}
}

func (c *checker) labelValue(field, v string) {
	if v != "" && !labelName.MatchString(v) {
		c.add(field, "label value %q: use at most 63 characters A-Z, a-z, 0-9, '-', '_' and '.', beginning and ending with a letter or digit", clip(v))
	}
}

func (c *checker) labels(field string, m map[string]string, most int) {
	if len(m) > most {
		c.add(field, "has %d entries; at most %d are allowed", len(m), most)
		return
	}
	for _, k := range keys(m) {
		c.labelKey(key(field, k), k)
		c.labelValue(key(field, k), m[k])
	}
}

// uniqueIDs checks a list of IDs without doubles.
func (c *checker) uniqueIDs(field string, list []string) {
	for i, v := range list {
		if c.id(at(field, i), v) && slices.Contains(list[:i], v) {
			c.add(at(field, i), "%q is there twice", v)
		}
	}
}

func (c *checker) tolerations(field string, list []*portolanv1.Toleration) {
	for i, t := range list {
		c.labelKey(at(field, i)+".key", t.GetKey())
		c.labelValue(at(field, i)+".value", t.GetValue())
		if _, ok := portolanv1.TaintEffect_name[int32(t.GetEffect())]; !ok {
			c.add(at(field, i)+".effect", "is no known effect")
		}
		if t.GetStay() != nil && t.GetEffect() != portolanv1.TaintEffect_TAINT_EFFECT_NO_EXECUTE {
			c.add(at(field, i)+".stay", "only counts for TAINT_EFFECT_NO_EXECUTE")
		}
		c.duration(at(field, i)+".stay", t.GetStay(), bounds{0, 30 * 24 * time.Hour})
	}
}

// absolute checks a path inside a container.
func (c *checker) absolute(field, p string) bool {
	if !strings.HasPrefix(p, "/") || path.Clean(p) != p || strings.ContainsRune(p, 0) || len(p) > 4096 {
		c.add(field, "%q is no canonical absolute path: begin with '/', without '.', '..', '//' and a '/' at the end", clip(p))
		return false
	}
	return true
}

// urlPath checks a path of a request.
func (c *checker) urlPath(field, p string) {
	bad := !strings.HasPrefix(p, "/") || strings.Contains(p, "//") || strings.ContainsAny(p, "?#%\\ \t\r\n\x00")
	for seg := range strings.SplitSeq(p, "/") {
		bad = bad || seg == "." || seg == ".."
	}
	if bad {
		c.add(field, "%q is no canonical path: begin with '/', without '//', '.', '..', '%%', '?', '#' and spaces", clip(p))
	}
}

func (c *checker) text(field string, list []string) {
	for i, s := range list {
		if strings.ContainsRune(s, 0) {
			c.add(at(field, i), "holds a NUL byte")
		}
	}
}
