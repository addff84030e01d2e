package api

import (
	"errors"
	"fmt"
	"sort"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Kind is the closed set of error kinds. Every error that crosses a package
// border as a decision is one of them; all else is Internal.
type Kind int

// The kinds, each with its gRPC code in Code.
const (
	Internal     Kind = iota // a bug or a broken dependency; internals stay out of replies
	Invalid                  // the request can never succeed as it is
	NotFound                 // absent, or not the caller's
	Exists                   // already there
	Conflict                 // stale etag, older epoch: read again and retry
	Denied                   // the caller may not
	Unknown                  // who is the caller?
	Exhausted                // a limit or quota
	Precondition             // the present state does not allow it
	Unavailable              // a dependency is gone; retry with backoff
	Compacted                // resume point is too old: start with a snapshot
	Canceled                 // the caller gave up
	Timeout                  // the deadline passed
)

var kindCodes = map[Kind]codes.Code{
	Internal: codes.Internal, Invalid: codes.InvalidArgument, NotFound: codes.NotFound, Exists: codes.AlreadyExists,
	Conflict: codes.Aborted, Denied: codes.PermissionDenied, Unknown: codes.Unauthenticated, Exhausted: codes.ResourceExhausted,
	Precondition: codes.FailedPrecondition, Unavailable: codes.Unavailable, Compacted: codes.OutOfRange,
	Canceled: codes.Canceled, Timeout: codes.DeadlineExceeded,
}

// Code is the gRPC code of the kind.
func (k Kind) Code() codes.Code { return kindCodes[k] }

// Violation is one fault of a request.
type Violation struct {
	// Field is the path in the request's object, "spec.containers[0].image".
	Field string
	// Message says what is wrong and the way out.
	Message string
	// Rule, File and Line say which policy rule refused, when one did.
	Rule, File string
	Line       int
}

func (v Violation) String() string {
	s := v.Message
	if v.Field != "" {
		s = v.Field + ": " + s
	}
	if v.Rule != "" {
		s += fmt.Sprintf(" (rule %s, %s:%d)", v.Rule, v.File, v.Line)
	}
	return s
}

// Error is the one error type that decisions use. Doing says what was being
// done to what, in lower case: "update tenants/a/workloads/b".
type Error struct {
	Kind       Kind
	Doing      string
	Message    string
	Violations []Violation
	Err        error
}

// E makes an error of a kind.
func E(kind Kind, doing, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: kind, Doing: doing, Message: err.Error(), Err: errors.Unwrap(err)}
}

// InvalidFields makes an Invalid error out of violations; nil when there are none.
func InvalidFields(doing string, vs []Violation) error {
	if len(vs) == 0 {
		return nil
	}
	sorted := append([]Violation(nil), vs...)
	sort.SliceStable(sorted, func(i, j int) bool { return sorted[i].Field < sorted[j].Field })
	return &Error{Kind: Invalid, Doing: doing, Violations: sorted}
}

func (e *Error) Error() string {
	parts := make([]string, 0, 3)
	if e.Doing != "" {
		parts = append(parts, e.Doing)
	}
	if e.Message != "" {
		parts = append(parts, e.Message)
	}
	for _, v := range e.Violations {
		parts = append(parts, v.String())
	}
	return strings.Join(parts, ": ")
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// KindOf gives the kind of an error, also of one that came over gRPC.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	if s, ok := status.FromError(err); ok && err != nil {
		for k, c := range kindCodes {
			if c == s.Code() {
				return k
			}
		}
	}
	return Internal
}

// GRPCStatus lets grpc-go send the error: code, sentence, and field violations
// as google.rpc.BadRequest. Causes stay here.
func (e *Error) GRPCStatus() *status.Status {
	s := status.New(e.Kind.Code(), e.Error())
	if len(e.Violations) == 0 {
		return s
	}
	bad := &errdetails.BadRequest{}
	for _, v := range e.Violations {
		f := &errdetails.BadRequest_FieldViolation{Field: v.Field, Description: Violation{Message: v.Message, Rule: v.Rule, File: v.File, Line: v.Line}.String()}
		if v.Rule != "" {
			f.Reason = "POLICY"
		}
		bad.FieldViolations = append(bad.FieldViolations, f)
	}
	if d, err := s.WithDetails(bad); err == nil {
		return d
	}
	return s
}
