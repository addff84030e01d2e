package server

import (
	"context"
	"errors"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/portolan-io/portolan/federation/admit"
	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
)

// The requests that change something, as they are generated.
type (
	createRequest interface {
		proto.Message
		GetValidateOnly() bool
		GetRequestId() string
	}
	updateRequest interface {
		createRequest
		GetUpdateMask() *fieldmaskpb.FieldMask
		GetAllowMissing() bool
	}
	deleteRequest interface {
		createRequest
		GetName() string
		GetEtag() string
		GetAllowMissing() bool
	}
)

type operation string

const (
	opCreate operation = "CREATE"
	opUpdate operation = "UPDATE"
	opDelete operation = "DELETE"
)

// change is one request to write, the same for every kind.
type change struct {
	k     *kindInfo
	c     *caller
	op    operation
	doing string
	name  string
	// object as the user sent it; nil for a deletion.
	object       object
	etag         string
	mask         *fieldmaskpb.FieldMask
	allowMissing bool
	dry          bool
	request      proto.Message
	requestID    string
	// planToken, when given, is of the plan that the user looked at.
	planToken string
	// gap is the offset of a virtual IP that was free on a snapshot; nil when none was
	// looked for.
	gap *uint32
}

// errMoved says that what was decided on is no longer so: decide again.
var errMoved = errors.New("the store moved between decision and commit")

func createObject[T object](ctx context.Context, s *Server, kind store.Kind, o T, req createRequest) (T, error) {
	return writeObject[T](ctx, s, &change{k: s.kinds[kind], op: opCreate, object: o, request: req, dry: req.GetValidateOnly(), requestID: req.GetRequestId()})
}

func updateObject[T object](ctx context.Context, s *Server, kind store.Kind, o T, req updateRequest) (T, error) {
	return writeObject[T](ctx, s, updateOf(s, kind, o, req, ""))
}

func updateOf(s *Server, kind store.Kind, o object, req updateRequest, planToken string) *change {
	return &change{
		k: s.kinds[kind], op: opUpdate, object: o, request: req, dry: req.GetValidateOnly(), requestID: req.GetRequestId(),
		etag: o.GetEtag(), mask: req.GetUpdateMask(), allowMissing: req.GetAllowMissing(), planToken: planToken,
	}
}

