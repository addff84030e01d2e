package schedule

import "slices"

// scopeKey names a set of replicas: of a workload, of one of its revisions, or
// those that must not share a domain of a key with a workload.
type scopeKey struct {
	kind                       uint8
	tenant, workload, revision string
	key                        string
}

const (
	ofWorkload uint8 = iota
	ofRevision
	avoiding
)

// scope counts its replicas by node (presence) and by the values of columns.
type scope struct {
	id    int32
	key   scopeKey
	nodes []int32
	total int32
	by    []counter
	// against are the scopes of those that avoid this workload; version counts when
	// one became empty or not.
	against []*scope
	version uint64
	target  *scope  // of avoiding
	column  *column // of avoiding; nil over nodes
	refs    int
}

// counter is how many of a scope are on nodes with each value of a column.
type counter struct {
	column *column
	n      []int32
	refs   int
}

// presence is how many of a scope are on one node; at is where the node is in
// scope.nodes.
type presence struct {
	scope *scope
	id    int32
	count int32
	at    int32
}

func (t *Table) scope(k scopeKey) *scope {
	s, ok := t.scopeIndex[k]
	if !ok {
		t.scopeIDs++
		s = &scope{key: k, id: t.scopeIDs}
		t.scopeIndex[k] = s
		if k.kind == avoiding {
			s.target = t.scope(scopeKey{kind: ofWorkload, tenant: k.tenant, workload: k.workload})
			s.target.against = append(s.target.against, s)
			if k.key != NodeKey {
				s.column = t.column(k.key)
				s.column.refs++
				t.count(s, s.column)
			}
		}
	}
	s.refs++
	return s
}

func (t *Table) dropScope(s *scope) {
	if s.refs--; s.refs > 0 {
		return
	}
	delete(t.scopeIndex, s.key)
	if s.target != nil {
		k := slices.Index(s.target.against, s)
		s.target.against = slices.Delete(s.target.against, k, k+1)
		t.dropScope(s.target)
	}
	if s.column != nil {
		t.uncountBy(s, s.column)
		t.dropColumn(s.column)
	}
}

// count makes a scope be counted by a column's values.
func (t *Table) count(s *scope, c *column) {
	for k := range s.by {
		if s.by[k].column == c {
			s.by[k].refs++
			return
		}
	}
	s.by = append(s.by, counter{column: c, refs: 1})
	for _, i := range s.nodes {
		s.by[len(s.by)-1].add(c.of[i], t.countOn(i, s))
	}
}

func (t *Table) uncountBy(s *scope, c *column) {
	k := slices.IndexFunc(s.by, func(x counter) bool { return x.column == c })
	if s.by[k].refs--; s.by[k].refs == 0 {
		s.by = slices.Delete(s.by, k, k+1)
	}
}

func (c *counter) add(value, n int32) {
	for int(value) >= len(c.n) {
		c.n = append(c.n, 0)
	}
	c.n[value] += n
}

func (s *scope) in(c *column, value int32) int32 {
	for k := range s.by {
		if s.by[k].column == c {
			if int(value) < len(s.by[k].n) {
				return s.by[k].n[value]
			}
			return 0
		}
	}
	return 0
}

// shift moves replicas on one node from a value to another.
func (s *scope) shift(c *column, from, to, n int32) {
	for k := range s.by {
		if s.by[k].column == c {
			s.by[k].add(from, -n)
			s.by[k].add(to, n)
		}
	}
}

func (t *Table) countOn(i int32, s *scope) int32 {
	for k := range t.scopes[i] {
		if t.scopes[i][k].id == s.id {
			return t.scopes[i][k].count
		}
	}
	return 0
}

// join adds n replicas (1 or -1) on a node to a scope.
func (t *Table) join(i int32, s *scope, n int32) {
	list := t.scopes[i]
	k := 0
	for k < len(list) && list[k].id != s.id {
		k++
	}
	if k == len(list) {
		list = append(list, presence{scope: s, id: s.id, at: int32(len(s.nodes))})
		s.nodes = append(s.nodes, i)
	}
	list[k].count += n
	for j := range s.by {
		s.by[j].add(s.by[j].column.of[i], n)
	}
	was := s.total
	s.total += n
	if s.target != nil && (was == 0 || s.total == 0) {
		s.target.version++
	}
	if list[k].count == 0 {
		t.leaveNode(s, list[k].at)
		list[k] = list[len(list)-1]
		list = list[:len(list)-1]
	}
	t.scopes[i] = list
}

func (t *Table) leaveNode(s *scope, at int32) {
	last := len(s.nodes) - 1
	moved := s.nodes[last]
	s.nodes[at] = moved
	s.nodes = s.nodes[:last]
	if int(at) == last {
		return
	}
	for k := range t.scopes[moved] {
		if t.scopes[moved][k].id == s.id {
			t.scopes[moved][k].at = at
		}
	}
}
