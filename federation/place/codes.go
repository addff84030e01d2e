package place

// Codes of reasons, stable.
const (
	Chosen            = "chosen"              // replicas are placed here
	Kept              = "kept"                // they were here before
	Failover          = "failover"            // instead of a lost cluster; count says how many
	Overflow          = "overflow"            // in a later group, because earlier ones are full
	Displaces         = "displaces"           // takes the room of workloads of lower priority
	DisplacedBy       = "displaced"           // made room for a higher priority
	Lost              = "lost"                // silent; keeps what it had
	ObserverSuspect   = "observer-suspect"    // everything looks dead: nothing is changed
	Pending           = "pending"             // never joined
	Cordoned          = "cordoned"            // nothing new here
	Residency         = "residency"           // the tenant may not run in this region
	NotAllowed        = "region-not-allowed"  // not among the workload's regions
	Forbidden         = "region-forbidden"    // excluded by the workload
	ClusterNotAllowed = "cluster-not-allowed" // not among the workload's clusters
	ClusterForbidden  = "cluster-forbidden"   // excluded by the workload
	Selector          = "selector"            // a label is missing
	Taint             = "taint"               // a taint is not tolerated
	SoftTaint         = "soft-taint"          // avoided, not refused
	Staying           = "staying"             // tolerated for some time only
	NoGroup           = "no-fallback-group"   // in none of the ordered groups
	NoWeight          = "no-weight"           // no weight matches it
	Affinity          = "affinity"            // what it must be near is not here
	AntiAffinity      = "anti-affinity"       // what it must keep away from is here
	AffinityWish      = "affinity-wish"       // a wish about another workload is not met
	Device            = "no-device"           // has not the devices that are asked for
	Capacity          = "capacity"            // no room for one more
	OverCapacity      = "over-capacity"       // holds more than would fit now
	Spread            = "spread"              // one more would break the spread
	NotNeeded         = "not-needed"          // feasible, but others come first
	MinGroups         = "min-groups"          // fewer domains than the spread asks for
	Exclusive         = "exclusive"           // its one replica is elsewhere
	Leaving           = "leaving"             // must be known to have stopped before it may move
)
