package server

import (
	"context"
	"errors"
	"slices"
	"sort"
	"strings"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
	"github.com/portolan-io/portolan/identity"
)

// permission is what an RPC asks of its caller.
type permission int

const (
	// read: any role; what is answered is filtered by tenant.
	read permission = iota + 1
	// write: a fleet admin, or an admin of the tenant in the object's name.
	write
	// operate: a fleet admin.
	operate
)

// rule is one row of the table.
type rule struct {
	needs permission
	// audited: refusals write an audit row; so do changes, in their transaction.
	audited bool
}

// rules is the table RPC → permission. A test holds that every RPC of the proto
// has a row; an RPC without one is refused.
var rules = map[string]rule{
	"/portolan.v1.TenantService/GetTenant":         {read, false},
	"/portolan.v1.TenantService/ListTenants":       {read, false},
	"/portolan.v1.TenantService/CreateTenant":      {operate, true},
	"/portolan.v1.TenantService/UpdateTenant":      {operate, true},
	"/portolan.v1.TenantService/DeleteTenant":      {operate, true},
	"/portolan.v1.TenantService/GetRoleBinding":    {operate, false},
	"/portolan.v1.TenantService/ListRoleBindings":  {operate, false},
	"/portolan.v1.TenantService/CreateRoleBinding": {operate, true},
	"/portolan.v1.TenantService/UpdateRoleBinding": {operate, true},
	"/portolan.v1.TenantService/DeleteRoleBinding": {operate, true},

	"/portolan.v1.ClusterService/GetCluster":             {read, false},
	"/portolan.v1.ClusterService/ListClusters":           {read, false},
	"/portolan.v1.ClusterService/CreateCluster":          {operate, true},
	"/portolan.v1.ClusterService/UpdateCluster":          {operate, true},
	"/portolan.v1.ClusterService/DeleteCluster":          {operate, true},
	"/portolan.v1.ClusterService/CreateClusterJoinToken": {operate, true},
	"/portolan.v1.ClusterService/CreateNodeJoinToken":    {operate, true},
	"/portolan.v1.ClusterService/ListNodes":              {operate, false},
	"/portolan.v1.ClusterService/SetNodeMode":            {operate, true},
	"/portolan.v1.ClusterService/GetCapacity":            {operate, false},
	"/portolan.v1.ClusterService/DeleteNode":             {operate, true},

	"/portolan.v1.WorkloadService/GetWorkload":           {read, false},
	"/portolan.v1.WorkloadService/ListWorkloads":         {read, false},
	"/portolan.v1.WorkloadService/CreateWorkload":        {write, true},
	"/portolan.v1.WorkloadService/UpdateWorkload":        {write, true},
	"/portolan.v1.WorkloadService/DeleteWorkload":        {write, true},
	"/portolan.v1.WorkloadService/GetWorkloadRevision":   {read, false},
	"/portolan.v1.WorkloadService/ListWorkloadRevisions": {read, false},
	"/portolan.v1.WorkloadService/GetPlacement":          {read, false},
	"/portolan.v1.WorkloadService/ListPlacements":        {read, false},
	"/portolan.v1.WorkloadService/ExplainWorkload":       {read, false},
	"/portolan.v1.WorkloadService/Plan":                  {read, false},

	"/portolan.v1.MeshService/GetService":    {read, false},
	"/portolan.v1.MeshService/ListServices":  {read, false},
	"/portolan.v1.MeshService/CreateService": {write, true},
	"/portolan.v1.MeshService/UpdateService": {write, true},
	"/portolan.v1.MeshService/DeleteService": {write, true},
	"/portolan.v1.MeshService/GetRoute":      {read, false},
	"/portolan.v1.MeshService/ListRoutes":    {read, false},
	"/portolan.v1.MeshService/CreateRoute":   {write, true},
	"/portolan.v1.MeshService/UpdateRoute":   {write, true},
	"/portolan.v1.MeshService/DeleteRoute":   {write, true},

	"/portolan.v1.PolicyService/GetPolicyBundle":    {read, false},
	"/portolan.v1.PolicyService/ListPolicyBundles":  {read, false},
	"/portolan.v1.PolicyService/CreatePolicyBundle": {operate, true},
	"/portolan.v1.PolicyService/UpdatePolicyBundle": {operate, true},
	"/portolan.v1.PolicyService/DeletePolicyBundle": {operate, true},

	"/portolan.v1.AuditService/GetAuditEntry":    {read, false},
	"/portolan.v1.AuditService/ListAuditEntries": {read, false},

	"/portolan.v1.WatchService/Watch":               {read, false},
	"/portolan.v1.ConvergenceService/WaitConverged": {read, false},

	"/portolan.v1.RuntimeService/ListReplicas": {read, false},
	"/portolan.v1.RuntimeService/ListEvents":   {read, false},
	"/portolan.v1.RuntimeService/Logs":         {write, true},
	"/portolan.v1.RuntimeService/Exec":         {write, true},
}

