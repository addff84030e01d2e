// Package badspec is the table of bad requests: what a caller may send that must
// be refused, with the code and the path of the field that the refusal names. It
// holds data and decodes it; it sends nothing. The server's tests run it in one
// process, the live tests against a whole fleet.
//
// Concurrency: functions only, safe for concurrent use.
package badspec

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"sigs.k8s.io/yaml"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

//go:embed badspec.yaml
var table []byte

// Row is one bad request.
type Row struct {
	Name string `json:"name"`
	// Op is create (the default), update or delete.
	Op string `json:"op"`
	// Kind by message name: "Workload".
	Kind string `json:"kind"`
	// As is who sends it: empty for an admin of the tenant, "fleet" for a fleet
	// admin, "other" for an admin of another tenant.
	As string `json:"as"`
	// Body in JSON form. When absent it is the kind's base with Set applied.
	Body map[string]any `json:"body"`
	// Set changes fields of the base, by path; null removes the field.
	Set map[string]any `json:"set"`
	// Mask are the paths of update_mask.
	Mask []string `json:"mask"`
	// RequestID goes into the request.
	RequestID string `json:"requestId"`
	// Stage says where it is refused: "decode" before anything is sent, "admit"
	// (the default) by the server, "policy" by the fleet's baseline bundle.
	Stage string `json:"stage"`
	// Code and Field of the refusal. Field is empty when none is to blame.
	Code  string `json:"code"`
	Field string `json:"field"`
	// Says is part of the message; optional.
	Says string `json:"says"`
}

type file struct {
	Bases    map[string]map[string]any `json:"bases"`
	Fixtures []Fixture                 `json:"fixtures"`
	Rows     []Row                     `json:"rows"`
}

// Fixture is an object that must exist before the rows are sent. All of them are
// created by a fleet admin, in order.
type Fixture struct {
	Kind string         `json:"kind"`
	Body map[string]any `json:"body"`
}

// Values fill the table's placeholders.
type Values struct {
	// Tenant (ID) whose objects these are, and another one that exists.
	Tenant, Other string
	// Registry on the fleet's list, and the repository and tag of an image there.
	Registry, Image string
	// Suffix granted to the tenant for ingress hosts.
	Suffix string
	// Fleet is the trust domain.
	Fleet string
}

// Load reads the table.
func Load(v Values) ([]Fixture, []Row, error) {
	text := strings.NewReplacer("$TENANT", v.Tenant, "$OTHER", v.Other, "$REGISTRY", v.Registry, "$IMAGE", v.Registry+"/"+v.Image, "$SUFFIX", v.Suffix, "$FLEET", v.Fleet).Replace(string(table))
	var f file
	if err := yaml.UnmarshalStrict([]byte(text), &f); err != nil {
		return nil, nil, fmt.Errorf("read the table of bad specs: %w", err)
	}
	for i := range f.Rows {
		r := &f.Rows[i]
		if r.Op == "" {
			r.Op = "create"
		}
		if r.Stage == "" {
			r.Stage = "admit"
		}
		if r.Body == nil {
			base, err := clone(f.Bases[r.Kind])
			if err != nil {
				return nil, nil, err
			}
			r.Body = base
		}
		for _, path := range slices.Sorted(maps.Keys(r.Set)) {
			if err := set(r.Body, path, expand(r.Set[path])); err != nil {
				return nil, nil, fmt.Errorf("row %q: set %s: %w", r.Name, path, err)
			}
		}
	}
	return f.Fixtures, f.Rows, nil
}

func clone(m map[string]any) (map[string]any, error) {
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	out := map[string]any{}
	return out, json.Unmarshal(b, &out)
}

