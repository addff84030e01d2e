package schedule

// fragments learns what is usually asked of devices.
type fragments struct{ epoch uint64 }

type fragmentCache struct{ use bool }

func (f *fragments) observe(t *Table, g *Group) {}

func (t *Table) fragment(i int32, x *index) (float64, int) { return 1 - t.load(i, x.ask), -1 }

func (t *Table) fragmentDevice(i int32, a *ask) (int, bool) { return 0, false }
