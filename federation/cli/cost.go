package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/capacity"
	"github.com/portolan-io/portolan/federation/cli/manifest"
)

// costBy are the ways to take a bill apart.
var costBy = []string{"region", "cluster", "tenant", "workload"}

func (a *app) costCommand() *cobra.Command {
	by := ""
	c := &cobra.Command{
		Use: "cost", Short: "What the fleet costs, by region, cluster, tenant or workload", GroupID: "fleet", Args: cobra.NoArgs,
		Long: `Multiplies capacity and what placements reserve (the greatest number of replicas,
and the surge of updates) with the prices of clusters. A month has 730 hours. By
tenant and by workload only what is reserved counts: the rest belongs to nobody.

The verb below it calculates, without a fleet.`,
		Example: `  portolan cost
  portolan cost --by tenant
  portolan cost --by workload --tenant shop -o json
  portolan cost estimate --control-planes 3 --control-plane-price 0.10 --nodes 20 --node-price 0.15 --operator-hours 40 --operator-price 100`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkPlainOutput(); err != nil {
				return err
			}
			if !slices.Contains(costBy, by) {
				return fmt.Errorf("--by %q is not known; use %s", by, strings.Join(costBy, ", "))
			}
			tenant := ""
			if f := cmd.Flag("tenant"); f != nil && f.Changed {
				tenant = a.tenant
			}
			return a.fleetCost(cmd.Context(), by, tenant)
		},
	}
	c.Flags().StringVar(&by, "by", "region", "take apart by "+strings.Join(costBy, ", "))
	_ = c.RegisterFlagCompletionFunc("by", cobra.FixedCompletions(costBy, cobra.ShellCompDirectiveNoFileComp))
	a.plainOutputFlag(c)
	c.AddCommand(a.costEstimateCommand())
	return c
}

// bill is a line as it is shown, in micro-units of currency.
type bill struct {
	Name          string `json:"name"`
	Capacity      *room  `json:"capacity,omitempty"`
	Reserved      room   `json:"reserved"`
	ReservedHour  int64  `json:"reserved_hour_micros"`
	ReservedMonth int64  `json:"reserved_month_micros"`
	CapacityHour  int64  `json:"capacity_hour_micros,omitempty"`
	CapacityMonth int64  `json:"capacity_month_micros,omitempty"`
}

func (a *app) fleetCost(ctx context.Context, by, tenant string) error {
	cc, err := a.dial()
	if err != nil {
		return err
	}
	cs, err := a.capacities(ctx, cc, "")
	if err != nil {
		return err
	}
	var lines []capacity.Line
	whole := true
	switch by {
	case "region":
		lines = capacity.ByRegion(cs)
	case "cluster":
		lines = capacity.ByCluster(cs)
	default:
		whole = false
		ps, err := placements(ctx, cc, tenant)
		if err != nil {
			return err
		}
		lines = capacity.ByPlacement(cs, ps, func(p *portolanv1.Placement) string {
			if by == "tenant" {
				return api.TenantOf(p.GetName())
			}
			return api.TenantOf(p.GetName()) + "/" + workloadOf(p.GetName())
		})
	}
	return a.showBill(by, lines, whole)
}

func placements(ctx context.Context, cc grpc.ClientConnInterface, tenant string) ([]*portolanv1.Placement, error) {
	k, err := manifest.FindKind("placement")
	if err != nil {
		return nil, err
	}
	parent := ""
	if tenant != "" {
		parent = api.TenantName(tenant)
	}
	msgs, err := objects{cc}.list(ctx, k, parent, nil)
	var out []*portolanv1.Placement
	for _, m := range msgs {
		if p, ok := m.(*portolanv1.Placement); ok {
			out = append(out, p)
		}
	}
	return out, err
}

func (a *app) showBill(by string, lines []capacity.Line, whole bool) error {
	var bills []bill
	sum := capacity.Line{Name: "all"}
	for _, l := range lines {
		bills = append(bills, billOf(l, whole))
		sum.CapacityHour += l.CapacityHour
		sum.ReservedHour += l.ReservedHour
		sum.Capacity, sum.Reserved = sum.Capacity.Add(l.Capacity), sum.Reserved.Add(l.Reserved)
	}
	if a.output != "table" {
		return a.encode(map[string]any{"by": by, "lines": bills, "total": billOf(sum, whole)})
	}
	if len(lines) == 0 {
		a.notef("nothing costs anything\n")
		return nil
	}
	cols := []string{strings.ToUpper(by), "CPU", "MEMORY", "RESERVED/H", "RESERVED/MONTH"}
	if whole {
		cols = append(cols, "CAPACITY/H", "CAPACITY/MONTH", "IDLE/MONTH")
	}
	t := newTable(cols...)
	for _, l := range append(lines, sum) {
		row := []string{l.Name, coresText(l.Reserved.CPUMilli), bytesText(l.Reserved.MemoryBytes), money(l.ReservedHour), money(l.ReservedHour * capacity.HoursPerMonth)}
		if whole {
			row[1] += "/" + coresText(l.Capacity.CPUMilli)
			row[2] += "/" + bytesText(l.Capacity.MemoryBytes)
			row = append(row, money(l.CapacityHour), money(l.CapacityHour*capacity.HoursPerMonth), money(l.Idle()*capacity.HoursPerMonth))
		}
		t.add(row...)
	}
	a.print(t)
	return nil
}

