//go:build invariants

package state

import "fmt"

// checkChange panics on a change that breaks what every reader relies on: an
// allocation keeps its node, workload and address, and its epoch and its end never go
// back.
func (x *Index) checkChange(c Change) {
	for _, a := range c.PutAllocations {
		was := x.now.Allocations[a.GetAllocation()]
		switch {
		case a.GetAllocation() == "" || a.GetNode() == "":
			panic(fmt.Sprintf("allocation %v has no name or node", a))
		case was == nil:
		case was.GetNode() != a.GetNode() || was.GetAddress() != a.GetAddress() || was.GetTenant() != a.GetTenant() || was.GetWorkload() != a.GetWorkload():
			panic(fmt.Sprintf("allocation %s moved from %v to %v", a.GetAllocation(), was, a))
		case a.GetEpoch() < was.GetEpoch():
			panic(fmt.Sprintf("allocation %s went back from epoch %d to %d", a.GetAllocation(), was.GetEpoch(), a.GetEpoch()))
		case was.GetStop() && !a.GetStop() || was.GetFinal() != nil && a.GetFinal() == nil:
			panic(fmt.Sprintf("allocation %s came back from its end", a.GetAllocation()))
		}
	}
}
