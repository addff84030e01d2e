package badspec

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// request makes an empty request by its name.
func request(op, kind string) (proto.Message, error) {
	prefix := map[string]string{"create": "Create", "update": "Update", "delete": "Delete"}[op]
	t, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName("portolan.v1." + prefix + kind + "Request"))
	if err != nil {
		return nil, fmt.Errorf("%s of %s: %w", op, kind, err)
	}
	return t.New().Interface(), nil
}

func deletion(kind, name string) (proto.Message, error) {
	req, err := request("delete", kind)
	if err != nil {
		return nil, err
	}
	req.ProtoReflect().Set(req.ProtoReflect().Descriptor().Fields().ByName("name"), stringValue(name))
	return req, nil
}

func valueOf(m proto.Message) protoreflect.Value {
	return protoreflect.ValueOfMessage(m.ProtoReflect())
}

func stringValue(s string) protoreflect.Value { return protoreflect.ValueOfString(s) }
