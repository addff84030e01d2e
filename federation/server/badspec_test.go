package server

import (
	"context"
	"slices"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/server/badspec"
	"github.com/portolan-io/portolan/federation/store"
)

func mask(paths ...string) *fieldmaskpb.FieldMask { return &fieldmaskpb.FieldMask{Paths: paths} }

// state is everything stored but the audit log.
func (e *env) state() string {
	e.t.Helper()
	var b strings.Builder
	_, err := e.store.View(e.t.Context(), func(r store.Reader) error {
		for _, k := range store.Kinds {
			if k.Kind == store.AuditEntry {
				continue
			}
			for rec, err := range r.List(k.Kind, store.ListOptions{}) {
				if err != nil {
					return err
				}
				b.WriteString(string(rec.Kind) + " " + rec.Name + " " + hashOf(rec.Message) + "\n")
			}
		}
		return nil
	})
	if err != nil {
		e.t.Fatal(err)
	}
	return b.String()
}

func TestBadSpecs(t *testing.T) {
	e := newEnv(t)
	e.tenant("shop", "shop.localhost")
	e.tenant("bank")
	fixtures, rows, err := badspec.Load(badspec.Values{
		Tenant: "shop", Other: "bank", Registry: testRegistry, Image: "app:1", Suffix: "shop.localhost", Fleet: testFleet,
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) < 60 {
		t.Fatalf("the table has only %d rows", len(rows))
	}
	invoke := func(ctx context.Context, t *testing.T, r badspec.Row) error {
		t.Helper()
		req, err := r.Request()
		if err != nil {
			t.Fatal(err)
		}
		var out proto.Message = &emptypb.Empty{}
		if r.Op != "delete" {
			if out, err = badspec.Object(r.Kind, map[string]any{}); err != nil {
				t.Fatal(err)
			}
		}
		return e.conn.Invoke(ctx, r.Method(), req, out)
	}
	for _, f := range fixtures {
		if err := invoke(e.root(), t, badspec.Row{Op: "create", Kind: f.Kind, Body: f.Body}); err != nil {
			t.Fatalf("fixture %v: %v", f.Body["name"], err)
		}
	}
	before := e.state()
	seen := map[string]bool{}
	for _, r := range rows {
		t.Run(r.Name, func(t *testing.T) {
			if seen[r.Name] {
				t.Fatal("two rows have this name")
			}
			seen[r.Name] = true
			if r.Stage == "decode" {
				if _, err := r.Request(); err == nil {
					t.Fatal("it was decoded")
				}
				return
			}
			user := map[string]string{"": "shop", "fleet": "root", "other": "bank"}[r.As]
			err := invoke(e.as(user), t, r)
			want, cerr := r.WantCode()
			if cerr != nil {
				t.Fatal(cerr)
			}
			wantCode(t, err, want)
			if r.Field != "" && !slices.Contains(fieldsOf(err), r.Field) {
				t.Fatalf("names fields %q, want %q: %v", fieldsOf(err), r.Field, err)
			}
			if !strings.Contains(status.Convert(err).Message(), r.Says) {
				t.Fatalf("%q does not say %q", status.Convert(err).Message(), r.Says)
			}
			if r.Stage == "policy" && !slices.ContainsFunc(status.Convert(err).Details(), func(d any) bool {
				b, ok := d.(*errdetails.BadRequest)
				return ok && b.GetFieldViolations()[0].GetReason() == "POLICY" && strings.Contains(b.GetFieldViolations()[0].GetDescription(), "limits.rego:")
			}) {
				t.Fatalf("no rule, file and line: %v", status.Convert(err).Details())
			}
			if after := e.state(); after != before {
				t.Fatalf("something was stored:\n%s\n%s", before, after)
			}
		})
	}
	refused := 0
	for _, entry := range e.audit() {
		if entry.GetDecision() == portolanv1.AuditDecision_AUDIT_DECISION_REFUSED {
			refused++
		}
	}
	// Rows come faster than the limit of refusals per caller lets them be written.
	if refused < 20 {
		t.Errorf("only %d refusals were audited", refused)
	}
}
