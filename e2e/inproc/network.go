package inproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"google.golang.org/grpc/test/bufconn"
)

// wires is the network between all processes. Whoever dials and whoever listens
// is on a machine; a way leads over links, each of which can be cut. What is sent
// over a cut link is lost to the eye and arrives when the link heals, as TCP's
// retransmissions do; a dial waits. Nobody is told.
type wires struct {
	mu        sync.Mutex
	listeners map[string]*listener
	cut       map[string]bool
	changed   chan struct{} // closed at the next cut, heal or listen
	ends      map[*end]bool
}

func newWires() *wires {
	return &wires{listeners: map[string]*listener{}, cut: map[string]bool{}, changed: make(chan struct{}), ends: map[*end]bool{}}
}

// change runs f and wakes all who wait.
func (w *wires) change(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	close(w.changed)
	w.changed = make(chan struct{})
}

// Cut cuts a link; heal joins it again.
func (w *wires) Cut(link string)  { w.change(func() { w.cut[link] = true }) }
func (w *wires) Heal(link string) { w.change(func() { delete(w.cut, link) }) }

func (w *wires) open(links []string) (bool, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range links {
		if w.cut[l] {
			return false, w.changed
		}
	}
	return true, nil
}

// passable says whether no link of a way is cut.
func (w *wires) passable(links ...string) bool {
	ok, _ := w.open(links)
	return ok
}

// pass waits until every link is open.
func (w *wires) pass(links []string, gone <-chan struct{}) error {
	for {
		ok, changed := w.open(links)
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-gone:
			return net.ErrClosed
		}
	}
}

// listener is an address of a process.
type listener struct {
	w       *wires
	owner   string
	address string
	conns   chan net.Conn
	once    sync.Once
	closed  chan struct{}
}

// Listen opens an address for a process, in place of what listened there before.
func (w *wires) Listen(owner, address string) net.Listener {
	l := &listener{w: w, owner: owner, address: address, conns: make(chan net.Conn), closed: make(chan struct{})}
	w.change(func() { w.listeners[address] = l })
	return l
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	if l.w.listeners[l.address] == l {
		delete(l.w.listeners, l.address)
	}
	return nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return wireAddr(l.address) }

type wireAddr string

func (wireAddr) Network() string  { return "wires" }
func (a wireAddr) String() string { return string(a) }

// pipe gives both ends of a connection with buffers, as a kernel's.
func pipe(ctx context.Context) (client, server net.Conn, err error) {
	l := bufconn.Listen(64 << 10)
	defer func() { _ = l.Close() }()
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			accepted <- c
		}
		close(accepted)
	}()
	if client, err = l.DialContext(ctx); err != nil {
		return nil, nil, err
	}
	return client, <-accepted, nil
}

// end is one process's end of a connection.
type end struct {
	net.Conn
	w     *wires
	owner string
	links []string
	once  sync.Once
	gone  chan struct{}
}

func (w *wires) end(c net.Conn, owner string, links []string) *end {
	e := &end{Conn: c, w: w, owner: owner, links: links, gone: make(chan struct{})}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ends[e] = true
	return e
}

// Read gives nothing, neither bytes nor an end, while the way is cut.
func (e *end) Read(p []byte) (int, error) {
	n, err := e.Conn.Read(p)
	if werr := e.w.pass(e.links, e.gone); werr != nil {
		return 0, werr
	}
	return n, err
}

func (e *end) Close() error {
	e.once.Do(func() { close(e.gone) })
	e.w.mu.Lock()
	delete(e.w.ends, e)
	e.w.mu.Unlock()
	return e.Conn.Close()
}

var errRefused = errors.New("connection refused")

// Dial connects a process to an address over links. Without a listener it is
// refused; over a cut link it waits.
func (w *wires) Dial(ctx context.Context, owner, address string, links ...string) (net.Conn, error) {
	if err := w.pass(links, ctx.Done()); err != nil {
		return nil, fmt.Errorf("dial %s: %w", address, ctx.Err())
	}
	w.mu.Lock()
	l := w.listeners[address]
	w.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("dial %s: %w", address, errRefused)
	}
	client, server, err := pipe(ctx)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", address, err)
	}
	theirs, ours := w.end(server, l.owner, links), w.end(client, owner, links)
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.closed:
		err = errRefused
	case <-ctx.Done():
		err = ctx.Err()
	}
	_, _ = theirs.Close(), ours.Close()
	return nil, fmt.Errorf("dial %s: %w", address, err)
}

// Kill closes all that a process listens on and talks over, as the kernel does
// when it dies.
func (w *wires) Kill(owner string) {
	w.mu.Lock()
	var closers []io.Closer
	for _, l := range w.listeners {
		if l.owner == owner {
			closers = append(closers, l)
		}
	}
	for e := range w.ends {
		if e.owner == owner {
			closers = append(closers, e)
		}
	}
	w.mu.Unlock()
	for _, c := range closers {
		_ = c.Close()
	}
}
