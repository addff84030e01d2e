package cli

import (
	"bytes"
	"cmp"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// planning is a server whose plans have a token, and that remembers what it was given
// to store.
type planning struct {
	portolanv1.UnimplementedWorkloadServiceServer
	portolanv1.UnimplementedMeshServiceServer
	token  string
	stored []string
}

func (p *planning) Plan(_ context.Context, req *portolanv1.PlanRequest) (*portolanv1.PlanResponse, error) {
	return &portolanv1.PlanResponse{Token: p.token, CostAfterMicros: 60000, Workloads: []*portolanv1.WorkloadPlan{{
		Workload: req.GetWorkload().GetName(), DesiredReplicas: 2, CostAfterMicros: 60000,
		Placements: []*portolanv1.PlacementPlan{{Cluster: "eu", ReplicasAfter: 2}},
		Displaced: []*portolanv1.Displaced{
			{Workload: "tenants/shop/workloads/batch", Cluster: "eu", Replicas: 1}, {Cluster: "eu", Replicas: 3},
		},
	}}}, nil
}

func (p *planning) GetWorkload(context.Context, *portolanv1.GetWorkloadRequest) (*portolanv1.Workload, error) {
	return nil, status.Error(codes.NotFound, "there is none")
}

func (p *planning) GetService(context.Context, *portolanv1.GetServiceRequest) (*portolanv1.Service, error) {
	return nil, status.Error(codes.NotFound, "there is none")
}

func (p *planning) UpdateWorkload(_ context.Context, req *portolanv1.UpdateWorkloadRequest) (*portolanv1.Workload, error) {
	if t := req.GetPlanToken(); t != "" && t != p.token {
		return nil, status.Error(codes.Aborted, "update web: the plan would be another one by now: plan again, and look at it")
	}
	if !req.GetValidateOnly() {
		p.stored = append(p.stored, short(req.GetWorkload().GetName()))
	}
	return req.GetWorkload(), nil
}

func (p *planning) UpdateService(_ context.Context, req *portolanv1.UpdateServiceRequest) (*portolanv1.Service, error) {
	if !req.GetValidateOnly() {
		p.stored = append(p.stored, short(req.GetService().GetName()))
	}
	return req.GetService(), nil
}

// conn is a connection to the server.
func (p *planning) conn(t *testing.T) *grpc.ClientConn {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	s := grpc.NewServer()
	portolanv1.RegisterWorkloadServiceServer(s, p)
	portolanv1.RegisterMeshServiceServer(s, p)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	cc, err := grpc.NewClient("passthrough:///planning", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cc.Close()
		s.Stop()
		<-done
	})
	return cc
}

// The stories in testdata/plan: file writes a manifest, run is a command as it is
// typed, token is that of the plans from then on, stored is what the server was given
// since it was last asked.
func TestPlanAndApply(t *testing.T) {
	dir, p := t.TempDir(), &planning{token: "t1"}
	cc := p.conn(t)
	datadriven.RunTest(t, "testdata/plan", func(t *testing.T, d *datadriven.TestData) string {
		t.Helper()
		switch d.Cmd {
		case "file":
			if err := os.WriteFile(filepath.Join(dir, d.CmdArgs[0].Key), []byte(d.Input), 0o600); err != nil {
				t.Fatal(err)
			}
			return ""
		case "token":
			p.token = d.CmdArgs[0].Key
			return ""
		case "stored":
			out := cmp.Or(strings.Join(p.stored, " "), "nothing") + "\n"
			p.stored = nil
			return out
		}
		out := &bytes.Buffer{}
		a := &app{out: out, err: out, conn: cc}
		root := &cobra.Command{Use: "portolan", SilenceUsage: true, SilenceErrors: true}
		root.AddGroup(&cobra.Group{ID: "objects", Title: "Objects:"})
		root.AddCommand(a.planCommand(), a.applyCommand())
		root.SetArgs(strings.Fields(strings.ReplaceAll(strings.TrimPrefix(d.Input, "portolan "), "-f ", "-f "+dir+"/")))
		err := root.ExecuteContext(t.Context())
		a.conn = nil
		if err != nil {
			out.WriteString("portolan: " + explainError(err) + "\n")
		}
		return strings.ReplaceAll(out.String(), dir+"/", "")
	})
}
