package reconcile

// faults are bugs that tests plant, to see that the properties catch them. Always
// zero outside of tests.
type faults struct {
	surgeOffByOne     bool // one replica more than surge allows
	spareOffByOne     bool // one ready replica too many is taken by an update
	budgetIgnored     bool // disruptions know no budget
	windowIgnored     bool // budgets hold, but their windows do not
	rateIgnored       bool // the hour of a budget is not looked back on
	replacementLast   bool // a drain does not wait for the replacement
	orderSwapped      bool // stateful replicas start from the highest
	volumeDoubled     bool // a replica with a volume is replaced when its node is lost
	volumeDropped     bool // volumes go with the replica and not with the workload
	zoneIgnored       bool // dark zones are evicted like any other
	evictionUnlimited bool // the rate of evictions has no bound
	forbidIgnored     bool // a cron run begins beside another one
	missedRun         bool // a cron run begins after its starting deadline
	retriesOffByOne   bool // one retry more than allowed
	parallelIgnored   bool // a job runs all at once
	lostIgnored       bool // an exclusive replica is replaced while cut off
	failingIgnored    bool // an update goes on whatever fails
	movesUnlimited    bool // the rebalancer has no budget
}

// off gives one more where a fault says so.
func off(by bool) int {
	if by {
		return 1
	}
	return 0
}
