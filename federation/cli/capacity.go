package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/capacity"
)

type capacityOptions struct {
	cluster                     string
	cpu, memory                 string
	overheadCPU, overheadMemory string
}

func (a *app) capacityCommand() *cobra.Command {
	var o capacityOptions
	c := &cobra.Command{
		Use: "capacity", Short: "What the fleet holds, what is reserved and free, and how many more replicas fit", GroupID: "fleet", Args: cobra.NoArgs,
		Long: `Shows each cluster and its pools: what ready nodes can be promised, what placements
reserve, and what is free. With --cpu and --memory also how many more replicas of
that size fit, counted node by node; "up to" where a cluster does not answer, and
only its sum is known.

The verbs below it calculate, without a fleet.`,
		Example: `  portolan capacity
  portolan capacity --cluster eu-west --cpu 500m --memory 512Mi
  portolan capacity -o json
  portolan capacity node --cpu 8 --memory 32GB --request-cpu 100m --request-memory 256MB
  portolan capacity replicas --current 5 --used 80 --target 50
  portolan capacity bandwidth --rate 10000 --size 20KB`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkPlainOutput(); err != nil {
				return err
			}
			return a.fleetCapacity(cmd.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.cluster, "cluster", "", "only this cluster")
	f.StringVar(&o.cpu, "cpu", "", "what a replica requests of CPU (\"250m\")")
	f.StringVar(&o.memory, "memory", "", "what a replica requests of memory (\"256Mi\")")
	f.StringVar(&o.overheadCPU, "overhead-cpu", "50m", "what its proxy takes beside")
	f.StringVar(&o.overheadMemory, "overhead-memory", "50Mi", "what its proxy takes beside")
	a.plainOutputFlag(c)
	c.AddCommand(a.capacityNodeCommand(), a.capacityReplicasCommand(), a.capacityBandwidthCommand())
	return c
}

// plainOutputs are those of verbs whose answers are no objects.
const plainOutputs = "table|json|yaml"

func (a *app) plainOutputFlag(c *cobra.Command) {
	c.Flags().StringVarP(&a.output, "output", "o", "table", "how to print: "+plainOutputs)
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(strings.Split(plainOutputs, "|"), cobra.ShellCompDirectiveNoFileComp))
}

func (a *app) checkPlainOutput() error {
	if !slices.Contains(strings.Split(plainOutputs, "|"), a.output) {
		return fmt.Errorf("unknown output %q; use %s", a.output, plainOutputs)
	}
	return nil
}

// room is an amount as it is shown.
type room struct {
	CPUMilli    int64 `json:"cpu_milli"`
	MemoryBytes int64 `json:"memory_bytes"`
}

func roomOf(r api.Resources) room { return room(r) }

// clusterRoom is a cluster as it is shown.
type clusterRoom struct {
	Cluster  string     `json:"cluster"`
	Region   string     `json:"region"`
	State    string     `json:"state"`
	Nodes    int32      `json:"nodes"`
	Ready    int32      `json:"nodes_ready"`
	Capacity room       `json:"capacity"`
	Reserved room       `json:"reserved"`
	Free     room       `json:"free"`
	Fits     *fits      `json:"fits,omitempty"`
	Pools    []poolRoom `json:"pools,omitempty"`
}

type poolRoom struct {
	Pool     string           `json:"pool"`
	Spot     bool             `json:"spot,omitempty"`
	Nodes    int32            `json:"nodes"`
	Ready    int32            `json:"nodes_ready"`
	Capacity room             `json:"capacity"`
	Devices  map[string]int32 `json:"devices,omitempty"`
	Fits     *fits            `json:"fits,omitempty"`
	Wanted   int32            `json:"wanted_nodes,omitempty"`
	Why      string           `json:"wanted_reason,omitempty"`
	Unneeded []string         `json:"unneeded_nodes,omitempty"`
	Costs    int64            `json:"wanted_hour_micros,omitempty"`
}

// fits is how many replicas fit; exact when it was counted node by node.
type fits struct {
	Replicas int64 `json:"replicas"`
	Exact    bool  `json:"exact"`
}

func (f *fits) String() string {
	switch {
	case f == nil:
		return "-"
	case f.Exact:
		return fmt.Sprint(f.Replicas)
	}
	return fmt.Sprintf("up to %d", f.Replicas)
}

