package manifest

import (
	"math"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// mapping gives the fields of a node; doubled and odd keys are faults.
func (p *parser) mapping(n *yaml.Node, path string) map[string]*yaml.Node {
	out := map[string]*yaml.Node{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Kind != yaml.ScalarNode {
			p.fault(k, path, "a key must be a word")
			continue
		}
		if _, ok := out[k.Value]; ok {
			p.fault(k, join(path, k.Value), "is there twice")
			continue
		}
		if v.Kind == yaml.AliasNode || v.Anchor != "" {
			p.fault(v, join(path, k.Value), "anchors and aliases are refused: write the value out")
			continue
		}
		out[k.Value] = v
	}
	return out
}

func join(path, field string) string {
	if path == "" {
		return field
	}
	return path + "." + field
}

// value converts a node for protojson, and checks it against the field.
func (p *parser) value(n *yaml.Node, fd protoreflect.FieldDescriptor, path string) any {
	switch {
	case n.Tag == "!!null":
		return nil
	case fd.IsMap():
		return p.mapValue(n, fd, path)
	case fd.IsList():
		if n.Kind != yaml.SequenceNode {
			p.fault(n, path, "must be a list")
			return nil
		}
		out := make([]any, 0, len(n.Content))
		for i, c := range n.Content {
			out = append(out, p.single(c, fd, path+"["+strconv.Itoa(i)+"]"))
		}
		return out
	}
	return p.single(n, fd, path)
}

func (p *parser) mapValue(n *yaml.Node, fd protoreflect.FieldDescriptor, path string) any {
	if n.Kind != yaml.MappingNode {
		p.fault(n, path, "must be a mapping")
		return nil
	}
	out := map[string]any{}
	fields := p.mapping(n, path)
	for _, k := range sortedKeys(fields) {
		out[k] = p.single(fields[k], fd.MapValue(), path+"["+k+"]")
	}
	return out
}

// single converts one value that is no list and no map.
func (p *parser) single(n *yaml.Node, fd protoreflect.FieldDescriptor, path string) any {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		p.fault(n, path, "anchors and aliases are refused: write the value out")
		return nil
	}
	if fd.Kind() == protoreflect.MessageKind {
		if fd.Message().FullName() == "google.protobuf.Duration" {
			return p.duration(n, path)
		}
		return p.message(n, fd.Message(), path)
	}
	if n.Kind != yaml.ScalarNode {
		p.fault(n, path, "must be a single value")
		return nil
	}
	switch fd.Kind() {
	case protoreflect.StringKind:
		if n.Tag == "!!bool" {
			p.fault(n, path, "must be text: put %s in quotes", n.Value)
		}
		return n.Value
	case protoreflect.BoolKind:
		b, err := strconv.ParseBool(n.Value)
		if err != nil || n.Tag != "!!bool" {
			p.fault(n, path, "must be true or false, not %q", clip(n.Value))
		}
		return b
	case protoreflect.EnumKind:
		return p.enum(n, fd.Enum(), path)
	case protoreflect.Int32Kind:
		return p.integer(n, path, math.MinInt32, math.MaxInt32)
	case protoreflect.Int64Kind:
		return p.integer(n, path, math.MinInt64, math.MaxInt64)
	case protoreflect.DoubleKind:
		v, err := strconv.ParseFloat(n.Value, 64)
		if err != nil || math.IsInf(v, 0) || math.IsNaN(v) || (n.Tag != "!!int" && n.Tag != "!!float") {
			p.fault(n, path, "must be a number, not %q", clip(n.Value))
			return nil
		}
		return v
	}
	p.fault(n, path, "cannot be set in a manifest")
	return nil
}

func clip(s string) string {
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}

func (p *parser) integer(n *yaml.Node, path string, least, most int64) any {
	v, err := strconv.ParseInt(n.Value, 0, 64)
	if err != nil || n.Tag != "!!int" {
		p.fault(n, path, "must be a whole number, not %q", clip(n.Value))
		return nil
	}
	if v < least || v > most {
		p.fault(n, path, "%d is out of range", v)
		return nil
	}
	return v
}

// enum accepts the full word and the short one: WORKLOAD_KIND_DAEMON, daemon.
func (p *parser) enum(n *yaml.Node, ed protoreflect.EnumDescriptor, path string) any {
	prefix := strings.TrimSuffix(string(ed.Values().Get(0).Name()), "UNSPECIFIED")
	var words []string
	for i := 1; i < ed.Values().Len(); i++ {
		full := string(ed.Values().Get(i).Name())
		short := strings.ToLower(strings.TrimPrefix(full, prefix))
		if n.Value == full || strings.ReplaceAll(strings.ToLower(n.Value), "-", "_") == short {
			return full
		}
		words = append(words, short)
	}
	p.fault(n, path, "unknown word %q; use %s", clip(n.Value), strings.Join(words, ", "))
	return nil
}

// duration accepts 90s, 1m30s and protobuf's 1.5s.
func (p *parser) duration(n *yaml.Node, path string) any {
	d, err := time.ParseDuration(n.Value)
	if err != nil || n.Kind != yaml.ScalarNode {
		p.fault(n, path, "must be a duration like 500ms, 10s or 5m, not %q", clip(n.Value))
		return nil
	}
	return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "s"
}

func (p *parser) message(n *yaml.Node, md protoreflect.MessageDescriptor, path string) any {
	if n.Kind != yaml.MappingNode {
		p.fault(n, path, "must be a mapping with fields of %s", md.Name())
		return nil
	}
	out := map[string]any{}
	oneofs := map[protoreflect.Name]string{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		// In the order of the file, so that faults read from top to bottom.
		k := n.Content[i]
		fd := md.Fields().ByName(protoreflect.Name(k.Value))
		if fd == nil {
			fd = md.Fields().ByJSONName(k.Value)
		}
		if fd == nil {
			p.fault(k, join(path, k.Value), "unknown field%s", suggest(k.Value, md))
		} else if o := fd.ContainingOneof(); o != nil && !o.IsSynthetic() {
			if first, ok := oneofs[o.Name()]; ok {
				p.fault(k, join(path, k.Value), "only one of %s and %s may be given", first, k.Value)
			}
			oneofs[o.Name()] = k.Value
		}
	}
	fields := p.mapping(n, path)
	for _, k := range sortedKeys(fields) {
		fd := md.Fields().ByName(protoreflect.Name(k))
		if fd == nil {
			fd = md.Fields().ByJSONName(k)
		}
		if fd == nil {
			continue
		}
		if v := p.value(fields[k], fd, join(path, k)); v != nil {
			out[string(fd.Name())] = v
		}
	}
	return out
}

// suggest names the nearest field, or all of them.
func suggest(word string, md protoreflect.MessageDescriptor) string {
	best, bestD := "", 1+max(1, len(word)/3)
	var all []string
	for i := range md.Fields().Len() {
		f := string(md.Fields().Get(i).Name())
		all = append(all, f)
		if d := distance(strings.ToLower(word), f); d < bestD {
			best, bestD = f, d
		}
	}
	if best != "" {
		return "; did you mean " + best + "?"
	}
	return "; there are " + strings.Join(all, ", ")
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		prev := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			prev, row[j] = row[j], min(row[j]+1, row[j-1]+1, prev+cost)
		}
	}
	return row[len(b)]
}
