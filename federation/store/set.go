package store

import (
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/google/btree"
)

// Set is a sorted set of records, cheap to fork: a fork shares what neither side
// has changed since. One goroutine writes a Set; once it is no longer written,
// any number may read it. It is what mem and Mirror are made of.
type Set struct {
	trees map[Kind]*btree.BTreeG[Record]
	// owned kinds have a tree that no other Set reads.
	owned map[Kind]bool
}

func byName(a, b Record) bool { return a.Name < b.Name }

// NewSet makes an empty Set.
func NewSet() *Set {
	return &Set{trees: map[Kind]*btree.BTreeG[Record]{}, owned: map[Kind]bool{}}
}

// Fork gives a Set with the same content; each of the two may be written without
// the other noticing.
func (s *Set) Fork() *Set {
	s.Freeze()
	return &Set{trees: maps.Clone(s.trees), owned: map[Kind]bool{}}
}

// Freeze ends the ownership of what was written so far. A Set that many
// goroutines are going to read and one to fork is frozen first, because it is
// then no longer changed by being forked.
func (s *Set) Freeze() {
	if len(s.owned) > 0 {
		s.owned = map[Kind]bool{}
	}
}

func (s *Set) tree(kind Kind) *btree.BTreeG[Record] {
	t := s.trees[kind]
	switch {
	case t == nil:
		t = btree.NewG(32, byName)
	case !s.owned[kind]:
		t = t.Clone()
	}
	s.trees[kind], s.owned[kind] = t, true
	return t
}

// Put stores a record.
func (s *Set) Put(r Record) { s.tree(r.Kind).ReplaceOrInsert(r) }

// Delete removes a record, if it is there.
func (s *Set) Delete(kind Kind, name string) { s.tree(kind).Delete(Record{Name: name}) }

// Get gives one record.
func (s *Set) Get(kind Kind, name string) (Record, bool) {
	t := s.trees[kind]
	if t == nil {
		return Record{}, false
	}
	return t.Get(Record{Name: name})
}

// Len counts the records of a kind.
func (s *Set) Len(kind Kind) int {
	if t := s.trees[kind]; t != nil {
		return t.Len()
	}
	return 0
}

// List gives records in order of name.
func (s *Set) List(kind Kind, opts ListOptions) iter.Seq[Record] {
	return func(yield func(Record) bool) {
		t := s.trees[kind]
		if t == nil {
			return
		}
		prefix := opts.Prefix
		if prefix == "" && opts.Tenant != "" && tenantNamed[kind] {
			prefix = "tenants/" + opts.Tenant + "/"
		}
		n := 0
		t.AscendGreaterOrEqual(Record{Name: max(prefix, opts.After)}, func(r Record) bool {
			if !strings.HasPrefix(r.Name, prefix) {
				return false
			}
			if r.Name == opts.After && opts.After != "" || !opts.Matches(r) {
				return true
			}
			n++
			return yield(r) && (opts.Limit <= 0 || n < opts.Limit)
		})
	}
}

// Matches says whether a record passes the options; Limit does not count here.
func (o ListOptions) Matches(r Record) bool {
	return (o.Tenant == "" || r.Tenant == o.Tenant) && among(o.Tenants, r.Tenant) &&
		strings.HasPrefix(r.Name, o.Prefix) && (o.After == "" || r.Name > o.After)
}

// Matches says whether a change passes the filter.
func (f WatchFilter) Matches(r Record) bool {
	if f.Kinds != nil {
		ok := false
		for _, k := range f.Kinds {
			ok = ok || k == r.Kind
		}
		if !ok {
			return false
		}
	}
	return among(f.Tenants, r.Tenant)
}

func among(list []string, s string) bool {
	if list == nil {
		return true
	}
	return slices.Contains(list, s)
}
