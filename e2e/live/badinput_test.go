package live

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/portolan-io/portolan/federation/cli/manifest"
	"github.com/portolan-io/portolan/federation/client"
	"github.com/portolan-io/portolan/federation/server/badspec"
)

// asUser gives a connection of a user who is admin of a tenant.
func asUser(t *testing.T, name, tenant string) *grpc.ClientConn {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	config := filepath.Join(fleet.dataDir, "config", "federation-1.yaml")
	out, err := exec.CommandContext(always(t), filepath.Join(filepath.Dir(fleet.cli), "portolan-federation"), "issue-user", "--config", config, "--name", name, "--out", dir).CombinedOutput()
	if err != nil {
		t.Fatalf("issue a certificate: %v %s", err, out)
	}
	binding := "{kind: RoleBinding, name: " + name + ", spec: {subject: 'spiffe://portolan.internal/user/" + name + "', role: tenant_admin, tenant: " + tenant + "}}"
	apply(t, binding)
	t.Cleanup(func() { cli(t, "delete", "rolebinding", name) })
	f, err := client.Load(fleet.config)
	if err != nil {
		t.Fatal(err)
	}
	c, err := f.Get("local")
	if err != nil {
		t.Fatal(err)
	}
	c.CertFile, c.KeyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	cc, err := client.Dial(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

func kindOf(t *testing.T, word string) manifest.Kind {
	t.Helper()
	k, err := manifest.FindKind(word)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// 11. A table of bad requests: each gets a typed error with the field's path;
// nothing is stored, and nobody is disturbed.
func Test11BadInput(t *testing.T) {
	settle(t)
	apply(t, "{kind: Tenant, name: bad, spec: {ingress_suffixes: [bad.localhost]}}\n---\n{kind: Tenant, name: worse, spec: {}}\n")
	// Clean-ups run backwards: what lies in the tenants goes first.
	t.Cleanup(func() { cli(t, "delete", "tenant", "bad", "worse") })
	fixtures, rows, err := badspec.Load(badspec.Values{Tenant: "bad", Other: "worse", Registry: "registry.portolan.internal:7500", Image: "shop/payments:v1", Suffix: "bad.localhost", Fleet: "portolan.internal"})
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) < 60 {
		t.Fatalf("the table has %d rows, want at least 60", len(rows))
	}
	conns := map[string]*grpc.ClientConn{"fleet": fleet.conn, "": asUser(t, "bad-admin", "bad"), "other": asUser(t, "worse-admin", "worse")}
	for _, f := range fixtures {
		o, err := badspec.Object(f.Kind, f.Body)
		if err != nil {
			t.Fatal(err)
		}
		row := badspec.Row{Kind: f.Kind, Op: "create", Body: f.Body}
		req, err := row.Request()
		if err != nil {
			t.Fatal(err)
		}
		if err := fleet.conn.Invoke(always(t), row.Method(), req, kindOf(t, f.Kind).New()); err != nil {
			t.Fatalf("fixture %v: %v", o, err)
		}
		name := f.Body["name"].(string)
		t.Cleanup(func() { cli(t, "delete", f.Kind, name) })
	}
	before := stored(t)
	l := startLoad(t, ingressOf["eu-west"][0], "/api/items", 50)
	began := time.Now()
	for _, row := range rows {
		refusedRow(t, conns[row.As], row)
	}
	took := time.Since(began)
	total, failed := l.Stop()
	t.Logf("%d bad requests refused in %s; meanwhile %d requests to the shop, %d failed", len(rows), took.Round(time.Millisecond), total, failed)
	if failed > 0 {
		t.Errorf("%d requests failed: %s", failed, l.first)
	}
	if after := stored(t); after != before {
		t.Errorf("objects before: %s\nafter: %s", before, after)
	}
}

// stored is all that users may write, as names and etags.
func stored(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, k := range []string{"tenants", "rolebindings", "clusters", "policybundles", "workloads", "services", "routes", "revisions"} {
		var list struct {
			Items []struct{ Name, Etag string }
		}
		if err := json.Unmarshal([]byte(cli(t, "get", k, "-o", "json")), &list); err != nil {
			t.Fatalf("get %s: %v", k, err)
		}
		for _, o := range list.Items {
			if o.Name == "" || o.Etag == "" && k != "revisions" { // which never change
				t.Fatalf("get %s: an object without name or etag: %+v", k, o)
			}
			fmt.Fprintf(&b, "%s@%s\n", o.Name, o.Etag)
		}
	}
	return b.String()
}

func refusedRow(t *testing.T, cc *grpc.ClientConn, row badspec.Row) {
	t.Helper()
	req, err := row.Request()
	if row.Stage == "decode" {
		if err == nil {
			t.Errorf("%s: decoded: %v", row.Name, req)
		}
		return
	}
	if err != nil {
		t.Errorf("%s: %v", row.Name, err)
		return
	}
	var out proto.Message = &emptypb.Empty{}
	if row.Op != "delete" {
		out = kindOf(t, row.Kind).New()
	}
	err = cc.Invoke(always(t), row.Method(), req, out)
	want, werr := row.WantCode()
	if werr != nil {
		t.Fatal(werr)
	}
	if status.Code(err) != want {
		t.Errorf("%s: got %v, want %s", row.Name, err, want)
		return
	}
	if row.Field == "" {
		return
	}
	var fields []string
	for _, d := range status.Convert(err).Details() {
		if bad, ok := d.(*errdetails.BadRequest); ok {
			for _, v := range bad.GetFieldViolations() {
				fields = append(fields, v.GetField())
				if v.GetField() == row.Field {
					return
				}
			}
		}
	}
	t.Errorf("%s: the refusal names %v, want %s: %v", row.Name, fields, row.Field, err)
}
