//go:build invariants

package manager

import (
	"fmt"
	"net/netip"
)

// check panics on a decision that gives an address twice on a node, or one
// outside the node's range.
func (d *decider) check() {
	type place struct{ node, address string }
	used := map[place]string{}
	for id, a := range d.s.Allocations {
		if !isGateway(a.GetSpec()) && !clearedAway(d.s, a) {
			used[place{a.GetNode(), a.GetAddress()}] = id
		}
	}
	for id, a := range d.put {
		if isGateway(a.GetSpec()) || clearedAway(d.s, a) {
			continue
		}
		if other, ok := used[place{a.GetNode(), a.GetAddress()}]; ok && other != id {
			panic(fmt.Sprintf("%s and %s have address %s of node %s", id, other, a.GetAddress(), a.GetNode()))
		}
		used[place{a.GetNode(), a.GetAddress()}] = id
		if p := netip.MustParsePrefix(d.s.Nodes[a.GetNode()].GetReplicaCidr()); !p.Contains(netip.MustParseAddr(a.GetAddress())) {
			panic(fmt.Sprintf("%s has address %s, outside %s", id, a.GetAddress(), p))
		}
	}
}
