// Package manifest reads objects from YAML, checked against the proto schema:
// unknown fields, wrong types and unknown words are refused with line and column,
// all of them at once. It owns the shape of manifests and does no I/O but reading
// the files it is given.
//
// A document is
//
//	kind: Workload
//	tenant: shop        # for kinds of a tenant
//	name: web
//	labels: {team: a}
//	spec: {…}           # the kind's spec; enum words in short form ("daemon")
//
// Aliases and anchors are refused: a manifest says what it means where it means it.
package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/portolan-io/portolan/federation/api"
)

// Limits of one read.
const (
	MaxFileBytes = 4 << 20
	MaxDocuments = 2000
)

// Object is one document.
type Object struct {
	Kind Kind
	// Message has name, labels and spec set.
	Message proto.Message
	// Where it began: file:line.
	Where string
}

// Name of the object.
func (o Object) Name() string {
	m := o.Message.ProtoReflect()
	return m.Get(m.Descriptor().Fields().ByName("name")).String()
}

// Kind is a class of objects as users write it.
type Kind struct {
	// Name of the proto message: "Workload". Plural: "Workloads".
	Name, Plural string
	// Service that has its methods.
	Service string
	// Collection in resource names.
	Collection string
	// Tenant: "" never, "must", "may".
	Tenant string
	// ReadOnly kinds are only read.
	ReadOnly bool
	// Aliases on the command line, lower case.
	Aliases []string
}

// Kinds in the order in which they are applied; deletion goes the other way.
var Kinds = []Kind{
	{Name: "Tenant", Plural: "Tenants", Service: "TenantService", Collection: "tenants", Aliases: []string{"t"}},
	{Name: "RoleBinding", Plural: "RoleBindings", Service: "TenantService", Collection: "roleBindings", Aliases: []string{"rb"}},
	{Name: "Cluster", Plural: "Clusters", Service: "ClusterService", Collection: "clusters", Aliases: []string{"c"}},
	{Name: "PolicyBundle", Plural: "PolicyBundles", Service: "PolicyService", Collection: "policyBundles", Tenant: "may", Aliases: []string{"policy", "policies", "pb"}},
	{Name: "Workload", Plural: "Workloads", Service: "WorkloadService", Collection: "workloads", Tenant: "must", Aliases: []string{"w", "wl"}},
	{Name: "Service", Plural: "Services", Service: "MeshService", Collection: "services", Tenant: "must", Aliases: []string{"svc"}},
	{Name: "Route", Plural: "Routes", Service: "MeshService", Collection: "routes", Tenant: "must", Aliases: []string{"rt"}},
	{Name: "WorkloadRevision", Plural: "WorkloadRevisions", Service: "WorkloadService", Collection: "revisions", Tenant: "must", ReadOnly: true, Aliases: []string{"revision", "revisions", "rev"}},
	{Name: "Placement", Plural: "Placements", Service: "WorkloadService", Collection: "placements", Tenant: "must", ReadOnly: true, Aliases: []string{"pl"}},
	{Name: "AuditEntry", Plural: "AuditEntries", Service: "AuditService", Collection: "auditEntries", Tenant: "may", ReadOnly: true, Aliases: []string{"audit"}},
}

// FindKind understands "Workload", "workloads", "wl".
func FindKind(word string) (Kind, error) {
	w := strings.ToLower(word)
	var names []string
	for _, k := range Kinds {
		if w == strings.ToLower(k.Name) || w == strings.ToLower(k.Plural) {
			return k, nil
		}
		if slices.Contains(k.Aliases, w) {
			return k, nil
		}
		names = append(names, strings.ToLower(k.Plural))
	}
	return Kind{}, api.E(api.Invalid, "find the kind", "there is no kind %q; there are: %s", word, strings.Join(names, ", "))
}

// New makes an empty object of the kind.
func (k Kind) New() proto.Message { return newMessage("portolan.v1." + k.Name) }

func newMessage(name string) proto.Message {
	t, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(name))
	if err != nil {
		panic("manifest: no message " + name) // the table above and the protos disagree
	}
	return t.New().Interface()
}

