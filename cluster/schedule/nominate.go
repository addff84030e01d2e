package schedule

import "slices"

// nomination is room that is kept on a node for a replica of a group.
type nomination struct {
	group string
	res   *resolved
	node  string
	slot  int32
	gone  bool // used, or given up for a higher priority, in the batch at hand
}

// Nominate keeps room on a node for one replica of a group; several calls keep
// several. A group finds its own room free.
func (t *Table) Nominate(group string, c *Class, node string) {
	i, ok := t.index[node]
	if !ok {
		return
	}
	n := &nomination{group: group, res: t.resolve(c), node: node, slot: i}
	n.res.refs++
	t.nominations[group] = append(t.nominations[group], n)
	t.keeps[i] = append(t.keeps[i], n)
	t.reserve(n, -1)
	t.touch(i)
}

// Withdraw gives up the room that was kept for a group on a node; all of it when
// node is empty.
func (t *Table) Withdraw(group, node string) {
	for _, n := range slices.Clone(t.nominations[group]) {
		if node == "" || n.node == node {
			t.dropNomination(n)
			if node != "" {
				return
			}
		}
	}
}

// KeptFor gives the groups that room is kept for on a node.
func (t *Table) KeptFor(node string) []string {
	i, ok := t.index[node]
	if !ok || len(t.keeps[i]) == 0 {
		return nil
	}
	var out []string
	for _, n := range t.keeps[i] {
		out = append(out, n.group)
	}
	return out
}

// Nominations is how many replicas of a group have room kept.
func (t *Table) Nominations(group string) int { return len(t.nominations[group]) }

func (t *Table) dropNomination(n *nomination) {
	t.reserve(n, 1)
	list := t.nominations[n.group]
	k := slices.Index(list, n)
	if list = slices.Delete(list, k, k+1); len(list) == 0 {
		delete(t.nominations, n.group)
	} else {
		t.nominations[n.group] = list
	}
	k = slices.Index(t.keeps[n.slot], n)
	t.keeps[n.slot] = slices.Delete(t.keeps[n.slot], k, k+1)
	n.res.refs--
	t.touch(n.slot)
}

// reserve takes the room of a nomination (-1) or gives it back (1). Devices are
// chosen when victims have left theirs: until then they are only counted.
func (t *Table) reserve(n *nomination, sign int64) {
	a := &n.res.c.ask
	if a.address {
		t.freeAddress[n.slot] += int32(sign)
	}
	t.take(n.slot, a, sign)
	t.freeStorage[n.slot] += sign * n.res.c.volumes
	for k := range t.devices[n.slot] {
		d := &t.devices[n.slot][k]
		for j := range a.devices {
			if a.devices[j].takes(d) {
				d.kept += int32(-sign)
				break
			}
		}
	}
}
