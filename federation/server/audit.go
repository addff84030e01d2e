package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/federation/store"
)

const auditPrefix = "auditEntries/"

func auditName(n int64) string { return fmt.Sprintf("%s%019d", auditPrefix, n) }

// AuditHash is the hash of an entry: hex SHA-256 of its deterministic encoding
// without its own hash, so it covers the hash of the entry before.
func AuditHash(e *portolanv1.AuditEntry) (string, error) {
	c := proto.CloneOf(e)
	c.Hash = ""
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("hash audit entry %s: %w", e.GetName(), err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

// VerifyAudit checks that the entries, in order of name, form a chain: each
// hash is right, each covers the one before, and no number is missing. The first
// entry's previous hash is taken as given, so that a part can be checked.
func VerifyAudit(entries []*portolanv1.AuditEntry) error {
	for i, e := range entries {
		want, err := AuditHash(e)
		if err != nil {
			return err
		}
		if want != e.GetHash() {
			return fmt.Errorf("audit entry %s was changed", e.GetName())
		}
		if i == 0 {
			continue
		}
		before := entries[i-1]
		n, err := strconv.ParseInt(lastID(before.GetName()), 10, 64)
		if err != nil || e.GetName() != auditName(n+1) {
			return fmt.Errorf("between audit entries %s and %s something is missing", before.GetName(), e.GetName())
		}
		if e.GetPreviousHash() != before.GetHash() {
			return fmt.Errorf("audit entry %s does not follow %s", e.GetName(), before.GetName())
		}
	}
	return nil
}

// audit appends an entry in the transaction. It returns its number.
func (s *Server) audit(tx store.Tx, e *portolanv1.AuditEntry) (int64, error) {
	n, last, err := lastAudit(tx, s.auditHint.Load())
	if err != nil {
		return 0, err
	}
	e.Name = auditName(n + 1)
	e.Revision = tx.Revision()
	e.PreviousHash = last.GetHash()
	if e.Hash, err = AuditHash(e); err != nil {
		return 0, err
	}
	return n + 1, tx.Put(store.AuditEntry, e.Name, e)
}

// lastAudit finds the newest entry: from a hint on, which another replica may
// have left behind, or by doubling steps when there is none.
func lastAudit(r store.Reader, hint int64) (int64, *portolanv1.AuditEntry, error) {
	if hint > 0 {
		if _, err := r.Get(store.AuditEntry, auditName(hint)); api.KindOf(err) == api.NotFound && err != nil {
			hint = 0
		} else if err != nil {
			return 0, nil, err
		}
	}
	exists := func(n int64) (bool, error) {
		_, err := r.Get(store.AuditEntry, auditName(n))
		if err != nil && api.KindOf(err) == api.NotFound {
			return false, nil
		}
		return err == nil, err
	}
	// Numbers have no gaps: low exists (or is 0), high does not.
	low, step := hint, int64(1)
	high := low + step
	for {
		ok, err := exists(high)
		if err != nil {
			return 0, nil, err
		}
		if !ok {
			break
		}
		low, step = high, step*2
		high = low + step
	}
	for high-low > 1 {
		mid := low + (high-low)/2
		ok, err := exists(mid)
		if err != nil {
			return 0, nil, err
		}
		if ok {
			low = mid
		} else {
			high = mid
		}
	}
	if low == 0 {
		return 0, nil, nil
	}
	rec, err := r.Get(store.AuditEntry, auditName(low))
	if err != nil {
		return 0, nil, err
	}
	e, ok := rec.Message.(*portolanv1.AuditEntry)
	if !ok {
		return 0, nil, api.E(api.Internal, "read the audit log", "record holds a %T", rec.Message)
	}
	return low, e, nil
}

func newEntry(c *caller, now time.Time, resource, tenant string) *portolanv1.AuditEntry {
	return &portolanv1.AuditEntry{
		Time: timestamppb.New(now), Actor: c.actor, Method: c.method, Resource: clip(resource), Tenant: tenant,
		Decision: portolanv1.AuditDecision_AUDIT_DECISION_ALLOWED,
	}
}

// auditAlone writes an entry of something that changes no record of ours.
func (s *Server) auditAlone(ctx context.Context, e *portolanv1.AuditEntry) error {
	var n int64
	_, err := s.cfg.Store.Update(ctx, func(tx store.Tx) error {
		var err error
		n, err = s.audit(tx, proto.CloneOf(e))
		return err
	})
	if err == nil {
		s.auditHint.Store(n)
	}
	return err
}

// refused writes the row of a refused request, bounded per caller. Dry runs leave
// none: they could not have changed anything.
func (s *Server) refused(ctx context.Context, c *caller, method string, req any, why error) {
	if c == nil || !rules[method].audited || !isRefusal(why) {
		return
	}
	if d, ok := req.(interface{ GetValidateOnly() bool }); ok && d.GetValidateOnly() {
		return
	}
	if !s.limits.mayAudit(c.actor) {
		return
	}
	name := target(req)
	tenant := api.TenantOf(name)
	if !c.owns(tenant) {
		tenant = ""
	}
	e := newEntry(c, time.Now(), name, tenant)
	e.Decision = portolanv1.AuditDecision_AUDIT_DECISION_REFUSED
	e.Reason = clipTo(why.Error(), 2048)
	if q, ok := req.(interface{ GetRequestId() string }); ok {
		e.RequestId = clip(q.GetRequestId())
	}
	// The answer goes out whatever becomes of the row, and also when the caller has
	// gone meanwhile.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), clusterCallTimeout)
	defer cancel()
	if err := s.auditAlone(ctx, e); err != nil {
		s.cfg.Log.Error("a refusal was not audited", "method", method, "actor", c.actor, "error", err)
	}
}

func clipTo(s string, n int) string {
	if len(s) > n {
		return strings.ToValidUTF8(s[:n], "") + "…"
	}
	return s
}
