package api

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Bounds of what a lower plane says, in each message of it.
const (
	MaxTextBytes = 2048
	MaxListItems = 128
)

// Bound cuts what somebody else says to the given bounds, in place: strings to a
// number of bytes, lists and maps to a number of entries, in all messages inside.
// It says whether anything was cut.
func Bound(m proto.Message, maxBytes, maxItems int) bool {
	return bound(m.ProtoReflect(), maxBytes, maxItems)
}

func bound(m protoreflect.Message, maxBytes, maxItems int) (cut bool) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			cut = boundMap(f, v.Map(), maxBytes, maxItems) || cut
		case f.IsList():
			cut = boundList(f, v.List(), maxBytes, maxItems) || cut
		case f.Message() != nil:
			cut = bound(v.Message(), maxBytes, maxItems) || cut
		case f.Kind() == protoreflect.StringKind && len(v.String()) > maxBytes:
			m.Set(f, protoreflect.ValueOfString(Clip(v.String(), maxBytes)))
			cut = true
		}
		return true
	})
	return cut
}

func boundList(f protoreflect.FieldDescriptor, l protoreflect.List, maxBytes, maxItems int) (cut bool) {
	if l.Len() > maxItems {
		l.Truncate(maxItems)
		cut = true
	}
	for i := range l.Len() {
		switch {
		case f.Message() != nil:
			cut = bound(l.Get(i).Message(), maxBytes, maxItems) || cut
		case f.Kind() == protoreflect.StringKind && len(l.Get(i).String()) > maxBytes:
			l.Set(i, protoreflect.ValueOfString(Clip(l.Get(i).String(), maxBytes)))
			cut = true
		}
	}
	return cut
}

// boundMap keeps the first keys in order, and none that is too long: another key
// would be another entry.
func boundMap(f protoreflect.FieldDescriptor, entries protoreflect.Map, maxBytes, maxItems int) (cut bool) {
	var keys []protoreflect.MapKey
	entries.Range(func(k protoreflect.MapKey, _ protoreflect.Value) bool {
		keys = append(keys, k)
		return true
	})
	slices.SortFunc(keys, func(a, b protoreflect.MapKey) int { return strings.Compare(a.String(), b.String()) })
	kept := 0
	for _, k := range keys {
		if kept == maxItems || f.MapKey().Kind() == protoreflect.StringKind && len(k.String()) > maxBytes {
			entries.Clear(k)
			cut = true
			continue
		}
		kept++
		v := entries.Get(k)
		switch value := f.MapValue(); {
		case value.Message() != nil:
			cut = bound(v.Message(), maxBytes, maxItems) || cut
		case value.Kind() == protoreflect.StringKind && len(v.String()) > maxBytes:
			entries.Set(k, protoreflect.ValueOfString(Clip(v.String(), maxBytes)))
			cut = true
		}
	}
	return cut
}

// Clip cuts a text to a number of bytes, whole characters, and marks the cut.
func Clip(s string, maxBytes int) string {
	if len(s) <= maxBytes {
		return s
	}
	return strings.ToValidUTF8(s[:maxBytes], "") + "…"
}
