package server

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/go-containerregistry/pkg/name"
	"golang.org/x/sync/errgroup"

	"github.com/portolan-io/portolan/federation/admit"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// placed is a container and where it is in the object.
type placed struct {
	field string
	*portolanv1.Container
}

func containersOf(s *portolanv1.WorkloadSpec) []placed {
	var out []placed
	for i, c := range s.GetContainers() {
		out = append(out, placed{fmt.Sprintf("spec.containers[%d]", i), c})
	}
	for i, c := range s.GetInitContainers() {
		out = append(out, placed{fmt.Sprintf("spec.init_containers[%d]", i), c})
	}
	return out
}

func allContainers(s *portolanv1.WorkloadSpec) []*portolanv1.Container {
	return slices.Concat(s.GetContainers(), s.GetInitContainers())
}

// carryImages keeps the digests of images that are written as before: those of
// the revision that the spec names again, else those of the present revision. So
// a scaling never rolls anything, and needs no registry.
func carryImages(next, old object, snap *admit.Snapshot) {
	w, ok := next.(*portolanv1.Workload)
	if !ok {
		return
	}
	before, _ := old.(*portolanv1.Workload)
	from := before.GetSpec()
	if rev := w.GetSpec().GetRevision(); rev != from.GetRevision() {
		from = nil
		if rev != "" {
			from = snap.Revisions[lastID(w.GetName())][rev]
		}
	}
	known := map[[2]string]string{}
	for _, c := range allContainers(from) {
		known[[2]string{c.GetName(), c.GetImage()}] = c.GetResolvedImage()
	}
	for _, c := range allContainers(w.GetSpec()) {
		c.ResolvedImage = known[[2]string{c.GetName(), c.GetImage()}]
	}
}

// imageFaults checks references and registries, before anything is dialled.
func (s *Server) imageFaults(o object) []api.Violation {
	w, ok := o.(*portolanv1.Workload)
	if !ok {
		return nil
	}
	var out []api.Violation
	for _, c := range containersOf(w.GetSpec()) {
		if c.GetImage() == "" {
			continue // admit says so
		}
		if _, err := s.parseImage(c.GetImage()); err != nil {
			out = append(out, api.Violation{Field: c.field + ".image", Message: err.Error()})
		}
	}
	return out
}

func (s *Server) parseImage(image string) (name.Reference, error) {
	ref, err := name.ParseReference(image)
	if err != nil {
		return nil, fmt.Errorf("%q is no image reference: write registry/repository:tag or registry/repository@sha256:…", clip(image))
	}
	if reg := ref.Context().RegistryStr(); !slices.Contains(s.cfg.Registries, reg) {
		return nil, fmt.Errorf("registry %q is not on the fleet's list %v", clip(reg), s.cfg.Registries)
	}
	return ref, nil
}

// resolveImages sets the digest of every image that has none yet, a few at a time.
func (s *Server) resolveImages(ctx context.Context, doing string, w *portolanv1.Workload) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	list := containersOf(w.GetSpec())
	faults := make([]error, len(list))
	for i, c := range list {
		ref, err := s.parseImage(c.GetImage())
		if err != nil {
			return api.InvalidFields(doing, []api.Violation{{Field: c.field + ".image", Message: err.Error()}})
		}
		if d, ok := ref.(name.Digest); ok {
			c.ResolvedImage = d.Name()
		}
		if c.GetResolvedImage() != "" {
			continue
		}
		g.Go(func() error {
			c.ResolvedImage, faults[i] = s.cfg.Resolver.Resolve(ctx, ref.Name())
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	var vs []api.Violation
	for i, err := range faults {
		switch {
		case err == nil:
		case api.KindOf(err) == api.NotFound:
			vs = append(vs, api.Violation{Field: list[i].field + ".image", Message: fmt.Sprintf("the registry has no image %q", list[i].GetImage())})
		default:
			return err
		}
	}
	return api.InvalidFields(doing, vs)
}

// imageFacts tells policy what was found out about images.
func imageFacts(w *portolanv1.Workload) []any {
	var out []any
	for _, c := range containersOf(w.GetSpec()) {
		f := map[string]any{"field": c.field + ".image", "image": c.GetImage(), "resolved": c.GetResolvedImage()}
		if ref, err := name.ParseReference(c.GetImage()); err == nil {
			_, pinned := ref.(name.Digest)
			f["registry"], f["repository"], f["pinned"] = ref.Context().RegistryStr(), ref.Context().RepositoryStr(), pinned
		}
		out = append(out, f)
	}
	return out
}
