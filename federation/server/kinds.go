package server

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/admit"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/store"
)

// object is what all public resources have in common: fields 1 to 8, 10 and 11
// of resources.proto.
type object interface {
	admit.Object
	GetUid() string
	GetGeneration() int64
	GetRevision() int64
	GetEtag() string
}

// Numbers of the fields that all objects have.
const (
	fieldUID        protoreflect.FieldNumber = 2
	fieldGeneration protoreflect.FieldNumber = 3
	fieldRevision   protoreflect.FieldNumber = 4
	fieldEtag       protoreflect.FieldNumber = 5
	fieldLabels     protoreflect.FieldNumber = 6
	fieldCreateTime protoreflect.FieldNumber = 7
	fieldUpdateTime protoreflect.FieldNumber = 8
	fieldSpec       protoreflect.FieldNumber = 10
)

// kindInfo is what the engine needs of a kind of resource.
type kindInfo struct {
	kind store.Kind
	// title in sentences.
	title    string
	patterns []string
	// fleetWide objects belong to no tenant and may be read by every role, with
	// operators' figures left out for tenants.
	fleetWide bool
	// underWorkload: the parent is a workload.
	underWorkload bool
	// admitted by Rego. Role bindings and bundles are not, so that a bad bundle can
	// always be taken back.
	admitted bool
}

func kindTable() map[store.Kind]*kindInfo {
	list := []*kindInfo{
		{kind: store.Tenant, title: "tenant", patterns: []string{api.TenantPattern}, admitted: true},
		{kind: store.Cluster, title: "cluster", patterns: []string{api.ClusterPattern}, fleetWide: true, admitted: true},
		{kind: store.RoleBinding, title: "role binding", patterns: []string{api.RoleBindingPattern}},
		{kind: store.Workload, title: "workload", patterns: []string{api.WorkloadPattern}, admitted: true},
		{kind: store.Revision, title: "revision", patterns: []string{api.RevisionPattern}, underWorkload: true},
		{kind: store.Placement, title: "placement", patterns: []string{api.PlacementPattern}, underWorkload: true},
		{kind: store.Service, title: "service", patterns: []string{api.ServicePattern}, admitted: true},
		{kind: store.Route, title: "route", patterns: []string{api.RoutePattern}, admitted: true},
		{kind: store.PolicyBundle, title: "policy bundle", patterns: []string{api.FleetPolicyPattern, api.TenantPolicyPattern}},
	}
	m := make(map[store.Kind]*kindInfo, len(list))
	for _, k := range list {
		m[k.kind] = k
	}
	return m
}

// checkName parses a name of the kind.
func (k *kindInfo) checkName(doing, field, name string) error {
	if _, err := api.ParseName(name, k.patterns...); err != nil {
		return api.InvalidFields(doing, []api.Violation{{Field: field, Message: err.Error()}})
	}
	return nil
}

// absent is the one answer to what does not exist and to what is not the caller's.
func (k *kindInfo) absent(doing string) error {
	return api.E(api.NotFound, doing, "no such %s", k.title)
}

// get reads an object; nil without error when it is absent.
func (k *kindInfo) get(r store.Reader, name string) (object, error) {
	rec, err := r.Get(k.kind, name)
	switch {
	case err == nil:
	case api.KindOf(err) == api.NotFound:
		return nil, nil
	default:
		return nil, err
	}
	o, ok := rec.Message.(object)
	if !ok {
		return nil, api.E(api.Internal, "read "+name, "record holds a %T", rec.Message)
	}
	return o, nil
}

func fieldOf(o proto.Message, n protoreflect.FieldNumber) protoreflect.FieldDescriptor {
	return o.ProtoReflect().Descriptor().Fields().ByNumber(n)
}

// specOf gives the spec; nil when it is unset.
func specOf(o proto.Message) proto.Message {
	f := fieldOf(o, fieldSpec)
	if f == nil || !o.ProtoReflect().Has(f) {
		return nil
	}
	return o.ProtoReflect().Get(f).Message().Interface()
}

// setPart sets a message field, or clears it with nil.
func setPart(o proto.Message, n protoreflect.FieldNumber, m proto.Message) {
	f := fieldOf(o, n)
	switch {
	case f == nil:
	case m == nil:
		o.ProtoReflect().Clear(f)
	default:
		o.ProtoReflect().Set(f, protoreflect.ValueOfMessage(m.ProtoReflect()))
	}
}

func setValue(o proto.Message, n protoreflect.FieldNumber, v any) {
	o.ProtoReflect().Set(fieldOf(o, n), protoreflect.ValueOf(v))
}

func setTime(o proto.Message, n protoreflect.FieldNumber, t time.Time) {
	setPart(o, n, timestamppb.New(t))
}

// setLabels replaces the labels.
func setLabels(o, from object) {
	f := fieldOf(o, fieldLabels)
	o.ProtoReflect().Clear(f)
	if len(from.GetLabels()) > 0 {
		m := o.ProtoReflect().Mutable(f).Map()
		for k, v := range from.GetLabels() {
			m.Set(protoreflect.ValueOf(k).MapKey(), protoreflect.ValueOf(v))
		}
	}
}

// etagOf is the hex SHA-256 of spec and labels, so that status never changes it.
func etagOf(o object) string {
	bare := o.ProtoReflect().New().Interface()
	if spec := specOf(o); spec != nil {
		setPart(bare, fieldSpec, spec)
	}
	if b, ok := bare.(object); ok {
		setLabels(b, o)
	}
	return hashOf(bare)
}

// hashOf is the hex SHA-256 of the deterministic encoding.
func hashOf(m proto.Message) string {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return "unencodable"
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// lastID is the last segment of a name.
func lastID(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

// newLike makes an empty object of the same type.
func newLike(o object) object {
	n, ok := o.ProtoReflect().New().Interface().(object)
	if !ok {
		return o
	}
	return n
}

func cloneObject(o object) object {
	c, ok := proto.Clone(o).(object)
	if !ok {
		return o
	}
	return c
}
