package distribute

import (
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
)

// Rules are what a consumer's types demand of the order of sending. The zero
// value is right for the two upper hops; EnvoyRules are for Envoy.
type Rules struct {
	// Order in which types are sent when several wait. Types that are not named
	// come after, by name.
	Order []string
	// PutAfter holds a type back until each of these types has nothing unsent or
	// unacknowledged on the stream, but no longer than MaxHold.
	PutAfter map[string][]string
	// RemoveAfter holds removals of a type back until each of these types has
	// nothing unsent, unacknowledged or refused on the stream. Without bound: what
	// is refused may still refer to what would go.
	RemoveAfter map[string][]string
	// MaxHold bounds PutAfter; 0 means 5 s.
	MaxHold time.Duration
	// Unknown gives the answer to a name that a consumer asks for and the loaded
	// set does not hold; nil leaves it unanswered.
	Unknown func(typeURL, name string) *Resource
	// Resend names resources that the consumer forgets when it takes typeURL/name,
	// and that are therefore sent again.
	Resend func(typeURL, name string) []Key
	// ByReference names types that a consumer asks for only when something else
	// refers to them: unasked for, they are not pending.
	ByReference []string
}

// EnvoyRules is make-before-break between clusters, endpoints, listeners and
// routes; unknown endpoint sets are answered empty at once; an updated cluster
// gets its endpoints again, because Envoy would wait 15 s for them.
// It relies on endpoint sets bearing the name of their cluster.
func EnvoyRules() Rules {
	clusters := []string{resource.ClusterType, resource.EndpointType}
	users := []string{resource.ListenerType, resource.RouteType}
	return Rules{
		Order:       []string{resource.ClusterType, resource.EndpointType, resource.SecretType, resource.ListenerType, resource.RouteType},
		PutAfter:    map[string][]string{resource.ListenerType: clusters, resource.RouteType: clusters},
		RemoveAfter: map[string][]string{resource.ClusterType: users, resource.EndpointType: users},
		Unknown: func(typeURL, name string) *Resource {
			if typeURL != resource.EndpointType {
				return nil
			}
			r, err := NewResource(typeURL, name, &endpointv3.ClusterLoadAssignment{ClusterName: name})
			if err != nil {
				return nil
			}
			return r
		},
		Resend: func(typeURL, name string) []Key {
			if typeURL != resource.ClusterType {
				return nil
			}
			return []Key{{Type: resource.EndpointType, Name: name}}
		},
		ByReference: []string{resource.EndpointType, resource.RouteType, resource.SecretType},
	}
}

// Type URLs of Envoy's resources, for those who must not import
// go-control-plane's server.
const (
	ClusterType  = resource.ClusterType
	EndpointType = resource.EndpointType
	ListenerType = resource.ListenerType
	RouteType    = resource.RouteType
	SecretType   = resource.SecretType
)

// NodeOf is the node message of a consumer.
func NodeOf(id string) *corev3.Node { return &corev3.Node{Id: id} }