// FullName makes the resource name out of what a person says: an ID, or a name
// in full. The parent of revisions and placements is a workload and comes before
// a slash: "web/v2".
func (k Kind) FullName(tenant, id string) (string, error) {
	if strings.HasPrefix(id, "tenants/") || strings.HasPrefix(id, k.Collection+"/") {
		return id, nil
	}
	if k.Tenant == "must" && tenant == "" {
		return "", api.E(api.Invalid, "name the object", "a %s belongs to a tenant: say --tenant, or give the name in full", strings.ToLower(k.Name))
	}
	switch k.Name {
	case "WorkloadRevision", "Placement":
		w, r, ok := strings.Cut(id, "/")
		if !ok {
			return "", api.E(api.Invalid, "name the object", "%q: say WORKLOAD/%s", id, strings.ToUpper(strings.TrimSuffix(k.Collection, "s")))
		}
		return api.WorkloadName(tenant, w) + "/" + k.Collection + "/" + r, nil
	case "AuditEntry":
		return k.Collection + "/" + id, nil
	}
	if tenant == "" || k.Tenant == "" {
		return k.Collection + "/" + id, nil
	}
	return api.TenantName(tenant) + "/" + k.Collection + "/" + id, nil
}

// Fault is one thing wrong in a file.
type Fault struct {
	File         string
	Line, Column int
	Field        string
	Message      string
}

func (f Fault) String() string {
	s := fmt.Sprintf("%s:%d:%d: ", f.File, f.Line, f.Column)
	if f.Field != "" {
		s += f.Field + ": "
	}
	return s + f.Message
}

// Faults is the error of a read.
type Faults []Fault

func (f Faults) Error() string {
	lines := make([]string, len(f))
	for i := range f {
		lines[i] = f[i].String()
	}
	return strings.Join(lines, "\n")
}

// ReadPaths reads files, folders (their *.yaml, *.yml and *.json, in order of
// name) and "-" for stdin, and sorts the objects for application.
func ReadPaths(paths []string, stdin io.Reader) ([]Object, error) {
	var all []Object
	var faults Faults
	for _, p := range paths {
		files, err := expand(p)
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			b, err := read(f, stdin)
			if err != nil {
				return nil, err
			}
			objs, err := Parse(f, b)
			if fs, ok := errors.AsType[Faults](err); ok {
				faults = append(faults, fs...)
				continue
			}
			if err != nil {
				return nil, err
			}
			all = append(all, objs...)
		}
	}
	if len(faults) > 0 {
		return nil, faults
	}
	Sort(all)
	return all, nil
}

// Sort brings objects into the order in which they can be applied.
func Sort(objs []Object) {
	rank := map[string]int{}
	for i, k := range Kinds {
		rank[k.Name] = i
	}
	sort.SliceStable(objs, func(i, j int) bool { return rank[objs[i].Kind.Name] < rank[objs[j].Kind.Name] })
}

func expand(path string) ([]string, error) {
	if path == "-" {
		return []string{"-"}, nil
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read manifests: %w", err)
	}
	if !st.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, fmt.Errorf("read manifests: %w", err)
	}
	var out []string
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".yaml", ".yml", ".json":
			out = append(out, filepath.Join(path, e.Name()))
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("read manifests: no .yaml, .yml or .json file in %s", path)
	}
	return out, nil
}

func read(path string, stdin io.Reader) ([]byte, error) {
	r := stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("read manifests: %w", err)
		}
		defer func() { _ = f.Close() }()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, MaxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read manifests: %w", err)
	}
	if len(b) > MaxFileBytes {
		return nil, fmt.Errorf("read manifests: %s is larger than %d MiB: split it", path, MaxFileBytes>>20)
	}
	return b, nil
}

