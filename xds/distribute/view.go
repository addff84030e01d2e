package distribute

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/portolan-io/portolan/federation/api"
)

// view is one consumer's world: the sets it is to hold, and what it said of
// them. Its lock guards its sessions' subscriptions too.
type view struct {
	name  string
	rules *Rules

	mu       sync.Mutex
	types    map[string]*typeSet
	sessions map[*session]struct{}
	// current is the newest stream: only its word counts.
	current *session
	since   time.Time
	nacks   map[Key]Nack
	// suspects were refused before, or were part of a refused response whose bad
	// part is not known: they are sent alone.
	suspects map[Key]struct{}
	removed  bool // by Remove, or never Set
	dead     bool // no longer in the cache
}

// typeSet is one type in a view.
type typeSet struct {
	loaded bool
	res    map[string]entry
	next   uint64
	// acked is what the subscriber holds by its own word; res is nil when only the
	// version is known. It is served to a subscriber that lost it, while the newest
	// version is refused.
	acked map[string]ackedEntry
}

type entry struct {
	res *Resource
	seq uint64 // order of sending
}

type ackedEntry struct {
	version string
	res     *Resource
}

func newView(name string, rules *Rules) *view {
	return &view{
		name: name, rules: rules, types: map[string]*typeSet{}, sessions: map[*session]struct{}{},
		nacks: map[Key]Nack{}, suspects: map[Key]struct{}{}, since: time.Now(), removed: true,
	}
}

func (v *view) set(typeURL string) *typeSet {
	t := v.types[typeURL]
	if t == nil {
		t = &typeSet{res: map[string]entry{}, acked: map[string]ackedEntry{}}
		v.types[typeURL] = t
	}
	return t
}

// orderOf gives the types of sets in the order of the rules.
func (v *view) orderOf(sets map[string][]*Resource) []string {
	types := slices.Collect(maps.Keys(sets))
	slices.SortFunc(types, v.compareTypes)
	return types
}

func (v *view) compareTypes(a, b string) int {
	rank := func(t string) int {
		if i := slices.Index(v.rules.Order, t); i >= 0 {
			return i
		}
		return len(v.rules.Order)
	}
	return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a, b))
}

// replace makes the set of a type exactly rs.
func (v *view) replace(typeURL string, rs []*Resource) {
	t := v.set(typeURL)
	first := !t.loaded
	t.loaded = true
	keep := make(map[string]struct{}, len(rs))
	for _, r := range rs {
		keep[r.Name] = struct{}{}
	}
	changed := false
	for name := range t.res {
		if _, ok := keep[name]; !ok {
			changed = v.drop(typeURL, t, name) || changed
		}
	}
	var watermark *Resource
	for _, r := range rs {
		if r.Name == api.WatermarkName {
			watermark = r
			continue
		}
		changed = v.put(typeURL, t, r) || changed
		e := t.res[r.Name]
		e.seq = t.next // the order is that of the newest set
		t.next++
		t.res[r.Name] = e
	}
	v.mark(typeURL, t, watermark, changed)
	if first {
		for s := range v.sessions {
			s.loaded(typeURL, t)
		}
	}
}

// mark puts the watermark; it is due again when anything before it changed.
func (v *view) mark(typeURL string, t *typeSet, watermark *Resource, changed bool) {
	if watermark == nil {
		return
	}
	v.put(typeURL, t, watermark)
	if changed {
		for s := range v.sessions {
			s.touch(typeURL, watermark.Name, true)
		}
	}
}

// forget unloads every type. What a live subscriber acknowledged stays, since it
// still holds it.
func (v *view) forget() {
	v.removed = true
	v.nacks, v.suspects = map[Key]Nack{}, map[Key]struct{}{}
	if len(v.sessions) == 0 {
		v.types = map[string]*typeSet{}
	}
	for _, t := range v.types {
		t.loaded, t.res = false, map[string]entry{}
	}
	for s := range v.sessions {
		s.unloaded()
	}
}

func (v *view) put(typeURL string, t *typeSet, r *Resource) bool {
	old, ok := t.res[r.Name]
	if ok && old.res.Version == r.Version {
		return false
	}
	if !ok {
		old.seq = t.next
		t.next++
	}
	t.res[r.Name] = entry{res: r, seq: old.seq}
	for s := range v.sessions {
		s.touch(typeURL, r.Name, false)
	}
	return true
}

func (v *view) drop(typeURL string, t *typeSet, name string) bool {
	if _, ok := t.res[name]; !ok {
		return false
	}
	delete(t.res, name)
	key := Key{typeURL, name}
	delete(v.suspects, key)
	delete(v.nacks, key)
	for s := range v.sessions {
		s.touch(typeURL, name, false)
	}
	return true
}

func (v *view) pumpAll() {
	for s := range v.sessions {
		s.pumpAll()
	}
}

func (v *view) status() Status {
	st := Status{Connected: v.current != nil, Since: v.since, Acked: map[Key]string{}}
	for typeURL, t := range v.types {
		for name, a := range t.acked {
			st.Acked[Key{typeURL, name}] = a.version
		}
		if v.current != nil {
			if sub := v.current.types[typeURL]; sub != nil {
				st.Pending += sub.pending()
				continue
			}
			if slices.Contains(v.rules.ByReference, typeURL) {
				continue
			}
		}
		st.Pending += t.unacked()
	}
	for _, n := range v.nacks {
		st.Nacks = append(st.Nacks, n)
	}
	slices.SortFunc(st.Nacks, func(a, b Nack) int { return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name)) })
	return st
}

func (t *typeSet) unacked() int {
	if !t.loaded {
		return 0
	}
	n := 0
	for name, e := range t.res {
		if t.acked[name].version != e.res.Version {
			n++
		}
	}
	for name := range t.acked {
		if _, ok := t.res[name]; !ok {
			n++
		}
	}
	return n
}
