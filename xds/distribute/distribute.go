// Package distribute is Portolan's one protocol over three hops: the incremental
// (delta) xDS protocol, served from an own cache behind go-control-plane's
// stream server and consumed by an own client. It knows nothing of what the
// resources mean. Same wire, same semantics at every hop: full state first,
// content versions, ACK, NACK that quarantines one resource, resume by known
// versions, nothing served before the server's own state is loaded.
//
// Concurrency: Cache, Server, Consumer and LastGood are safe for concurrent use.
package distribute

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/portolan-io/portolan/federation/api"
)

// Resource is one immutable, already marshalled resource. It is shared between
// all views that hold it.
type Resource struct {
	Type string // type URL
	Name string
	// Version is the hex of the first 16 bytes of SHA-256 over the deterministic
	// encoding of the body.
	Version string
	Body    *anypb.Any

	// wire is the message that every stream sends, made once.
	wire *discovery.Resource
}

// NewResource marshals m deterministically and hashes it.
func NewResource(typeURL, name string, m proto.Message) (*Resource, error) {
	if typeURL == "" || name == "" {
		return nil, api.E(api.Invalid, "make resource", "type URL and name must not be empty")
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, api.E(api.Invalid, "make resource "+name, "marshal: %w", err)
	}
	r := &Resource{Type: typeURL, Name: name, Version: versionOf(b), Body: &anypb.Any{TypeUrl: typeURL, Value: b}}
	r.wire = r.message()
	return r, nil
}

// VersionOf is the version that a resource with this content has.
func VersionOf(m proto.Message) (string, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return "", api.E(api.Invalid, "hash a resource", "marshal: %w", err)
	}
	return versionOf(b), nil
}

func versionOf(body []byte) string {
	sum := sha256.Sum256(body)
	return hex.EncodeToString(sum[:16])
}

// message is the form on the wire, shared by all streams; never changed.
func (r *Resource) message() *discovery.Resource {
	if r.wire != nil {
		return r.wire
	}
	return &discovery.Resource{Name: r.Name, Version: r.Version, Resource: r.Body}
}

func (r *Resource) size() int { return len(r.Name) + len(r.Version) + len(r.Body.GetValue()) + 64 }

// Nack is a rejection by a consumer.
type Nack struct {
	Type    string
	Name    string // empty when the consumer did not say which
	Version string // version that was refused
	Message string
	Time    time.Time
}

// Status is what is known of one view's subscriber.
type Status struct {
	Connected bool
	Since     time.Time // of the present state of Connected
	// Pending counts resources whose newest version was not acknowledged yet, over
	// all types.
	Pending int
	// Acked is the version of each resource that was acknowledged last.
	Acked map[Key]string
	// Nacks that still stand: cleared when a newer version is accepted.
	Nacks []Nack
}

// Key names a resource within a view.
type Key struct{ Type, Name string }

// Generation is the whole set of one consumer at a watermark.
type Generation struct {
	// Watermark resource that closed it; nil for generations loaded from a hop
	// without watermarks.
	Watermark *Resource
	// Resources by name, watermark excluded. Not to be changed.
	Resources map[string]*Resource
	// Names that were put or removed since the generation before. On the first
	// commit after Run began, everything is in Changed.
	Changed, Removed []string
}

// Dialer opens a connection to the server of a hop. The consumer closes it.
type Dialer func(ctx context.Context) (Conn, error)

// Conn is what a Dialer gives.
type Conn interface {
	grpc.ClientConnInterface
	Close() error
}
