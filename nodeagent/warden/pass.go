package warden

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/xds/distribute"
	"github.com/portolan-io/portolan/xds/model"
)

// pruneEvery is how often connections that ended are forgotten.
const pruneEvery = 15 * time.Second

// pass looks at the disk and makes what is served follow it. Each step is
// idempotent: what failed is tried again at the next pass.
func (w *Warden) pass(ctx context.Context) {
	fresh := w.reload(ctx)
	wd := w.world.Load()
	if wd == nil {
		return
	}
	if fresh {
		w.review(ctx, wd)
	}
	w.serveAll(ctx, wd, fresh)
	w.tend(ctx)
	if fresh {
		w.mu.Lock()
		w.problems = nacks(w.translation.problems, wd.watermark.GetRevision())
		w.mu.Unlock()
		w.status.changed()
	}
}

// reload reads the newest sound generation when the disk changed; true when
// there is a new world.
func (w *Warden) reload(ctx context.Context) bool {
	seen, err := w.fingerprint()
	if err != nil || (seen == w.seen && w.world.Load() != nil) {
		return false
	}
	saved, broken := w.lastGood.Load()
	for _, s := range saved {
		next, directives, err := w.build(ctx, s.Generation)
		if err != nil {
			broken = errors.Join(broken, err)
			continue
		}
		if broken != nil {
			w.cfg.Log.Error("newest generation is unusable, an older one is served", "error", broken)
		}
		w.seen, w.directives = seen, directives
		w.translation = newTranslation(next.input)
		w.mu.Lock()
		w.degraded = ""
		if broken != nil {
			w.degraded = clip(broken.Error())
		}
		w.mu.Unlock()
		w.world.Store(next)
		return true
	}
	if broken != nil {
		w.cfg.Log.Error("no generation is usable", "error", broken)
		w.mu.Lock()
		w.degraded = clip(broken.Error())
		w.mu.Unlock()
		w.seen = seen
	}
	return false
}

// fingerprint of the generations on disk: each is one file, written once.
func (w *Warden) fingerprint() (string, error) {
	entries, err := os.ReadDir(w.cfg.DataDir + "/lastgood")
	if err != nil {
		return "", fmt.Errorf("look for generations: %w", err)
	}
	var b strings.Builder
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || strings.HasSuffix(e.Name(), ".tmp") {
			continue
		}
		fmt.Fprintf(&b, "%s %d %d;", e.Name(), info.Size(), info.ModTime().UnixNano())
	}
	return b.String(), nil
}

func (w *Warden) build(ctx context.Context, g distribute.Generation) (*world, map[string]parsed, error) {
	directives, watermark, err := parseDirectives(g, w.directives)
	if err != nil {
		return nil, nil, err
	}
	next := newWorld(directives, watermark)
	next.authorizer, next.faults = w.policies.compile(ctx, w.cfg.Compile, next.policies)
	for name, fault := range next.faults {
		w.cfg.Log.Error("policy bundle does not compile", "bundle", name, "error", fault)
	}
	return next, directives, nil
}

func nacks(problems []model.Problem, revision int64) []*linkv1.Nack {
	var out []*linkv1.Nack
	for _, p := range problems {
		message := p.Message
		if p.Field != "" {
			message = p.Field + ": " + message
		}
		out = append(out, &linkv1.Nack{Resource: p.Resource, Message: clip(message), Revision: revision})
	}
	return out
}

// serveAll makes sockets, secrets and configuration of every replica follow the
// world, and ends what is served to those that are gone.
func (w *Warden) serveAll(ctx context.Context, wd *world, fresh bool) {
	w.mu.Lock()
	known := make(map[string]*replica, len(w.replicas))
	maps.Copy(known, w.replicas)
	w.mu.Unlock()
	for id, r := range known {
		if wd.replicas[id] == nil {
			w.mu.Lock()
			delete(w.replicas, id)
			delete(w.views, id)
			w.mu.Unlock()
			w.removeReplica(r)
		}
	}
	ids := make([]string, 0, len(wd.replicas))
	for id := range wd.replicas {
		ids = append(ids, id)
	}
	sort.Strings(ids)
	for _, id := range ids {
		r := known[id]
		if r == nil {
			r = w.addReplica(ctx, id)
		}
		r.assignment = wd.replicas[id]
		w.serveOne(ctx, wd, r, fresh)
	}
	w.conns.forget(func(allocation string) bool { return wd.replicas[allocation] != nil })
}

func (w *Warden) addReplica(ctx context.Context, allocation string) *replica {
	ctx, cancel := context.WithCancel(ctx)
	r := &replica{allocation: allocation, poke: make(chan struct{}, 1), stop: cancel}
	w.mu.Lock()
	w.replicas[allocation] = r
	w.mu.Unlock()
	w.serving.Go(func() { w.confirm(ctx, r) })
	return r
}

