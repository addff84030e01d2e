package localfleet

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/client"
)

// gateways of tenant system, which every cluster runs.
//
//go:embed gateways.yaml
var gatewayManifests []byte

// start brings everything up, one step after the other.
func (s *Supervisor) start(ctx context.Context) error {
	var cc *grpc.ClientConn
	defer func() {
		if cc != nil {
			_ = cc.Close()
		}
	}()
	for _, st := range []struct {
		name string
		fn   func() error
	}{
		{"database", func() error { return s.startDatabase(ctx) }},
		{"federation's identity and schema", func() error { return s.bootstrap(ctx) }},
		{"networks of clusters and nodes", func() error { return s.net.up(ctx) }},
		{"registry with the sample's images", func() error {
			s.launch(ctx, s.parts.registry())
			return s.await(ctx, "registry", time.Minute)
		}},
		{"federation", func() error { return s.startFederation(ctx) }},
		{"context of the CLI", func() error {
			var err error
			cc, err = s.context()
			return err
		}},
		{"clusters", func() error { return s.startClusters(ctx, cc) }},
		{"nodes", func() error { return s.startNodes(ctx, cc) }},
		{"gateways and sample", func() error { return s.apply(ctx) }},
		{"sample answers at the ingress", func() error { return s.awaitSample(ctx) }},
		{"every replica is ready", func() error { return s.awaitReplicas(ctx, cc) }},
	} {
		if err := s.step(st.name, st.fn); err != nil {
			return err
		}
	}
	return nil
}

func (s *Supervisor) startDatabase(ctx context.Context) error {
	if err := s.parts.initDatabase(ctx); err != nil {
		return err
	}
	c := s.parts.database()
	// Its log is opened by us, before it drops its rights.
	s.launch(ctx, c)
	if err := s.await(ctx, c.Name, time.Minute); err != nil {
		return err
	}
	return s.parts.createDatabase(ctx)
}

func (s *Supervisor) bootstrap(ctx context.Context) error {
	file, err := s.parts.federationConfig(0)
	if err != nil {
		return err
	}
	var last error
	// The database may take connections before it serves them.
	for range 20 {
		last = s.parts.once(ctx, Command{
			Name: "bootstrap", Path: s.cfg.Tools.Federation, LogFile: s.parts.logFile("bootstrap"),
			Args: []string{"bootstrap", "--config", file, "--admin", "admin", "--out", s.parts.data("pki", "admin")},
		})
		if last == nil {
			break
		}
		if err := pause(ctx, 250*time.Millisecond); err != nil {
			return err
		}
	}
	if last != nil {
		return last
	}
	host, _, _ := strings.Cut(s.cfg.Fleet.RegistryName(), ":")
	return s.parts.once(ctx, Command{
		Name: "registry-certificate", Path: s.cfg.Tools.Federation, LogFile: s.parts.logFile("bootstrap"),
		Args: []string{"issue-server-cert", "--config", file, "--name", host, "--out", s.parts.data("pki", "registry")},
	})
}

func (s *Supervisor) startFederation(ctx context.Context) error {
	for r := range s.cfg.Fleet.Replicas {
		c, err := s.parts.federation(r)
		if err != nil {
			return err
		}
		s.launch(ctx, c)
	}
	for r := range s.cfg.Fleet.Replicas {
		if err := s.await(ctx, fmt.Sprintf("federation-%d", r+1), time.Minute); err != nil {
			return err
		}
	}
	return nil
}

// ContextName is the CLI's context for a local fleet.
const ContextName = "local"

// context writes the CLI's context and dials with it.
func (s *Supervisor) context() (*grpc.ClientConn, error) {
	pki := s.parts.data("pki", "admin")
	c := client.Context{
		Name: ContextName, Addresses: s.cfg.Fleet.FederationAddrs(-1), ServerName: s.cfg.Fleet.ServerName(),
		CertFile: filepath.Join(pki, "cert.pem"), KeyFile: filepath.Join(pki, "key.pem"), BundleFile: filepath.Join(pki, "bundle.pem"),
	}
	f, err := client.Load(s.cfg.Contexts)
	if err != nil {
		return nil, err
	}
	f.Put(c)
	f.Current = c.Name
	if err := f.Save(s.cfg.Contexts); err != nil {
		return nil, err
	}
	return client.Dial(c)
}