func billOf(l capacity.Line, whole bool) bill {
	b := bill{Name: l.Name, Reserved: roomOf(l.Reserved), ReservedHour: l.ReservedHour, ReservedMonth: l.ReservedHour * capacity.HoursPerMonth}
	if whole {
		c := roomOf(l.Capacity)
		b.Capacity, b.CapacityHour, b.CapacityMonth = &c, l.CapacityHour, l.CapacityHour*capacity.HoursPerMonth
	}
	return b
}

// money shows micro-units of currency: to the hundredth, and small amounts to
// where they begin.
func money(micros int64) string {
	if micros > -10000 && micros < 10000 && micros != 0 {
		return strings.TrimRight(fmt.Sprintf("%.6f", float64(micros)/1e6), "0")
	}
	text := fmt.Sprintf("%.2f", float64(micros)/1e6)
	whole, rest, _ := strings.Cut(text, ".")
	sign := ""
	if whole[0] == '-' {
		sign, whole = "-", whole[1:]
	}
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	return sign + whole + "." + rest
}

type estimateOptions struct {
	controlPlanes, nodes, operatorHours, hours  int64
	controlPlanePrice, nodePrice, operatorPrice float64
}

func (a *app) costEstimateCommand() *cobra.Command {
	var o estimateOptions
	c := &cobra.Command{
		Use: "estimate", Short: "What a way to run a fleet costs in a month", Args: cobra.NoArgs,
		Long: `Calculates control planes × price × hours + nodes × price × hours + hours of people ×
their price. Set it against another way: a managed control plane costs one fee and
fewer hours of people.`,
		Example: `  portolan cost estimate --control-planes 3 --control-plane-price 0.10 --nodes 20 --node-price 0.15 --operator-hours 40 --operator-price 100
  portolan cost estimate --control-planes 1 --control-plane-price 0.10 --nodes 20 --node-price 0.15 --operator-hours 10 --operator-price 100`,
		RunE: func(*cobra.Command, []string) error {
			if err := a.checkPlainOutput(); err != nil {
				return err
			}
			return a.estimate(o)
		},
	}
	f := c.Flags()
	f.Int64Var(&o.controlPlanes, "control-planes", 0, "machines, or fees, of control planes")
	f.Float64Var(&o.controlPlanePrice, "control-plane-price", 0, "of one for an hour")
	f.Int64Var(&o.nodes, "nodes", 0, "nodes")
	f.Float64Var(&o.nodePrice, "node-price", 0, "of one for an hour")
	f.Int64Var(&o.operatorHours, "operator-hours", 0, "hours of people in a month")
	f.Float64Var(&o.operatorPrice, "operator-price", 0, "of such an hour")
	f.Int64Var(&o.hours, "hours", capacity.HoursPerMonth, "hours of the month")
	a.plainOutputFlag(c)
	return c
}

func (a *app) estimate(o estimateOptions) error {
	op := capacity.Operation{ControlPlanes: o.controlPlanes, Nodes: o.nodes, OperatorHours: o.operatorHours, Hours: o.hours}
	for _, x := range []struct {
		into  *int64
		units float64
	}{{&op.ControlPlaneHour, o.controlPlanePrice}, {&op.NodeHour, o.nodePrice}, {&op.OperatorPrice, o.operatorPrice}} {
		var err error
		if *x.into, err = capacity.Micros(x.units); err != nil {
			return err
		}
	}
	b, err := op.Bill()
	if err != nil {
		return err
	}
	if a.output != "table" {
		return a.encode(map[string]any{"control_planes_micros": b.ControlPlanes, "nodes_micros": b.Nodes, "operators_micros": b.Operators, "total_micros": b.Total})
	}
	t := newTable("PART", "NUMBER", "PRICE", "HOURS", "MONTH")
	t.add("control planes", fmt.Sprint(op.ControlPlanes), money(op.ControlPlaneHour), fmt.Sprint(op.Hours), money(b.ControlPlanes))
	t.add("nodes", fmt.Sprint(op.Nodes), money(op.NodeHour), fmt.Sprint(op.Hours), money(b.Nodes))
	t.add("people", "", money(op.OperatorPrice), fmt.Sprint(op.OperatorHours), money(b.Operators))
	t.add("all", "", "", "", money(b.Total))
	a.print(t)
	return nil
}