// Parse reads the documents of one file. Faults of all documents come together.
func Parse(file string, data []byte) ([]Object, error) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var objs []Object
	var faults Faults
	for n := 0; ; n++ {
		var doc yaml.Node
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			faults = append(faults, syntaxFault(file, err))
			break
		}
		if n >= MaxDocuments {
			return nil, fmt.Errorf("read manifests: %s has more than %d documents: split it", file, MaxDocuments)
		}
		if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
			continue
		}
		p := &parser{file: file}
		obj, ok := p.object(doc.Content[0])
		faults = append(faults, p.faults...)
		if ok && len(p.faults) == 0 {
			objs = append(objs, obj)
		}
	}
	if len(faults) > 0 {
		return nil, faults
	}
	return objs, nil
}

func syntaxFault(file string, err error) Fault {
	msg := strings.TrimPrefix(err.Error(), "yaml: ")
	f := Fault{File: file, Line: 1, Column: 1, Message: msg}
	if _, serr := fmt.Sscanf(msg, "line %d:", &f.Line); serr == nil {
		_, f.Message, _ = strings.Cut(msg, ": ")
	}
	return f
}

type parser struct {
	file   string
	faults Faults
}

func (p *parser) fault(n *yaml.Node, field, format string, args ...any) {
	p.faults = append(p.faults, Fault{File: p.file, Line: n.Line, Column: n.Column, Field: field, Message: fmt.Sprintf(format, args...)})
}

func (p *parser) object(n *yaml.Node) (Object, bool) {
	if n.Kind != yaml.MappingNode {
		p.fault(n, "", "a document must be a mapping with kind, name and spec")
		return Object{}, false
	}
	fields := p.mapping(n, "")
	text := func(key string) (string, *yaml.Node) {
		v := fields[key]
		if v == nil {
			return "", n
		}
		if v.Kind != yaml.ScalarNode {
			p.fault(v, key, "must be a word")
			return "", v
		}
		return v.Value, v
	}
	kindWord, kindNode := text("kind")
	if kindWord == "" {
		p.fault(kindNode, "kind", "is missing: say which kind of object this is, for example `kind: Workload`")
		return Object{}, false
	}
	kind, err := FindKind(kindWord)
	if err != nil || kind.ReadOnly {
		p.fault(kindNode, "kind", "%q cannot be applied; use Tenant, RoleBinding, Cluster, PolicyBundle, Workload, Service or Route", kindWord)
		return Object{}, false
	}
	tenant, tenantNode := text("tenant")
	id, idNode := text("name")
	switch {
	case id == "":
		p.fault(idNode, "name", "is missing")
	case tenant == "" && kind.Tenant == "must":
		p.fault(n, "tenant", "is missing: a %s belongs to a tenant", kind.Name)
	case tenant != "" && kind.Tenant == "":
		p.fault(tenantNode, "tenant", "a %s belongs to no tenant", kind.Name)
	default:
		if _, err := api.ParseID(id); err != nil {
			p.fault(idNode, "name", "%v", err)
		}
		if _, err := api.ParseID(tenant); tenant != "" && err != nil {
			p.fault(tenantNode, "tenant", "%v", err)
		}
	}
	msg := kind.New()
	body := map[string]any{}
	for _, key := range sortedKeys(fields) {
		v := fields[key]
		switch key {
		case "kind", "tenant", "name":
		case "labels", "spec", "etag":
			fd := msg.ProtoReflect().Descriptor().Fields().ByName(protoreflect.Name(key))
			body[key] = p.value(v, fd, key)
		default:
			p.fault(v, key, "unknown field; a document has kind, tenant, name, labels and spec")
		}
	}
	if len(p.faults) > 0 {
		return Object{}, false
	}
	name, err := kind.FullName(tenant, id)
	if err != nil {
		p.fault(n, "name", "%v", err)
		return Object{}, false
	}
	body["name"] = name
	raw, err := json.Marshal(body)
	if err == nil {
		err = protojson.Unmarshal(raw, msg)
	}
	if err != nil {
		// Everything known was checked with its place; what is left has none.
		p.fault(n, "", "%s", strings.TrimSpace(strings.TrimPrefix(err.Error(), "proto:")))
		return Object{}, false
	}
	return Object{Kind: kind, Message: msg, Where: fmt.Sprintf("%s:%d", p.file, n.Line)}, true
}

func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}
