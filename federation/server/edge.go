package server

import (
	"errors"
	"fmt"
	"strings"

	"buf.build/go/protovalidate"
	"github.com/google/uuid"
	"go.einride.tech/aip/fieldmask"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// edge checks a request before anything is read: its own fields, its names, its
// mask, and that nothing in it is unknown to this version.
func (s *Server) edge(ch *change) error {
	if err := ch.k.checkName(ch.doing, "name", ch.name); err != nil {
		return err
	}
	var vs []api.Violation
	if id := ch.requestID; id != "" {
		if _, err := uuid.Parse(id); err != nil || len(id) != 36 {
			vs = append(vs, api.Violation{Field: "request_id", Message: "is no UUID"})
		}
	}
	if ch.object != nil {
		vs = append(vs, maskFaults(ch.mask, ch.object)...)
		if p := unknownIn(ch.object.ProtoReflect(), ""); p != nil {
			vs = append(vs, api.Violation{Field: *p, Message: "holds a field that this version does not know"})
		}
		if n := proto.Size(ch.object); n > api.MaxObjectBytes {
			vs = append(vs, api.Violation{Message: fmt.Sprintf("the object has %d bytes; at most %d are stored", n, api.MaxObjectBytes)})
			return api.InvalidFields(ch.doing, vs)
		}
		if len(ch.mask.GetPaths()) == 0 {
			vs = append(vs, s.constraints(ch.object)...)
		}
	}
	return api.InvalidFields(ch.doing, vs)
}

// constraints maps the protos' own rules to violations.
func (s *Server) constraints(m proto.Message) []api.Violation {
	err := s.validator.Validate(m)
	if err == nil {
		return nil
	}
	var ve *protovalidate.ValidationError
	if !errors.As(err, &ve) {
		return []api.Violation{{Message: "cannot be checked: " + err.Error()}}
	}
	var out []api.Violation
	for _, v := range ve.Violations {
		msg := v.Proto.GetMessage()
		if msg == "" {
			msg = "breaks the rule " + v.Proto.GetRuleId()
		}
		out = append(out, api.Violation{Field: protovalidate.FieldPathString(v.Proto.GetField()), Message: msg})
	}
	return out
}

// checkRequest runs the protos' rules on a request that is no change of an object.
func (s *Server) checkRequest(doing string, req proto.Message) error {
	return api.InvalidFields(doing, s.constraints(req))
}

// maskFaults refuses paths that do not exist, that are not the user's, or that
// lead into lists and maps, where they would do nothing.
func maskFaults(mask *fieldmaskpb.FieldMask, o object) []api.Violation {
	var out []api.Violation
	for i, p := range mask.GetPaths() {
		field := fmt.Sprintf("update_mask.paths[%d]", i)
		if p == "*" && len(mask.GetPaths()) == 1 {
			continue
		}
		if err := fieldmask.Validate(&fieldmaskpb.FieldMask{Paths: []string{p}}, o); err != nil || p == "*" || !reaches(p, o) {
			out = append(out, api.Violation{Field: field, Message: fmt.Sprintf("%q is no field of this object that can be updated alone", clip(p))})
			continue
		}
		if head, _, _ := strings.Cut(p, "."); head != "spec" && head != "labels" {
			out = append(out, api.Violation{Field: field, Message: fmt.Sprintf("%q is not yours to update: paths begin with spec or labels", clip(p))})
		}
	}
	return out
}

// reaches says whether every segment but the last names a single message.
func reaches(p string, o object) bool {
	md := o.ProtoReflect().Descriptor()
	segs := strings.Split(p, ".")
	for i, seg := range segs {
		f := md.Fields().ByName(protoreflect.Name(seg))
		if f == nil {
			return false
		}
		if i == len(segs)-1 {
			return true
		}
		if f.IsList() || f.IsMap() || f.Message() == nil {
			return false
		}
		md = f.Message()
	}
	return false
}

func applyMask(mask *fieldmaskpb.FieldMask, dst, src object) {
	fieldmask.Update(mask, dst, src)
}

// unknownIn finds the first message with fields that this version does not know,
// as a path; nil when there is none.
func unknownIn(m protoreflect.Message, path string) *string {
	if len(m.GetUnknown()) > 0 {
		return &path
	}
	var found *string
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		p := string(f.Name())
		if path != "" {
			p = path + "." + p
		}
		switch {
		case f.IsMap() && f.MapValue().Message() != nil:
			v.Map().Range(func(k protoreflect.MapKey, mv protoreflect.Value) bool {
				found = unknownIn(mv.Message(), fmt.Sprintf("%s[%q]", p, k.String()))
				return found == nil
			})
		case f.IsList() && f.Message() != nil:
			for i := 0; i < v.List().Len() && found == nil; i++ {
				found = unknownIn(v.List().Get(i).Message(), fmt.Sprintf("%s[%d]", p, i))
			}
		case !f.IsMap() && !f.IsList() && f.Message() != nil:
			found = unknownIn(v.Message(), p)
		}
		return found == nil
	})
	return found
}

// clearOutputs takes out of a spec what only the server writes.
func clearOutputs(o object) {
	if w, ok := o.(*portolanv1.Workload); ok {
		for _, c := range allContainers(w.GetSpec()) {
			c.ResolvedImage = ""
		}
	}
}
