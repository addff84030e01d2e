package server

import (
	"context"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
)

// The standard methods: one line each, because the engine is one for all kinds
// (read.go, write.go).

type (
	tenantService struct {
		portolanv1.UnimplementedTenantServiceServer
		s *Server
	}
	clusterService struct {
		portolanv1.UnimplementedClusterServiceServer
		s *Server
	}
	workloadService struct {
		portolanv1.UnimplementedWorkloadServiceServer
		s *Server
	}
	meshService struct {
		portolanv1.UnimplementedMeshServiceServer
		s *Server
	}
	policyService struct {
		portolanv1.UnimplementedPolicyServiceServer
		s *Server
	}
)

func (x *tenantService) GetTenant(ctx context.Context, req *portolanv1.GetTenantRequest) (*portolanv1.Tenant, error) {
	return getObject[*portolanv1.Tenant](ctx, x.s, store.Tenant, req.GetName())
}

func (x *tenantService) ListTenants(ctx context.Context, req *portolanv1.ListTenantsRequest) (*portolanv1.ListTenantsResponse, error) {
	p, err := listObjects[*portolanv1.Tenant](ctx, x.s, store.Tenant, "", req)
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListTenantsResponse{Tenants: p.items, NextPageToken: p.next, Revision: p.revision}, nil
}

func (x *tenantService) CreateTenant(ctx context.Context, req *portolanv1.CreateTenantRequest) (*portolanv1.Tenant, error) {
	return createObject(ctx, x.s, store.Tenant, req.GetTenant(), req)
}

func (x *tenantService) UpdateTenant(ctx context.Context, req *portolanv1.UpdateTenantRequest) (*portolanv1.Tenant, error) {
	return updateObject(ctx, x.s, store.Tenant, req.GetTenant(), req)
}

func (x *tenantService) DeleteTenant(ctx context.Context, req *portolanv1.DeleteTenantRequest) (*emptypb.Empty, error) {
	return deleteObject(ctx, x.s, store.Tenant, req)
}

func (x *tenantService) GetRoleBinding(ctx context.Context, req *portolanv1.GetRoleBindingRequest) (*portolanv1.RoleBinding, error) {
	return getObject[*portolanv1.RoleBinding](ctx, x.s, store.RoleBinding, req.GetName())
}

func (x *tenantService) ListRoleBindings(ctx context.Context, req *portolanv1.ListRoleBindingsRequest) (*portolanv1.ListRoleBindingsResponse, error) {
	p, err := listObjects[*portolanv1.RoleBinding](ctx, x.s, store.RoleBinding, "", req)
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListRoleBindingsResponse{RoleBindings: p.items, NextPageToken: p.next, Revision: p.revision}, nil
}

func (x *tenantService) CreateRoleBinding(ctx context.Context, req *portolanv1.CreateRoleBindingRequest) (*portolanv1.RoleBinding, error) {
	return createObject(ctx, x.s, store.RoleBinding, req.GetRoleBinding(), req)
}

func (x *tenantService) UpdateRoleBinding(ctx context.Context, req *portolanv1.UpdateRoleBindingRequest) (*portolanv1.RoleBinding, error) {
	return updateObject(ctx, x.s, store.RoleBinding, req.GetRoleBinding(), req)
}

func (x *tenantService) DeleteRoleBinding(ctx context.Context, req *portolanv1.DeleteRoleBindingRequest) (*emptypb.Empty, error) {
	return deleteObject(ctx, x.s, store.RoleBinding, req)
}

func (x *clusterService) GetCluster(ctx context.Context, req *portolanv1.GetClusterRequest) (*portolanv1.Cluster, error) {
	return getObject[*portolanv1.Cluster](ctx, x.s, store.Cluster, req.GetName())
}

func (x *clusterService) ListClusters(ctx context.Context, req *portolanv1.ListClustersRequest) (*portolanv1.ListClustersResponse, error) {
	p, err := listObjects[*portolanv1.Cluster](ctx, x.s, store.Cluster, "", req)
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListClustersResponse{Clusters: p.items, NextPageToken: p.next, Revision: p.revision}, nil
}