// caller is who called, and what they are.
type caller struct {
	actor string // SPIFFE ID
	fleet bool   // a fleet admin
	// tenants of which they are an admin, sorted; not nil.
	tenants []string
	method  string
}

// filter is the restriction for the store's queries: nil for fleet admins.
func (c *caller) filter() []string {
	if c.fleet {
		return nil
	}
	return c.tenants
}

// owns says whether objects of a tenant are the caller's to read. The fleet's
// own objects have tenant "".
func (c *caller) owns(tenant string) bool {
	return c.fleet || tenant != "" && slices.Contains(c.tenants, tenant)
}

func (c *caller) roles() []string {
	var out []string
	if c.fleet {
		out = append(out, "fleet-admin")
	}
	for _, t := range c.tenants {
		out = append(out, "tenant-admin:"+t)
	}
	return out
}

type callerKey struct{}

// callerOf gives the caller that the interceptor put there.
func callerOf(ctx context.Context) (*caller, error) {
	c, ok := ctx.Value(callerKey{}).(*caller)
	if !ok {
		return nil, api.E(api.Unknown, "", "the caller is unknown")
	}
	return c, nil
}

// peerIdentity reads the URI of the verified certificate.
func peerIdentity(ctx context.Context) (identity.ID, error) {
	unknown := func(message string) (identity.ID, error) {
		return identity.ID{}, api.E(api.Unknown, "", "%s", message)
	}
	p, ok := peer.FromContext(ctx)
	if !ok {
		return unknown("the caller is unknown")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return unknown("a client certificate is required")
	}
	uris := info.State.PeerCertificates[0].URIs
	if len(uris) != 1 {
		return unknown("the client certificate must carry exactly one URI")
	}
	id, err := identity.Parse(uris[0].String())
	if err != nil {
		return unknown("the client certificate names nobody of this fleet")
	}
	return id, nil
}

// identify says who calls, and whether anybody may call this.
func (s *Server) identify(ctx context.Context, method string) (*caller, error) {
	if _, ok := rules[method]; !ok {
		return nil, api.E(api.Denied, "", "nobody may call %s", method)
	}
	id, err := s.cfg.Identify(ctx)
	if err != nil {
		return nil, err
	}
	if id.Kind != identity.User || id.TrustDomain != s.cfg.Fleet {
		return nil, api.E(api.Denied, "", "%s is no user of this fleet", id)
	}
	return &caller{actor: id.String(), method: strings.TrimPrefix(method, "/"), tenants: []string{}}, nil
}

// authorize reads the caller's roles and asks the table.
func (s *Server) authorize(ctx context.Context, c *caller) error {
	if err := s.loadRoles(ctx, c); err != nil {
		return err
	}
	return c.allowed(rules["/"+c.method])
}

// allowed says why somebody who is known may not call.
func (c *caller) allowed(rl rule) error {
	switch {
	case c.fleet:
		return nil
	case len(c.tenants) == 0:
		return api.E(api.Denied, "", "%s has no role in this fleet", c.actor)
	case rl.needs == operate:
		return api.E(api.Denied, "", "only fleet admins may call %s", c.method)
	}
	return nil
}

// loadRoles reads the bindings of the caller, on the present snapshot, so that a
// binding that goes is gone for the next call.
func (s *Server) loadRoles(ctx context.Context, c *caller) error {
	_, err := s.cfg.Store.View(ctx, func(r store.Reader) error {
		c.fleet, c.tenants = false, []string{}
		for rec, err := range r.List(store.RoleBinding, store.ListOptions{}) {
			if err != nil {
				return err
			}
			b, ok := rec.Message.(*portolanv1.RoleBinding)
			if !ok || b.GetSpec().GetSubject() != c.actor {
				continue
			}
			switch b.GetSpec().GetRole() {
			case portolanv1.Role_ROLE_FLEET_ADMIN:
				c.fleet = true
			case portolanv1.Role_ROLE_TENANT_ADMIN:
				if t := b.GetSpec().GetTenant(); t != "" && !slices.Contains(c.tenants, t) {
					c.tenants = append(c.tenants, t)
				}
			default:
			}
		}
		sort.Strings(c.tenants)
		return nil
	})
	return err
}

// mayWrite decides about an object by its name, after the table let the RPC pass.
// Objects of other tenants read as absent.
func (c *caller) mayWrite(k *kindInfo, doing, name string) error {
	t := api.TenantOf(name)
	if c.fleet || t != "" && t != api.SystemTenant && slices.Contains(c.tenants, t) {
		return nil
	}
	if t == api.SystemTenant && slices.Contains(c.tenants, t) {
		return api.E(api.Denied, doing, "only fleet admins change tenant %q", api.SystemTenant)
	}
	return k.absent(doing)
}

// isRefusal says whether an error is a decision about the request, not a failure
// to decide.
func isRefusal(err error) bool {
	var e *api.Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Kind {
	case api.Invalid, api.NotFound, api.Exists, api.Conflict, api.Denied, api.Precondition, api.Exhausted:
		return true
	default:
		return false
	}
}