func (w *Warden) serveOne(ctx context.Context, wd *world, r *replica, fresh bool) {
	rekeyed := w.refreshKeys(wd, r)
	var fault string
	if r.keys == nil {
		fault = "no identity: " + r.keyFault
	}
	// The content comes before the socket, so that the first to connect is answered.
	if fresh || rekeyed || (r.keys != nil && r.target.digest == "") {
		if err := w.configure(wd, r, w.translation); err != nil {
			w.cfg.Log.Error("proxy not configured", "replica", r.allocation, "error", err)
			fault = clip(err.Error())
		}
	}
	if err := w.ensureSockets(ctx, r); err != nil {
		w.cfg.Log.Error("sockets not served", "replica", r.allocation, "error", err)
		fault = clip(err.Error())
	} else if r.keys != nil {
		if err := w.feedWorkload(wd, r); err != nil {
			w.cfg.Log.Error("workload API not fed", "replica", r.allocation, "error", err)
		}
	}
	v := replicaView{serving: r.listener != nil, identity: r.keys != nil, fault: fault}
	w.mu.Lock()
	changed := w.views[r.allocation] != v
	w.views[r.allocation] = v
	w.mu.Unlock()
	if changed {
		w.status.changed()
	}
}

// review closes connections that the new generation denies.
func (w *Warden) review(ctx context.Context, wd *world) {
	if denied := w.conns.review(ctx, wd); denied > 0 {
		w.sweepAgain = true
	}
	w.sweep(ctx)
}

func (w *Warden) sweep(ctx context.Context) {
	if !w.sweepAgain || w.cfg.Connections == nil {
		return
	}
	w.sweepAgain = false
	if err := w.conns.sweep(ctx, w.cfg.Connections); err != nil {
		w.cfg.Log.Error("denied connections not closed", "error", err)
		w.sweepAgain = true
	}
}

// tend repeats what failed and forgets what ended.
func (w *Warden) tend(ctx context.Context) {
	w.sweep(ctx)
	now := time.Now()
	if w.cfg.Connections == nil || now.Sub(w.pruned) < pruneEvery {
		return
	}
	w.pruned = now
	if err := w.conns.prune(ctx, w.cfg.Connections, now); err != nil {
		w.cfg.Log.Warn("ended connections not forgotten", "error", err)
	}
}

// policyState keeps the last good version of each bundle.
type policyState struct {
	key  string // names and digests of what compiled last
	auth policy.Authorizer
	errs map[string]string
	good map[string]policy.Bundle
}

// compile makes one authorizer of all bundles. A bundle that does not compile is
// replaced by its last good version; without one, what it would govern is denied:
// everything for a guardrail, its tenant's replicas otherwise.
func (s *policyState) compile(ctx context.Context, compile func(context.Context, []policy.Bundle) (policy.Authorizer, error), intents []*linkv1.PolicyIntent) (policy.Authorizer, map[string]string) {
	var key strings.Builder
	bundles := make([]policy.Bundle, 0, len(intents))
	for _, p := range intents {
		fmt.Fprintf(&key, "%s=%s;", p.GetName(), p.GetDigest())
		bundles = append(bundles, policy.Bundle{Name: p.GetName(), Kind: "network", Files: p.GetSpec().GetFiles()})
	}
	if s.auth != nil && key.String() == s.key {
		return s.auth, s.errs
	}
	if s.good == nil {
		s.good = map[string]policy.Bundle{}
	}
	errs := map[string]string{}
	auth, err := compile(ctx, bundles)
	var missing []string
	if err != nil {
		bundles, missing = s.quarantine(ctx, compile, bundles, errs)
		if auth, err = compile(ctx, bundles); err != nil {
			errs["*"] = err.Error()
			auth = denyAll{}
		}
	}
	s.good = make(map[string]policy.Bundle, len(bundles))
	for _, b := range bundles {
		s.good[b.Name] = b
	}
	if len(missing) > 0 {
		auth = withheld{next: auth, bundles: missing}
	}
	s.key, s.auth, s.errs = key.String(), auth, errs
	return auth, errs
}

func (s *policyState) quarantine(ctx context.Context, compile func(context.Context, []policy.Bundle) (policy.Authorizer, error), in []policy.Bundle, errs map[string]string) (out []policy.Bundle, missing []string) {
	for _, b := range in {
		_, err := compile(ctx, []policy.Bundle{b})
		if err == nil {
			out = append(out, b)
			continue
		}
		errs[b.Name] = clip(err.Error())
		if last, ok := s.good[b.Name]; ok {
			out = append(out, last)
		} else {
			missing = append(missing, b.Name)
		}
	}
	return out, missing
}

type denyAll struct{}

func (denyAll) Authorize(context.Context, policy.Network) policy.Decision {
	return deny("portolan.policy", "the policies do not compile together")
}

// withheld denies what bundles without any good version would govern.
type withheld struct {
	next    policy.Authorizer
	bundles []string
}

func (p withheld) Authorize(ctx context.Context, in policy.Network) policy.Decision {
	for _, name := range p.bundles {
		if t := api.TenantOf(name); t == "" || t == in.Destination.Tenant {
			return deny("portolan.policy", "policy bundle "+name+" does not compile")
		}
	}
	return p.next.Authorize(ctx, in)
}