func (a *app) fleetCapacity(ctx context.Context, o capacityOptions) error {
	var want, overhead api.Resources
	var err error
	if want, err = amounts(o.cpu, o.memory); err != nil {
		return err
	}
	if overhead, err = amounts(o.overheadCPU, o.overheadMemory); err != nil {
		return err
	}
	cc, err := a.dial()
	if err != nil {
		return err
	}
	cs, err := a.capacities(ctx, cc, o.cluster)
	if err != nil {
		return err
	}
	out := make([]clusterRoom, len(cs))
	for i, c := range cs {
		out[i] = clusterRoomOf(c)
		if want != (api.Resources{}) {
			if err := a.countFits(ctx, cc, c, &out[i], want, overhead); err != nil {
				return err
			}
		}
	}
	if a.output != "table" {
		return a.encode(map[string]any{"clusters": out})
	}
	a.showCapacity(out, want != (api.Resources{}))
	return nil
}

func (a *app) capacities(ctx context.Context, cc grpc.ClientConnInterface, cluster string) ([]*portolanv1.ClusterCapacity, error) {
	req := &portolanv1.GetCapacityRequest{}
	if cluster != "" {
		req.Cluster = api.ClusterName(last(cluster))
	}
	r, err := portolanv1.NewClusterServiceClient(cc).GetCapacity(ctx, req)
	return r.GetClusters(), err
}

func clusterRoomOf(c *portolanv1.ClusterCapacity) clusterRoom {
	out := clusterRoom{
		Cluster: last(c.GetCluster()), Region: c.GetRegion(), State: word(c.GetState().String(), "CLUSTER_STATE_"),
		Capacity: room{c.GetCpuMilli(), c.GetMemoryBytes()}, Reserved: room{c.GetReservedCpuMilli(), c.GetReservedMemoryBytes()},
	}
	out.Free = room{max(0, out.Capacity.CPUMilli-out.Reserved.CPUMilli), max(0, out.Capacity.MemoryBytes-out.Reserved.MemoryBytes)}
	for _, p := range c.GetPools() {
		out.Nodes += p.GetNodes()
		out.Ready += p.GetNodesReady()
		out.Pools = append(out.Pools, poolRoom{
			Pool: p.GetPool(), Spot: p.GetSpot(), Nodes: p.GetNodes(), Ready: p.GetNodesReady(), Capacity: room{p.GetCpuMilli(), p.GetMemoryBytes()},
			Devices: p.GetDevices(), Wanted: p.GetWantedNodes(), Why: p.GetWantedReason(), Unneeded: p.GetUnneededNodes(), Costs: p.GetWantedHourMicros(),
		})
	}
	return out
}

// countFits counts by nodes how many more replicas fit. The cluster as a whole also
// holds what placements reserve and does not run yet, so it may take fewer than its
// nodes have room for.
func (a *app) countFits(ctx context.Context, cc grpc.ClientConnInterface, c *portolanv1.ClusterCapacity, out *clusterRoom, want, overhead api.Resources) error {
	free := floorFit(api.Resources(out.Free), want)
	r, err := portolanv1.NewClusterServiceClient(cc).ListNodes(ctx, &portolanv1.ListNodesRequest{Cluster: c.GetCluster()})
	if err != nil && api.KindOf(err) == api.Unavailable {
		a.silent([]string{c.GetCluster()})
		out.Fits = &fits{Replicas: free}
		return nil
	}
	if err != nil {
		return err
	}
	byPool, all := map[string]int64{}, int64(0)
	for _, n := range r.GetNodes() {
		if n.GetReady() && n.GetMode() == portolanv1.NodeMode_NODE_MODE_UNSPECIFIED {
			fit := floorFit(freeOf(n), want.Add(overhead))
			byPool[poolName(n.GetPool())] += fit
			all += fit
		}
	}
	out.Fits = &fits{Replicas: min(all, free), Exact: true}
	for i := range out.Pools {
		out.Pools[i].Fits = &fits{Replicas: byPool[poolName(out.Pools[i].Pool)], Exact: true}
	}
	return nil
}

func poolName(p string) string {
	if p == "" {
		return "default"
	}
	return p
}

// freeOf is what a node can still be promised. One that says nothing of what is
// reserved can be promised all that it has.
func freeOf(n *portolanv1.NodeInfo) api.Resources {
	cpu, memory := n.GetAllocatableCpuMilli(), n.GetAllocatableMemoryBytes()
	if cpu == 0 && memory == 0 {
		cpu, memory = n.GetCpuMilli(), n.GetMemoryBytes()
	}
	return api.Resources{CPUMilli: max(0, cpu-n.GetAllocatedCpuMilli()), MemoryBytes: max(0, memory-n.GetAllocatedMemoryBytes())}
}

