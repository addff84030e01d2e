package cli

import (
	"context"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/portolan-io/portolan/federation/cli/manifest"
)

// objects calls the standard methods of any kind: their messages have the same
// fields, so one piece of code serves all.
type objects struct {
	cc grpc.ClientConnInterface
	// plans are tokens by workload, which its change must match.
	plans map[string]string
}

func message(name string) (protoreflect.Message, error) {
	t, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName("portolan.v1." + name))
	if err != nil {
		return nil, err
	}
	return t.New(), nil
}

func set(m protoreflect.Message, field string, v any) {
	m.Set(m.Descriptor().Fields().ByName(protoreflect.Name(field)), protoreflect.ValueOf(v))
}

func text(m proto.Message, field string) string {
	r := m.ProtoReflect()
	fd := r.Descriptor().Fields().ByName(protoreflect.Name(field))
	if fd == nil {
		return ""
	}
	return r.Get(fd).String()
}

func number(m proto.Message, field string) int64 {
	r := m.ProtoReflect()
	fd := r.Descriptor().Fields().ByName(protoreflect.Name(field))
	if fd == nil {
		return 0
	}
	return r.Get(fd).Int()
}

// field of the object in a request: "workload", "policy_bundle".
func field(k manifest.Kind, req protoreflect.Message) string {
	fields := req.Descriptor().Fields()
	for i := range fields.Len() {
		if f := fields.Get(i); f.Kind() == protoreflect.MessageKind && string(f.Message().Name()) == k.Name {
			return string(f.Name())
		}
	}
	return ""
}

func (o objects) call(ctx context.Context, k manifest.Kind, verb string, req protoreflect.Message, out proto.Message) error {
	return o.cc.Invoke(ctx, "/portolan.v1."+k.Service+"/"+verb, req.Interface(), out)
}

func (o objects) get(ctx context.Context, k manifest.Kind, name string) (proto.Message, error) {
	req, err := message("Get" + k.Name + "Request")
	if err != nil {
		return nil, err
	}
	set(req, "name", name)
	out := k.New()
	return out, o.call(ctx, k, "Get"+k.Name, req, out)
}

// list gives all pages.
func (o objects) list(ctx context.Context, k manifest.Kind, parent string, selector map[string]string) ([]proto.Message, error) {
	var all []proto.Message
	for token := ""; ; {
		req, err := message("List" + k.Plural + "Request")
		if err != nil {
			return nil, err
		}
		if req.Descriptor().Fields().ByName("parent") != nil {
			set(req, "parent", parent)
		}
		set(req, "page_size", int32(500))
		set(req, "page_token", token)
		sel := req.Mutable(req.Descriptor().Fields().ByName("label_selector")).Map()
		for key, v := range selector {
			sel.Set(protoreflect.ValueOf(key).MapKey(), protoreflect.ValueOf(v))
		}
		resp, err := message("List" + k.Plural + "Response")
		if err != nil {
			return nil, err
		}
		if err := o.call(ctx, k, "List"+k.Plural, req, resp.Interface()); err != nil {
			return nil, err
		}
		fields := resp.Descriptor().Fields()
		for i := range fields.Len() {
			if !fields.Get(i).IsList() {
				continue
			}
			l := resp.Get(fields.Get(i)).List()
			for j := range l.Len() {
				all = append(all, l.Get(j).Message().Interface())
			}
		}
		token = text(resp.Interface(), "next_page_token")
		if token == "" {
			return all, nil
		}
	}
}

// put creates or updates. The request ID makes a retry harmless.
func (o objects) put(ctx context.Context, obj manifest.Object, validateOnly bool) (proto.Message, error) {
	req, err := message("Update" + obj.Kind.Name + "Request")
	if err != nil {
		return nil, err
	}
	set(req, field(obj.Kind, req), obj.Message.ProtoReflect())
	set(req, "allow_missing", true)
	set(req, "validate_only", validateOnly)
	if !validateOnly {
		set(req, "request_id", uuid.NewString())
	}
	if p := o.plans[obj.Name()]; p != "" {
		set(req, "plan_token", p)
	}
	out := obj.Kind.New()
	return out, o.call(ctx, obj.Kind, "Update"+obj.Kind.Name, req, out)
}

func (o objects) remove(ctx context.Context, k manifest.Kind, name string, missingOK bool) error {
	req, err := message("Delete" + k.Name + "Request")
	if err != nil {
		return err
	}
	set(req, "name", name)
	set(req, "allow_missing", missingOK)
	set(req, "request_id", uuid.NewString())
	out, err := protoregistry.GlobalTypes.FindMessageByName("google.protobuf.Empty")
	if err != nil {
		return err
	}
	return o.call(ctx, k, "Delete"+k.Name, req, out.New().Interface())
}
