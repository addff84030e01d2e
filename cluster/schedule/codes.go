package schedule

import (
	"math/bits"
	"strings"
)

var codeNames = [...]string{
	"NodeLost", "NodeNotReady", "NodeDraining", "NodeCordoned", "OtherNode", "SelectorMismatch", "AffinityMismatch", "TaintNotTolerated",
	"CapacityTypeMismatch", "NoTopologyLabel", "DeviceModelMismatch", "InsufficientCPU", "InsufficientMemory", "InsufficientStorage",
	"InsufficientDevices", "NoFreeAddress", "PortTaken", "WorkloadAffinity", "WorkloadAntiAffinity", "SpreadSkew", "NoNode", "GangIncomplete",
	"Nominated",
}

// String is the stable reason code; of a set, all of them.
func (c Code) String() string {
	var names []string
	for c &= codesEnd - 1; c != 0; c &= c - 1 {
		names = append(names, codeNames[bits.TrailingZeros32(uint32(c))])
	}
	return strings.Join(names, ",")
}

// first gives the code under which a node counts.
func (c Code) first() Code { return c & -c }

func (c Code) index() int { return bits.TrailingZeros32(uint32(c)) }
