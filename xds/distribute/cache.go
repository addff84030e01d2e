package distribute

import (
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/portolan-io/portolan/federation/api"
)

// Defaults of CacheConfig.
const (
	DefaultMaxViews            = 100_000
	DefaultMaxResourcesPerView = 500_000
	defaultMaxHold             = 5 * time.Second
)

// CacheConfig configures a Cache; the zero value serves.
type CacheConfig struct {
	Log *slog.Logger
	// MaxViews and MaxResourcesPerView bound what is kept; what goes beyond is
	// refused with an error in the log and changes nothing.
	MaxViews, MaxResourcesPerView int
	// OnChange is called after the state of a view's subscriber changed: connected,
	// gone, acknowledged, refused. No lock is held; it must return at once, since
	// the stream waits for it.
	OnChange func(view string)
	Rules    Rules
}

// Cache holds what each view is to be told, and what its subscriber has
// acknowledged. A change costs work for the subscribers of the changed
// resources only.
type Cache struct {
	cfg CacheConfig

	mu    sync.RWMutex
	views map[string]*view
}

// NewCache makes an empty cache.
func NewCache(cfg CacheConfig) *Cache {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxViews <= 0 {
		cfg.MaxViews = DefaultMaxViews
	}
	if cfg.MaxResourcesPerView <= 0 {
		cfg.MaxResourcesPerView = DefaultMaxResourcesPerView
	}
	if cfg.Rules.MaxHold <= 0 {
		cfg.Rules.MaxHold = defaultMaxHold
	}
	return &Cache{cfg: cfg, views: map[string]*view{}}
}

// Set replaces the set of one type in the view. Identical content sends nothing.
// The first Set makes the type loaded: before that its subscribers wait without
// an answer. When the watermark is in rs and anything else changed, the
// watermark is sent again even when it is the same.
func (c *Cache) Set(view, typeURL string, rs []*Resource) {
	c.SetAll(view, map[string][]*Resource{typeURL: rs})
}

// SetAll replaces the sets of several types in one step, so that the rules of
// order between types see the whole change.
func (c *Cache) SetAll(view string, sets map[string][]*Resource) {
	n := 0
	for _, rs := range sets {
		n += len(rs)
	}
	if n > c.cfg.MaxResourcesPerView {
		c.cfg.Log.Error("set refused: too many resources in the view", "view", view, "resources", n, "limit", c.cfg.MaxResourcesPerView)
		return
	}
	v := c.lock(view)
	if v == nil {
		return
	}
	defer v.mu.Unlock()
	v.removed = false
	for _, t := range v.orderOf(sets) {
		v.replace(t, sets[t])
	}
	v.pumpAll()
}

// Update changes single resources of a loaded type; on a type that was never Set
// it does nothing, because its subscribers would take a part for the whole.
func (c *Cache) Update(view, typeURL string, put []*Resource, remove []string) {
	v := c.lock(view)
	if v == nil {
		return
	}
	defer v.mu.Unlock()
	t := v.types[typeURL]
	if t == nil || !t.loaded {
		c.cfg.Log.Error("update refused: the type was never set", "view", view, "type", typeURL)
		return
	}
	if len(t.res)+len(put) > c.cfg.MaxResourcesPerView {
		c.cfg.Log.Error("update refused: too many resources in the view", "view", view, "resources", len(t.res)+len(put), "limit", c.cfg.MaxResourcesPerView)
		return
	}
	changed, watermark := false, (*Resource)(nil)
	for _, name := range remove {
		changed = v.drop(typeURL, t, name) || changed
	}
	for _, r := range put {
		if r.Name == api.WatermarkName {
			watermark = r
			continue
		}
		changed = v.put(typeURL, t, r) || changed
	}
	v.mark(typeURL, t, watermark, changed)
	v.pumpAll()
}

// Remove forgets the view and what was acknowledged. Streams stay open and wait
// until the view is Set again.
func (c *Cache) Remove(view string) {
	c.mu.Lock()
	v := c.views[view]
	c.mu.Unlock()
	if v == nil {
		return
	}
	v.mu.Lock()
	v.forget()
	v.mu.Unlock()
	c.collect(v)
}

// Status says what is known of the view's subscriber; false when the view is
// unknown.
func (c *Cache) Status(view string) (Status, bool) {
	c.mu.RLock()
	v := c.views[view]
	c.mu.RUnlock()
	if v == nil {
		return Status{}, false
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.removed && len(v.sessions) == 0 {
		return Status{}, false
	}
	return v.status(), true
}

// Acked gives the version of one resource that the view's subscriber
// acknowledged last; empty when none. Cheaper than Status.
func (c *Cache) Acked(view, typeURL, name string) string {
	c.mu.RLock()
	v := c.views[view]
	c.mu.RUnlock()
	if v == nil {
		return ""
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if t := v.types[typeURL]; t != nil {
		return t.acked[name].version
	}
	return ""
}

// Views lists the views that were Set or have a stream, in order of name.
func (c *Cache) Views() []string {
	c.mu.RLock()
	defer c.mu.RUnlock()
	out := make([]string, 0, len(c.views))
	for name := range c.views {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// lock gives the view, locked, and makes it when it is new; nil when there are
// too many.
func (c *Cache) lock(name string) *view {
	for {
		v := c.view(name)
		if v == nil {
			return nil
		}
		v.mu.Lock()
		if !v.dead {
			return v
		}
		v.mu.Unlock()
	}
}

func (c *Cache) view(name string) *view {
	c.mu.RLock()
	v := c.views[name]
	c.mu.RUnlock()
	if v != nil {
		return v
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if v := c.views[name]; v != nil {
		return v
	}
	if len(c.views) >= c.cfg.MaxViews {
		c.cfg.Log.Error("view refused: too many views", "view", name, "limit", c.cfg.MaxViews)
		return nil
	}
	v = newView(name, &c.cfg.Rules)
	c.views[name] = v
	return v
}

// collect drops a view that nobody needs.
func (c *Cache) collect(v *view) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.sessions) > 0 || !v.removed {
		return
	}
	v.dead = true
	if c.views[v.name] == v {
		delete(c.views, v.name)
	}
}

func (c *Cache) changed(view string) {
	if c.cfg.OnChange != nil {
		c.cfg.OnChange(view)
	}
}