func (x *clusterService) CreateCluster(ctx context.Context, req *portolanv1.CreateClusterRequest) (*portolanv1.Cluster, error) {
	return createObject(ctx, x.s, store.Cluster, req.GetCluster(), req)
}

func (x *clusterService) UpdateCluster(ctx context.Context, req *portolanv1.UpdateClusterRequest) (*portolanv1.Cluster, error) {
	return updateObject(ctx, x.s, store.Cluster, req.GetCluster(), req)
}

func (x *clusterService) DeleteCluster(ctx context.Context, req *portolanv1.DeleteClusterRequest) (*emptypb.Empty, error) {
	return deleteObject(ctx, x.s, store.Cluster, req)
}

func (x *workloadService) GetWorkload(ctx context.Context, req *portolanv1.GetWorkloadRequest) (*portolanv1.Workload, error) {
	return getObject[*portolanv1.Workload](ctx, x.s, store.Workload, req.GetName())
}

func (x *workloadService) ListWorkloads(ctx context.Context, req *portolanv1.ListWorkloadsRequest) (*portolanv1.ListWorkloadsResponse, error) {
	p, err := listObjects[*portolanv1.Workload](ctx, x.s, store.Workload, req.GetParent(), req)
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListWorkloadsResponse{Workloads: p.items, NextPageToken: p.next, Revision: p.revision}, nil
}

func (x *workloadService) CreateWorkload(ctx context.Context, req *portolanv1.CreateWorkloadRequest) (*portolanv1.Workload, error) {
	return createObject(ctx, x.s, store.Workload, req.GetWorkload(), req)
}

func (x *workloadService) UpdateWorkload(ctx context.Context, req *portolanv1.UpdateWorkloadRequest) (*portolanv1.Workload, error) {
	return writeObject[*portolanv1.Workload](ctx, x.s, updateOf(x.s, store.Workload, req.GetWorkload(), req, req.GetPlanToken()))
}

func (x *workloadService) DeleteWorkload(ctx context.Context, req *portolanv1.DeleteWorkloadRequest) (*emptypb.Empty, error) {
	return deleteObject(ctx, x.s, store.Workload, req)
}

func (x *workloadService) GetWorkloadRevision(ctx context.Context, req *portolanv1.GetWorkloadRevisionRequest) (*portolanv1.WorkloadRevision, error) {
	return getObject[*portolanv1.WorkloadRevision](ctx, x.s, store.Revision, req.GetName())
}

func (x *workloadService) ListWorkloadRevisions(ctx context.Context, req *portolanv1.ListWorkloadRevisionsRequest) (*portolanv1.ListWorkloadRevisionsResponse, error) {
	p, err := listObjects[*portolanv1.WorkloadRevision](ctx, x.s, store.Revision, req.GetParent(), req)
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListWorkloadRevisionsResponse{WorkloadRevisions: p.items, NextPageToken: p.next, Revision: p.revision}, nil
}

func (x *workloadService) GetPlacement(ctx context.Context, req *portolanv1.GetPlacementRequest) (*portolanv1.Placement, error) {
	return getObject[*portolanv1.Placement](ctx, x.s, store.Placement, req.GetName())
}

func (x *workloadService) ListPlacements(ctx context.Context, req *portolanv1.ListPlacementsRequest) (*portolanv1.ListPlacementsResponse, error) {
	p, err := listObjects[*portolanv1.Placement](ctx, x.s, store.Placement, req.GetParent(), req)
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListPlacementsResponse{Placements: p.items, NextPageToken: p.next, Revision: p.revision}, nil
}

func (x *meshService) GetService(ctx context.Context, req *portolanv1.GetServiceRequest) (*portolanv1.Service, error) {
	return getObject[*portolanv1.Service](ctx, x.s, store.Service, req.GetName())
}

