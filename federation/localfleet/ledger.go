package localfleet

import (
	"encoding/json"
	"os"
	"path/filepath"
	"sync"
)

// ledger remembers on disk which processes were started, so that they are found
// after a kill -9 of the supervisor. Written by the supervisor, read by down.
type ledger struct {
	path string
	mu   sync.Mutex
	data map[string]ledgerEntry
}

type ledgerEntry struct {
	Pid   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, against reused pids
}

func openLedger(path string) *ledger {
	l := &ledger{path: path, data: map[string]ledgerEntry{}}
	if b, err := os.ReadFile(path); err == nil {
		// A torn file means the process died while writing: what it started is
		// found by its namespace then.
		_ = json.Unmarshal(b, &l.data)
	}
	return l
}

func (l *ledger) put(name string, pid int) {
	start, err := startTime(pid)
	if err != nil {
		return // it ended already
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.data[name] = ledgerEntry{Pid: pid, Start: start}
	l.write()
}

func (l *ledger) remove(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.data, name)
	l.write()
}

func (l *ledger) write() {
	b, err := json.Marshal(l.data)
	if err != nil {
		return
	}
	tmp := l.path + ".new"
	if os.MkdirAll(filepath.Dir(l.path), 0o700) == nil && os.WriteFile(tmp, b, 0o600) == nil {
		_ = os.Rename(tmp, l.path)
	}
}

// live gives the entries that still are the same process. One that has ended is
// not, although nobody may have asked how: an orphan's new parent may never do.
func (l *ledger) live() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[string]int{}
	for name, e := range l.data {
		if start, err := startTime(e.Pid); err == nil && start == e.Start && !zombie(e.Pid) {
			out[name] = e.Pid
		}
	}
	return out
}
