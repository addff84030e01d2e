package server

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
)

// fakePlans foretells the same of every change.
type fakePlans struct{ answer *portolanv1.PlanResponse }

func (f *fakePlans) Explain(store.Reader, *portolanv1.Workload) (*portolanv1.ExplainWorkloadResponse, error) {
	return &portolanv1.ExplainWorkloadResponse{}, nil
}

func (f *fakePlans) Plan(store.Reader, api.WhatIf) (*portolanv1.PlanResponse, error) {
	return proto.CloneOf(f.answer), nil
}

// displacing is a plan in which a workload of shop takes room from its own tenant
// and from two workloads of another.
func displacing() *portolanv1.PlanResponse {
	return &portolanv1.PlanResponse{CostBeforeMicros: 600, CostAfterMicros: 500, Workloads: []*portolanv1.WorkloadPlan{
		{Workload: "tenants/bank/workloads/ledger", CostBeforeMicros: 300, CostAfterMicros: 100},
		{Workload: "tenants/bank/workloads/vault", CostBeforeMicros: 200, CostAfterMicros: 100},
		{Workload: "tenants/shop/workloads/batch", CostBeforeMicros: 100, CostAfterMicros: 50},
		{Workload: "tenants/shop/workloads/web", CostAfterMicros: 250, DesiredReplicas: 4, Displaced: []*portolanv1.Displaced{
			{Workload: "tenants/bank/workloads/ledger", Cluster: "eu", Replicas: 2},
			{Workload: "tenants/shop/workloads/batch", Cluster: "eu", Replicas: 1},
			{Workload: "tenants/bank/workloads/vault", Cluster: "eu", Replicas: 1},
			{Workload: "tenants/bank/workloads/vault", Cluster: "us", Replicas: 1},
		}},
	}}
}

// A tenant's plan names no workload of another tenant, nor what it costs, nor that it
// exists; the fleet's admins see all.
func TestPlanShowsNoOtherTenant(t *testing.T) {
	f := &fakePlans{answer: displacing()}
	e := newEnv(t, func(c *Config) { c.Explainer = f })
	e.tenant("shop")
	e.tenant("bank")
	req := &portolanv1.PlanRequest{Change: &portolanv1.PlanRequest_Workload{Workload: workload("shop", "web")}}
	got := must[*portolanv1.PlanResponse](t)(e.workloads().Plan(e.as("shop"), req))
	if text := got.String(); strings.Contains(text, "bank") {
		t.Errorf("shop sees bank: %s", text)
	}
	if len(got.GetWorkloads()) != 2 || got.GetCostBeforeMicros() != 100 || got.GetCostAfterMicros() != 300 {
		t.Errorf("shop sees %v", got)
	}
	var lost []string
	for _, d := range got.GetWorkloads()[1].GetDisplaced() {
		lost = append(lost, d.GetWorkload()+"@"+d.GetCluster()+strings.Repeat("-", int(d.GetReplicas())))
	}
	if text := strings.Join(lost, " "); text != "tenants/shop/workloads/batch@eu- @eu--- @us-" {
		t.Errorf("displaced: %s", text)
	}
	// Who of the others it is makes no other token: it would tell.
	f.answer.Workloads[0].Workload, f.answer.Workloads[3].Displaced[0].Workload = "tenants/bank/workloads/a", "tenants/bank/workloads/a"
	if again := must[*portolanv1.PlanResponse](t)(e.workloads().Plan(e.as("shop"), req)); again.GetToken() != got.GetToken() {
		t.Error("the token depends on another tenant's names")
	}
	all := must[*portolanv1.PlanResponse](t)(e.workloads().Plan(e.root(), req))
	if len(all.GetWorkloads()) != 4 || all.GetCostBeforeMicros() != 600 || len(all.GetWorkloads()[3].GetDisplaced()) != 4 {
		t.Errorf("a fleet admin sees %v", all)
	}
}

// A change with the token of its plan is made while the plan is the same, and refused
// when it has become another; a dry run says so without a change.
func TestPlanToken(t *testing.T) {
	f := &fakePlans{answer: displacing()}
	e := newEnv(t, func(c *Config) { c.Explainer = f })
	e.tenant("shop")
	c, ctx := e.workloads(), e.as("shop")
	plan := func(w *portolanv1.Workload) string {
		return must[*portolanv1.PlanResponse](t)(c.Plan(ctx, &portolanv1.PlanRequest{Change: &portolanv1.PlanRequest_Workload{Workload: w}})).GetToken()
	}
	update := func(w *portolanv1.Workload, token string, dry bool) error {
		_, err := c.UpdateWorkload(ctx, &portolanv1.UpdateWorkloadRequest{Workload: w, AllowMissing: true, PlanToken: token, ValidateOnly: dry})
		return err
	}
	web := workload("shop", "web")
	token := plan(web)
	for _, dry := range []bool{true, false} {
		if err := update(web, token, dry); err != nil {
			t.Fatalf("the same state, dry run %v: %v", dry, err)
		}
	}
	web.Spec.Replicas = proto.Int32(3)
	token = plan(web)
	f.answer.Workloads[3].UnplacedReplicas = 1
	for _, dry := range []bool{true, false} {
		wantCode(t, update(web, token, dry), codes.Aborted)
	}
	stored := must[*portolanv1.Workload](t)(c.GetWorkload(ctx, &portolanv1.GetWorkloadRequest{Name: web.GetName()}))
	if stored.GetSpec().GetReplicas() != 2 {
		t.Errorf("a refused change was stored: %v", stored)
	}
	if err := update(web, plan(web), false); err != nil {
		t.Errorf("planned again: %v", err)
	}
}
