package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/capacity"
)

// The calculators: verbs that need no fleet.

type nodeOptions struct {
	cpu, memory, reserveCPU, reserveMemory                 string
	requestCPU, requestMemory, overheadCPU, overheadMemory string
	busyOneIn                                              int64
}

func (a *app) capacityNodeCommand() *cobra.Command {
	var o nodeOptions
	c := &cobra.Command{
		Use: "node", Short: "How many replicas a node holds", Args: cobra.NoArgs,
		Long: `Calculates the least over resources of floor(available ÷ request), where available
is the node's size without what is reserved for the system; and how many are safe,
with room for the overhead of each replica. Memory overhead is there all the time;
CPU overhead (starts, checks, bursts of the proxy) is taken to come to one replica in
six at a time, or as --busy-one-in says.

Memory is counted in powers of two: 32GB is 32Gi.`,
		Example: `  portolan capacity node --cpu 8 --memory 32GB --reserve-cpu 1 --reserve-memory 4GB --request-cpu 100m --request-memory 256MB --overhead-cpu 0.1 --overhead-memory 50MB
  portolan capacity node --cpu 64 --memory 256Gi --request-cpu 2 --request-memory 8Gi -o json`,
		RunE: func(*cobra.Command, []string) error {
			if err := a.checkPlainOutput(); err != nil {
				return err
			}
			return a.calculateNode(o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.cpu, "cpu", "", "cores of the node")
	f.StringVar(&o.memory, "memory", "", "memory of the node")
	f.StringVar(&o.reserveCPU, "reserve-cpu", "", "cores reserved for the system")
	f.StringVar(&o.reserveMemory, "reserve-memory", "", "memory reserved for the system")
	f.StringVar(&o.requestCPU, "request-cpu", "", "what a replica requests")
	f.StringVar(&o.requestMemory, "request-memory", "", "what a replica requests")
	f.StringVar(&o.overheadCPU, "overhead-cpu", "50m", "what a replica takes beside")
	f.StringVar(&o.overheadMemory, "overhead-memory", "50Mi", "what a replica takes beside")
	f.Int64Var(&o.busyOneIn, "busy-one-in", capacity.DefaultBusyOneIn, "one replica in so many has its CPU overhead at one time; 1 is all of them")
	a.plainOutputFlag(c)
	return c
}

func (a *app) calculateNode(o nodeOptions) error {
	n := capacity.Node{BusyOneIn: o.busyOneIn}
	for _, x := range []struct {
		into        *api.Resources
		cpu, memory string
	}{{&n.Size, o.cpu, o.memory}, {&n.Reserved, o.reserveCPU, o.reserveMemory}, {&n.Request, o.requestCPU, o.requestMemory}, {&n.Overhead, o.overheadCPU, o.overheadMemory}} {
		var err error
		if *x.into, err = amounts(x.cpu, x.memory); err != nil {
			return err
		}
	}
	f, err := n.Fit()
	if err != nil {
		return err
	}
	if a.output != "table" {
		return a.encode(map[string]any{"available": roomOf(f.Available), "by_cpu": f.ByCPU, "by_memory": f.ByMemory, "most": f.Most, "safe": f.Safe, "bound": f.Bound})
	}
	t := newTable("RESOURCE", "AVAILABLE", "REQUEST", "OVERHEAD", "FIT")
	t.add("cpu", coresText(f.Available.CPUMilli), coresText(n.Request.CPUMilli), coresText(n.Overhead.CPUMilli), countText(f.ByCPU))
	t.add("memory", bytesText(f.Available.MemoryBytes), bytesText(n.Request.MemoryBytes), bytesText(n.Overhead.MemoryBytes), countText(f.ByMemory))
	a.print(t)
	a.printf("\nmin(%s, %s) = %s replicas; %s are safe, with their overhead: %s ends first\n", countText(f.ByCPU), countText(f.ByMemory), countText(f.Most), countText(f.Safe), f.Bound)
	return nil
}

func countText(n int64) string {
	if n == capacity.Unbounded {
		return "any"
	}
	return fmt.Sprint(n)
}

func (a *app) capacityReplicasCommand() *cobra.Command {
	var current int64
	var used, target, rate, each float64
	c := &cobra.Command{
		Use: "replicas", Short: "How many replicas a load needs", Args: cobra.NoArgs,
		Long: `Calculates ceil(current × used ÷ target), as autoscaling does; or, from a rate of
requests, ceil(rate ÷ (what one replica serves × target)).`,
		Example: `  portolan capacity replicas --current 5 --used 80 --target 50
  portolan capacity replicas --rate 10000 --each 500 --target 60`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkPlainOutput(); err != nil {
				return err
			}
			var n int64
			var err error
			switch f := cmd.Flags(); {
			case f.Changed("rate"):
				n, err = capacity.ReplicasForRate(rate, each, target)
			case f.Changed("current"):
				n, err = capacity.Replicas(current, used, target)
			default:
				err = errAskNothing
			}
			if err != nil {
				return err
			}
			if a.output != "table" {
				return a.encode(map[string]any{"replicas": n})
			}
			a.printf("%d replicas\n", n)
			return nil
		},
	}
	f := c.Flags()
	f.Int64Var(&current, "current", 0, "replicas as of now")
	f.Float64Var(&used, "used", 0, "percent of their requests that they use")
	f.Float64Var(&target, "target", 80, "percent to which they should be used")
	f.Float64Var(&rate, "rate", 0, "requests per second, together")
	f.Float64Var(&each, "each", 0, "requests per second that one replica serves at most")
	c.MarkFlagsMutuallyExclusive("current", "rate")
	c.MarkFlagsRequiredTogether("rate", "each")
	c.MarkFlagsRequiredTogether("current", "used")
	a.plainOutputFlag(c)
	return c
}

func (a *app) capacityBandwidthCommand() *cobra.Command {
	var rate float64
	var size string
	c := &cobra.Command{
		Use: "bandwidth", Short: "What bandwidth requests take", Args: cobra.NoArgs,
		Long:    "Calculates rate × size, in powers of ten, as networks are: 20KB is 20,000 bytes.",
		Example: "  portolan capacity bandwidth --rate 10000 --size 20KB",
		RunE: func(*cobra.Command, []string) error {
			if err := a.checkPlainOutput(); err != nil {
				return err
			}
			bytes, err := api.ParseBytes(decimalSuffix(size))
			if err != nil {
				return err
			}
			b, err := capacity.BandwidthOf(rate, float64(bytes))
			if err != nil {
				return err
			}
			if a.output != "table" {
				return a.encode(map[string]any{"bytes_per_second": b.BytesPerSecond, "bits_per_second": b.BitsPerSecond, "bytes_per_month": b.BytesPerMonth})
			}
			a.printf("%s = %s, %s a month\n", decimal(b.BytesPerSecond, "B/s"), decimal(b.BitsPerSecond, "bps"), decimal(b.BytesPerMonth, "B"))
			return nil
		},
	}
	c.Flags().Float64Var(&rate, "rate", 0, "requests per second")
	c.Flags().StringVar(&size, "size", "", "bytes of a request and its answer")
	_ = c.MarkFlagRequired("rate")
	_ = c.MarkFlagRequired("size")
	a.plainOutputFlag(c)
	return c
}

// decimal shows a number in powers of a thousand.
func decimal(v float64, unit string) string {
	prefix := ""
	for _, p := range []string{"k", "M", "G", "T", "P", "E"} {
		if v < 1000 {
			break
		}
		v, prefix = v/1000, p
	}
	return fmt.Sprintf("%.4g %s%s", v, prefix, unit)
}