// expand turns {repeat: "x", times: 3} into "xxx", {entries: n} into a map and
// {list: value, times: n} into a list, for what is too long to be written out.
func expand(v any) any {
	m, ok := v.(map[string]any)
	if !ok {
		return v
	}
	times, _ := m["times"].(float64)
	if s, ok := m["repeat"].(string); ok {
		return strings.Repeat(s, int(times))
	}
	if item, ok := m["list"]; ok {
		out := make([]any, int(times))
		for i := range out {
			out[i] = expand(item)
		}
		return out
	}
	if n, ok := m["entries"].(float64); ok {
		out := map[string]any{}
		for i := range int(n) {
			out[fmt.Sprintf("k%d", i)] = "v"
		}
		return out
	}
	return v
}

// set writes a value at "a.b[0].c" and makes the objects on the way.
func set(m map[string]any, path string, v any) error {
	head, rest, deeper := strings.Cut(path, ".")
	name, index, indexed := strings.Cut(strings.TrimSuffix(head, "]"), "[")
	if !indexed {
		if !deeper {
			if v == nil {
				delete(m, name)
			} else {
				m[name] = v
			}
			return nil
		}
		child, ok := m[name].(map[string]any)
		if !ok {
			child = map[string]any{}
			m[name] = child
		}
		return set(child, rest, v)
	}
	i, err := strconv.Atoi(index)
	if err != nil {
		return err
	}
	list, _ := m[name].([]any)
	for len(list) <= i {
		list = append(list, map[string]any{})
	}
	m[name] = list
	if !deeper {
		list[i] = v
		return nil
	}
	child, ok := list[i].(map[string]any)
	if !ok {
		child = map[string]any{}
		list[i] = child
	}
	return set(child, rest, v)
}

func message(kind string) (proto.Message, error) {
	switch kind {
	case "Tenant":
		return &portolanv1.Tenant{}, nil
	case "Cluster":
		return &portolanv1.Cluster{}, nil
	case "RoleBinding":
		return &portolanv1.RoleBinding{}, nil
	case "Workload":
		return &portolanv1.Workload{}, nil
	case "Service":
		return &portolanv1.Service{}, nil
	case "Route":
		return &portolanv1.Route{}, nil
	case "PolicyBundle":
		return &portolanv1.PolicyBundle{}, nil
	}
	return nil, fmt.Errorf("%q is no kind", kind)
}

// Object decodes a body, strictly: unknown fields and wrong types are errors.
func Object(kind string, body map[string]any) (proto.Message, error) {
	m, err := message(kind)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	if err := protojson.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("decode %s: %w", kind, err)
	}
	return m, nil
}

// Request makes the request of a row.
func (r Row) Request() (proto.Message, error) {
	o, err := Object(r.Kind, r.Body)
	if err != nil {
		return nil, err
	}
	if r.Op == "delete" {
		return deletion(r.Kind, o.(interface{ GetName() string }).GetName())
	}
	req, err := request(r.Op, r.Kind)
	if err != nil {
		return nil, err
	}
	fields := req.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.Message() != nil && f.Message() == o.ProtoReflect().Descriptor():
			req.ProtoReflect().Set(f, valueOf(o))
		case f.Name() == "update_mask" && len(r.Mask) > 0:
			req.ProtoReflect().Set(f, valueOf(&fieldmaskpb.FieldMask{Paths: r.Mask}))
		case f.Name() == "request_id":
			req.ProtoReflect().Set(f, stringValue(r.RequestID))
		}
	}
	return req, nil
}

// WantCode is the gRPC code of the refusal.
func (r Row) WantCode() (codes.Code, error) {
	var c codes.Code
	if err := c.UnmarshalJSON([]byte(strconv.Quote(r.Code))); err != nil {
		return 0, fmt.Errorf("row %q: %w", r.Name, err)
	}
	return c, nil
}

// Method is the full gRPC method of the row.
func (r Row) Method() string {
	service := map[string]string{
		"Tenant": "TenantService", "RoleBinding": "TenantService", "Cluster": "ClusterService", "Workload": "WorkloadService",
		"Service": "MeshService", "Route": "MeshService", "PolicyBundle": "PolicyService",
	}[r.Kind]
	return "/portolan.v1." + service + "/" + strings.ToUpper(r.Op[:1]) + r.Op[1:] + r.Kind
}