// retry calls fn until it succeeds or the limit passes.
func retry(ctx context.Context, limit time.Duration, what string, fn func(context.Context) error) error {
	var last error
	for end := time.Now().Add(limit); time.Now().Before(end); {
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		last = fn(call)
		cancel()
		if last == nil {
			return nil
		}
		if k := api.KindOf(last); k == api.Invalid || k == api.Denied || k == api.Unknown {
			return last
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s not done after %s: %w", what, limit, last)
}

func (s *Supervisor) startClusters(ctx context.Context, cc grpc.ClientConnInterface) error {
	clusters := portolanv1.NewClusterServiceClient(cc)
	for i, c := range s.cfg.Fleet.Clusters {
		labels := map[string]string{"region": c.Region, "provider": c.Provider}
		maps.Copy(labels, c.Labels)
		want := &portolanv1.Cluster{Name: api.ClusterName(c.Name), Labels: labels, Spec: &portolanv1.ClusterSpec{
			Region: c.Region, Zone: c.Zone, Provider: c.Provider,
			CpuCoreHourMicros: int64(c.CPUCoreHour * 1e6), MemoryGibHourMicros: int64(c.MemoryGiBHour * 1e6),
		}}
		err := retry(ctx, 30*time.Second, "registering cluster "+c.Name, func(ctx context.Context) error {
			got, err := clusters.UpdateCluster(ctx, &portolanv1.UpdateClusterRequest{Cluster: want, AllowMissing: true})
			if err != nil || got.GetStatus().GetState() > portolanv1.ClusterState_CLUSTER_STATE_PENDING {
				return err
			}
			t, err := clusters.CreateClusterJoinToken(ctx, &portolanv1.CreateClusterJoinTokenRequest{Name: want.GetName()})
			if err != nil {
				return err
			}
			return os.WriteFile(s.parts.tokenFile(c.Name), []byte(t.GetToken()), 0o600)
		})
		if err != nil {
			return err
		}
		cmd, err := s.parts.cluster(i)
		if err != nil {
			return err
		}
		s.launch(ctx, cmd)
	}
	for _, c := range s.cfg.Fleet.Clusters {
		if err := s.await(ctx, c.Name, time.Minute); err != nil {
			return err
		}
		err := retry(ctx, time.Minute, "joining of cluster "+c.Name, func(ctx context.Context) error {
			_, err := clusters.ListNodes(ctx, &portolanv1.ListNodesRequest{Cluster: api.ClusterName(c.Name)})
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Supervisor) startNodes(ctx context.Context, cc grpc.ClientConnInterface) error {
	clusters := portolanv1.NewClusterServiceClient(cc)
	for i, c := range s.cfg.Fleet.Clusters {
		for j, n := range c.Nodes {
			cmds, err := s.parts.node(i, j)
			if err != nil {
				return err
			}
			if err := s.nodeToken(ctx, clusters, c.Name, n.Name); err != nil {
				return err
			}
			for _, cmd := range cmds {
				s.launch(ctx, cmd)
			}
		}
	}
	for _, c := range s.cfg.Fleet.Clusters {
		err := retry(ctx, time.Minute, "joining of the nodes of "+c.Name, func(ctx context.Context) error {
			r, err := clusters.ListNodes(ctx, &portolanv1.ListNodesRequest{Cluster: api.ClusterName(c.Name)})
			if err != nil {
				return err
			}
			ready := 0
			for _, n := range r.GetNodes() {
				if n.GetReady() {
					ready++
				}
			}
			if ready < len(c.Nodes) {
				return fmt.Errorf("%d of %d nodes are ready", ready, len(c.Nodes))
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// nodeToken writes a fresh join token, also for a node that has joined: its
// certificate lives for two days, and a fleet may lie still for longer. A node
// that has a valid one does not look at the token.
func (s *Supervisor) nodeToken(ctx context.Context, clusters portolanv1.ClusterServiceClient, cluster, node string) error {
	return retry(ctx, 30*time.Second, "a join token for node "+node, func(ctx context.Context) error {
		t, err := clusters.CreateNodeJoinToken(ctx, &portolanv1.CreateNodeJoinTokenRequest{Cluster: api.ClusterName(cluster), Node: node})
		if err != nil {
			return err
		}
		return os.WriteFile(s.parts.tokenFile(node), []byte(t.GetToken()), 0o600)
	})
}

func (s *Supervisor) apply(ctx context.Context) error {
	gw := s.parts.data("config", "gateways.yaml")
	if err := os.WriteFile(gw, gatewayManifests, 0o600); err != nil {
		return err
	}
	return retry(ctx, time.Minute, "applying manifests", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		return s.cfg.Apply(ctx, s.cfg.Contexts, append([]string{gw}, s.cfg.Fleet.Sample.Manifests...))
	})
}

// replicasWithin bounds the wait for the last replicas: the sample answers already,
// and whoever waits can see the rest for themselves.
const replicasWithin = 90 * time.Second

// awaitReplicas waits until every workload has the replicas that it wants. Some
// that are late are no fault of the start.
func (s *Supervisor) awaitReplicas(ctx context.Context, cc grpc.ClientConnInterface) error {
	late := func(ctx context.Context) error {
		r, err := portolanv1.NewWorkloadServiceClient(cc).ListWorkloads(ctx, &portolanv1.ListWorkloadsRequest{PageSize: 1000})
		if err != nil {
			return err
		}
		for _, w := range r.GetWorkloads() {
			if w.GetSpec().GetKind() == portolanv1.WorkloadKind_WORKLOAD_KIND_JOB {
				continue // it ends, today or in an earlier life of this fleet
			}
			if st := w.GetStatus(); st.GetReadyReplicas() < st.GetDesiredReplicas() {
				return fmt.Errorf("%s: %d of %d replicas are ready", w.GetName(), st.GetReadyReplicas(), st.GetDesiredReplicas())
			}
		}
		return nil
	}
	if err := retry(ctx, replicasWithin, "all replicas", late); err != nil {
		s.log.Warn("not every replica is ready", "error", err)
	}
	return ctx.Err()
}

// awaitSample waits until the sample's address answers 200.
func (s *Supervisor) awaitSample(ctx context.Context) error {
	s.launch(ctx, s.parts.ingress())
	if err := s.await(ctx, "ingress", 10*time.Second); err != nil {
		return err
	}
	sample := s.cfg.Fleet.Sample
	if sample.Host == "" {
		return nil
	}
	addr := fmt.Sprintf("127.0.0.1:%d", s.cfg.Fleet.IngressPort)
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	}}}
	return retry(ctx, 5*time.Minute, "the sample", func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s:%d%s", sample.Host, s.cfg.Fleet.IngressPort, sample.Path), nil)
		if err != nil {
			return err
		}
		resp, err := hc.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
}