func deleteObject(ctx context.Context, s *Server, kind store.Kind, req deleteRequest) (*emptypb.Empty, error) {
	_, err := s.write(ctx, &change{
		k: s.kinds[kind], op: opDelete, name: req.GetName(), request: req, dry: req.GetValidateOnly(), requestID: req.GetRequestId(),
		etag: req.GetEtag(), allowMissing: req.GetAllowMissing(),
	})
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

func writeObject[T object](ctx context.Context, s *Server, ch *change) (T, error) {
	var zero T
	ch.name = ch.object.GetName()
	m, err := s.write(ctx, ch)
	if err != nil {
		return zero, err
	}
	t, ok := m.(T)
	if !ok {
		return zero, api.E(api.Internal, ch.doing, "the result is a %T", m)
	}
	return t, nil
}

var verbs = map[operation]string{opCreate: "create ", opUpdate: "update ", opDelete: "delete "}

// write decides on a snapshot and commits on the present state, again if that
// moved meanwhile.
func (s *Server) write(ctx context.Context, ch *change) (proto.Message, error) {
	if err := s.begin(ctx, ch); err != nil {
		return nil, err
	}
	for range maxTransactionTries {
		d, err := s.decide(ctx, ch)
		if err != nil {
			return nil, err
		}
		if err := s.checkToken(ctx, ch, d); err != nil {
			return nil, err
		}
		if d.result != nil {
			return d.result, nil
		}
		m, err := s.commit(ctx, ch, d)
		switch {
		case errors.Is(err, errCrowded):
			gap, err := s.findGap(ctx, ch.name, time.Now())
			if err != nil {
				return nil, err
			}
			ch.gap = &gap
		case !errors.Is(err, errMoved):
			return m, err
		}
	}
	return nil, api.E(api.Conflict, ch.doing, "others keep changing what this depends on; try again")
}

// decision is what would be written, and on what it rests.
type decision struct {
	// result, when there is nothing to write: a retry, or no change at all.
	result proto.Message
	old    object // nil when there is none
	next   object // nil when it is deleted
	op     operation
	policy string // key of the admission bundles that allowed it
}

// decide runs defaults, validation, image resolution and policy on a snapshot.
func (s *Server) decide(ctx context.Context, ch *change) (*decision, error) {
	d, set, err := s.consider(ctx, ch)
	if err != nil || d.result != nil {
		return d, err
	}
	return d, s.askPolicy(ctx, ch, d, set)
}

// consider runs all of it but policy, and gives the bundles to ask.
func (s *Server) consider(ctx context.Context, ch *change) (*decision, bundleSet, error) {
	d := &decision{op: ch.op}
	var set bundleSet
	_, err := s.cfg.Store.View(ctx, func(r store.Reader) error {
		*d = decision{op: ch.op}
		done, err := s.earlier(r, ch)
		if err != nil || done != nil {
			d.result = done
			return err
		}
		if err := s.prepare(r, ch, d); err != nil || d.result != nil {
			return err
		}
		set, err = admissionBundles(r)
		return err
	})
	if err != nil || d.result != nil {
		return d, set, err
	}
	if w, ok := d.next.(*portolanv1.Workload); ok {
		if err := s.resolveImages(ctx, ch.doing, w); err != nil {
			return nil, set, err
		}
	}
	if b, ok := d.next.(*portolanv1.PolicyBundle); ok {
		if err := api.InvalidFields(ch.doing, s.cfg.Policies.Check(ctx, policyBundle(b))); err != nil {
			return nil, set, err
		}
	}
	d.policy = set.key
	return d, set, nil
}

// prepare makes the next state of the object and validates it; d.result is set
// when nothing would change.
func (s *Server) prepare(r store.Reader, ch *change, d *decision) error {
	old, err := ch.k.get(r, ch.name)
	if err != nil {
		return err
	}
	d.old = old
	if old == nil && ch.op != opCreate {
		if !ch.allowMissing {
			return ch.k.absent(ch.doing)
		}
		if ch.etag != "" {
			return api.E(api.Conflict, ch.doing, "the %s is gone", ch.k.title)
		}
	}
	if old != nil && ch.op == opCreate {
		return api.E(api.Exists, ch.doing, "the %s exists already", ch.k.title)
	}
	if old != nil && ch.etag != "" && ch.etag != old.GetEtag() {
		return api.E(api.Conflict, ch.doing, "the etag is stale: read the %s again", ch.k.title)
	}
	if ch.op == opDelete {
		return s.prepareDelete(r, ch, d)
	}
	if old == nil {
		d.op = opCreate
	}
	next := merge(ch, old)
	snap, err := s.gather(r, next, old, false)
	if err != nil {
		return err
	}
	admit.Defaults(next, snap)
	// Defaults may name more than the user did.
	if snap, err = s.gather(r, next, old, false); err != nil {
		return err
	}
	carryImages(next, old, snap)
	d.next = next
	if err := s.validate(ch, d, snap); err != nil {
		return err
	}
	if old != nil && etagOf(next) == old.GetEtag() {
		d.result, err = newJoiner(r, ch.c, ch.name).join(old)
	}
	return err
}

// validate runs every check that needs no I/O.
func (s *Server) validate(ch *change, d *decision, snap *admit.Snapshot) error {
	in := admit.Input{Object: d.next, Snapshot: snap}
	if d.old != nil {
		in.Old = d.old
	}
	vs := s.constraints(d.next)
	vs = append(vs, s.imageFaults(d.next)...)
	vs = append(vs, admit.Validate(in)...)
	if err := api.InvalidFields(ch.doing, distinct(vs)); err != nil {
		return err
	}
	if d.old == nil {
		return nil
	}
	return precondition(ch.doing, admit.Update(in))
}

func (s *Server) prepareDelete(r store.Reader, ch *change, d *decision) error {
	if d.old == nil {
		d.result = &emptypb.Empty{}
		return nil
	}
	snap, err := s.gather(r, d.old, d.old, true)
	if err != nil {
		return err
	}
	return precondition(ch.doing, admit.Deletion(admit.Input{Old: d.old, Snapshot: snap}))
}

// precondition makes the error of what others need as it is.
func precondition(doing string, vs []api.Violation) error {
	if len(vs) == 0 {
		return nil
	}
	return &api.Error{Kind: api.Precondition, Doing: doing, Violations: vs}
}

// distinct keeps the first violation of each field, so that an edge rule and a
// deeper one do not say the same twice.
func distinct(vs []api.Violation) []api.Violation {
	seen := map[string]bool{}
	var out []api.Violation
	for _, v := range vs {
		if seen[v.Field] {
			continue
		}
		seen[v.Field] = true
		out = append(out, v)
	}
	return out
}

// merge makes the object as the user wants it: name, labels and spec are theirs,
// everything else is carried over.
func merge(ch *change, old object) object {
	var next object
	if old == nil {
		next = newLike(ch.object)
		setValue(next, 1, ch.name)
	} else {
		next = cloneObject(old)
	}
	sent := cloneObject(ch.object)
	clearOutputs(sent)
	if old == nil || len(ch.mask.GetPaths()) == 0 || ch.mask.GetPaths()[0] == "*" {
		setLabels(next, sent)
		setPart(next, fieldSpec, specOf(sent))
		return next
	}
	applyMask(ch.mask, next, sent)
	return next
}

// commit re-checks the decision on the present state and stores it with all that
// goes with it. It gives the object as it now is, or would be in a dry run.
func (s *Server) commit(ctx context.Context, ch *change, d *decision) (proto.Message, error) {
	var result proto.Message
	var entry int64
	now, uid := time.Now(), s.cfg.NewUID()
	fn := func(tx store.Tx) error {
		result, entry = nil, 0
		done, err := s.earlier(tx, ch)
		if err != nil || done != nil {
			result = done
			return err
		}
		if err := s.recheck(tx, ch, d); err != nil {
			return err
		}
		if result, err = s.apply(tx, ch, d, now, uid); err != nil {
			return err
		}
		e := newEntry(ch.c, now, ch.name, api.TenantOf(ch.name))
		e.RequestId = ch.requestID
		if entry, err = s.audit(tx, e); err != nil {
			return err
		}
		return s.remember(tx, ch, result, now)
	}
	if ch.dry {
		_, err := s.cfg.Store.View(ctx, func(r store.Reader) error { return fn(dryTx{r}) })
		return result, err
	}
	if _, err := s.cfg.Store.Update(ctx, fn); err != nil {
		return nil, err
	}
	if entry > 0 {
		s.auditHint.Store(entry)
	}
	return result, nil
}

// recheck says errMoved unless the decision still stands on this state.
func (s *Server) recheck(r store.Reader, ch *change, d *decision) error {
	old, err := ch.k.get(r, ch.name)
	if err != nil {
		return err
	}
	if (old == nil) != (d.old == nil) || old != nil && old.GetRevision() != d.old.GetRevision() {
		return errMoved
	}
	set, err := admissionBundles(r)
	if err != nil {
		return err
	}
	if set.key != d.policy {
		return errMoved
	}
	if d.next == nil {
		return s.prepareDelete(r, ch, &decision{old: old, op: opDelete})
	}
	snap, err := s.gather(r, d.next, old, false)
	if err != nil {
		return err
	}
	return s.validate(ch, d, snap)
}

// apply writes the object and what the server keeps beside it.
func (s *Server) apply(tx store.Tx, ch *change, d *decision, now time.Time, uid string) (proto.Message, error) {
	if d.next == nil {
		if err := s.dropBeside(tx, d.old, now); err != nil {
			return nil, err
		}
		return &emptypb.Empty{}, tx.Delete(ch.k.kind, ch.name)
	}
	next := cloneObject(d.next)
	if d.old == nil {
		setValue(next, fieldUID, uid)
		setValue(next, fieldGeneration, int64(1))
		setTime(next, fieldCreateTime, now)
	} else if !proto.Equal(specOf(next), specOf(d.old)) {
		setValue(next, fieldGeneration, d.old.GetGeneration()+1)
	}
	setTime(next, fieldUpdateTime, now)
	setValue(next, fieldEtag, etagOf(next))
	setValue(next, fieldRevision, tx.Revision())
	if err := s.writeBeside(tx, ch, next, d.old, now); err != nil {
		return nil, err
	}
	if err := tx.Put(ch.k.kind, ch.name, next); err != nil {
		return nil, err
	}
	return newJoiner(tx, ch.c, ch.name).join(next)
}

// dryTx writes nothing.
type dryTx struct{ store.Reader }

func (dryTx) Put(store.Kind, string, proto.Message) error { return nil }
func (dryTx) Delete(store.Kind, string) error             { return nil }
func (dryTx) CheckLease(string, int64) error              { return nil }