func floorFit(free, want api.Resources) int64 {
	f, err := capacity.Node{Size: free, Request: want}.Fit()
	if err != nil {
		return 0
	}
	return f.Most
}

func (a *app) showCapacity(cs []clusterRoom, fit bool) {
	if len(cs) == 0 {
		a.notef("no clusters\n")
		return
	}
	cols := []string{"CLUSTER", "REGION", "POOL", "NODES", "CPU", "FREE", "MEMORY", "FREE"}
	if fit {
		cols = append(cols, "FITS")
	}
	t := newTable(append(cols, "NOTE")...)
	row := func(cells []string, f *fits, note string) {
		if fit {
			cells = append(cells, f.String())
		}
		t.add(append(cells, note)...)
	}
	var wishes []string
	for _, c := range cs {
		note := c.State
		if note == "ready" {
			note = ""
		}
		row([]string{
			c.Cluster, c.Region, "all", fmt.Sprintf("%d/%d", c.Ready, c.Nodes), coresText(c.Reserved.CPUMilli) + "/" + coresText(c.Capacity.CPUMilli), coresText(c.Free.CPUMilli),
			bytesText(c.Reserved.MemoryBytes) + "/" + bytesText(c.Capacity.MemoryBytes), bytesText(c.Free.MemoryBytes),
		}, c.Fits, note)
		for _, p := range c.Pools {
			row([]string{"", "", poolName(p.Pool), fmt.Sprintf("%d/%d", p.Ready, p.Nodes), coresText(p.Capacity.CPUMilli), "", bytesText(p.Capacity.MemoryBytes), ""}, p.Fits, poolNote(p))
			if p.Wanted != 0 {
				wishes = append(wishes, c.Cluster+", "+wishText(p))
			}
		}
	}
	a.print(t)
	for i, w := range wishes {
		if i == 0 {
			a.printf("\nwanted:\n")
		}
		a.printf("  %s\n", w)
	}
}

// wishText says by how many nodes a pool should change, which should go, what that
// costs or saves an hour, and why.
func wishText(p poolRoom) string {
	unit := "nodes"
	if p.Wanted == 1 || p.Wanted == -1 {
		unit = "node"
	}
	text := fmt.Sprintf("pool %s: %+d %s", poolName(p.Pool), p.Wanted, unit)
	if len(p.Unneeded) > 0 {
		text += ": " + strings.Join(p.Unneeded, ", ")
	}
	switch {
	case p.Costs > 0:
		text += "; costs " + money(p.Costs) + "/h"
	case p.Costs < 0:
		text += "; saves " + money(-p.Costs) + "/h"
	}
	if p.Why != "" {
		text += "\n    " + p.Why
	}
	return text
}

func poolNote(p poolRoom) string {
	var notes []string
	if p.Spot {
		notes = append(notes, "spot")
	}
	for _, d := range sortedKeys(p.Devices) {
		notes = append(notes, fmt.Sprintf("%d %s", p.Devices[d], d))
	}
	return strings.Join(notes, ", ")
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// amounts reads what a person writes: memory also as "256MB", which is counted in
// powers of two, as memory is.
func amounts(cpu, memory string) (api.Resources, error) {
	c, err := api.ParseCPU(cpu)
	if err != nil {
		return api.Resources{}, err
	}
	m, err := api.ParseBytes(binarySuffix(memory))
	return api.Resources{CPUMilli: c, MemoryBytes: m}, err
}

// binarySuffix turns "GB" into "Gi".
func binarySuffix(s string) string {
	for _, unit := range []string{"K", "M", "G", "T", "P"} {
		if n, ok := strings.CutSuffix(s, unit+"B"); ok {
			return n + unit + "i"
		}
	}
	return s
}

// decimalSuffix turns "KB" into "k", as networks count.
func decimalSuffix(s string) string {
	if n, ok := strings.CutSuffix(s, "KB"); ok {
		return n + "k"
	}
	for _, unit := range []string{"k", "M", "G", "T", "P"} {
		if n, ok := strings.CutSuffix(s, unit+"B"); ok {
			return n + unit
		}
	}
	return strings.TrimSuffix(s, "B")
}

var errAskNothing = errors.New("say what to calculate with; see --help")