func (x *meshService) ListServices(ctx context.Context, req *portolanv1.ListServicesRequest) (*portolanv1.ListServicesResponse, error) {
	p, err := listObjects[*portolanv1.Service](ctx, x.s, store.Service, req.GetParent(), req)
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListServicesResponse{Services: p.items, NextPageToken: p.next, Revision: p.revision}, nil
}

func (x *meshService) CreateService(ctx context.Context, req *portolanv1.CreateServiceRequest) (*portolanv1.Service, error) {
	return createObject(ctx, x.s, store.Service, req.GetService(), req)
}

func (x *meshService) UpdateService(ctx context.Context, req *portolanv1.UpdateServiceRequest) (*portolanv1.Service, error) {
	return updateObject(ctx, x.s, store.Service, req.GetService(), req)
}

func (x *meshService) DeleteService(ctx context.Context, req *portolanv1.DeleteServiceRequest) (*emptypb.Empty, error) {
	return deleteObject(ctx, x.s, store.Service, req)
}

func (x *meshService) GetRoute(ctx context.Context, req *portolanv1.GetRouteRequest) (*portolanv1.Route, error) {
	return getObject[*portolanv1.Route](ctx, x.s, store.Route, req.GetName())
}

func (x *meshService) ListRoutes(ctx context.Context, req *portolanv1.ListRoutesRequest) (*portolanv1.ListRoutesResponse, error) {
	p, err := listObjects[*portolanv1.Route](ctx, x.s, store.Route, req.GetParent(), req)
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListRoutesResponse{Routes: p.items, NextPageToken: p.next, Revision: p.revision}, nil
}

func (x *meshService) CreateRoute(ctx context.Context, req *portolanv1.CreateRouteRequest) (*portolanv1.Route, error) {
	return createObject(ctx, x.s, store.Route, req.GetRoute(), req)
}

func (x *meshService) UpdateRoute(ctx context.Context, req *portolanv1.UpdateRouteRequest) (*portolanv1.Route, error) {
	return updateObject(ctx, x.s, store.Route, req.GetRoute(), req)
}

func (x *meshService) DeleteRoute(ctx context.Context, req *portolanv1.DeleteRouteRequest) (*emptypb.Empty, error) {
	return deleteObject(ctx, x.s, store.Route, req)
}

func (x *policyService) GetPolicyBundle(ctx context.Context, req *portolanv1.GetPolicyBundleRequest) (*portolanv1.PolicyBundle, error) {
	return getObject[*portolanv1.PolicyBundle](ctx, x.s, store.PolicyBundle, req.GetName())
}

func (x *policyService) ListPolicyBundles(ctx context.Context, req *portolanv1.ListPolicyBundlesRequest) (*portolanv1.ListPolicyBundlesResponse, error) {
	p, err := listObjects[*portolanv1.PolicyBundle](ctx, x.s, store.PolicyBundle, req.GetParent(), req)
	if err != nil {
		return nil, err
	}
	return &portolanv1.ListPolicyBundlesResponse{PolicyBundles: p.items, NextPageToken: p.next, Revision: p.revision}, nil
}

func (x *policyService) CreatePolicyBundle(ctx context.Context, req *portolanv1.CreatePolicyBundleRequest) (*portolanv1.PolicyBundle, error) {
	return createObject(ctx, x.s, store.PolicyBundle, req.GetPolicyBundle(), req)
}

func (x *policyService) UpdatePolicyBundle(ctx context.Context, req *portolanv1.UpdatePolicyBundleRequest) (*portolanv1.PolicyBundle, error) {
	return updateObject(ctx, x.s, store.PolicyBundle, req.GetPolicyBundle(), req)
}

func (x *policyService) DeletePolicyBundle(ctx context.Context, req *portolanv1.DeletePolicyBundleRequest) (*emptypb.Empty, error) {
	return deleteObject(ctx, x.s, store.PolicyBundle, req)
}
