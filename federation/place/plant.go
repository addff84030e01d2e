package place

// plant switches known mistakes on. Tests do, to show that they notice; nothing
// else may write it.
var plant struct {
	keepsUnderNoExecute bool // a taint of NO_EXECUTE only closes
	ignoresSkew         bool // one more than the skew allows
	surgeForgotten      bool // claims leave the surge of an update out
	displacesEquals     bool // takes from the same priority
	failsOverEarly      bool // does not wait until failover is due
	exclusiveHurries    bool // moves before the old cluster has stopped
	returnsNever        bool // overflow does not go back
	forgetsPrevious     bool // places as if nothing had been there
	searchesNever       bool // the greedy way alone
	overridesUncounted  bool // claims what the template requests
}
