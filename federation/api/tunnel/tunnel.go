// Package tunnel carries an HTTP/2 connection over a bidirectional gRPC stream
// of chunks that a lower plane dialled, with the roles reversed: the plane that
// dialled is the server. So an upper plane calls ordinary gRPC services of a
// lower plane, with gRPC's own multiplexing, flow control, deadlines and
// cancellation, and nothing below needs an open port.
//
// The stream's own TLS and the caller's identity on it are what secures it;
// inside there is no second TLS.
package tunnel

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/linkv1"
)

// chunkBytes bounds one message; HTTP/2 frames above are at most 16 KiB.
const chunkBytes = 32 << 10

// Stream is either end of the RPC: a client's or a server's stream of chunks.
type Stream interface {
	Send(*linkv1.Chunk) error
	Recv() (*linkv1.Chunk, error)
	Context() context.Context
}

// conn is a net.Conn over a Stream. One reader and one writer at a time, as
// HTTP/2 transports do.
type conn struct {
	stream Stream
	chunks chan []byte
	rest   []byte
	once   sync.Once
	closed chan struct{}
	// err is how the stream ended; set before closed is closed, nil when this side
	// closed first.
	err error
}

func newConn(s Stream) *conn {
	c := &conn{stream: s, chunks: make(chan []byte), closed: make(chan struct{})}
	go c.receive()
	return c
}

// receive is the stream's only reader: a Recv cannot be interrupted but by the
// stream's end, and a closed connection must not wait for that.
func (c *conn) receive() {
	for {
		m, err := c.stream.Recv()
		if err != nil {
			c.end(err)
			return
		}
		select {
		case c.chunks <- m.GetData():
		case <-c.closed:
			return
		}
	}
}

func (c *conn) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		select {
		case c.rest = <-c.chunks:
		case <-c.closed:
			return 0, io.EOF
		}
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *conn) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		n := min(len(p), chunkBytes)
		// The stream owns the bytes after Send returns only until marshalling, which
		// happens inside Send: no copy is needed.
		if err := c.stream.Send(&linkv1.Chunk{Data: p[:n]}); err != nil {
			_ = c.Close()
			return written, io.ErrClosedPipe
		}
		written += n
		p = p[n:]
	}
	return written, nil
}

func (c *conn) Close() error {
	c.end(nil)
	return nil
}

func (c *conn) end(err error) {
	c.once.Do(func() {
		c.err = err
		close(c.closed)
	})
}

type addr struct{}

func (addr) Network() string { return "tunnel" }
func (addr) String() string  { return "tunnel" }

func (*conn) LocalAddr() net.Addr              { return addr{} }
func (*conn) RemoteAddr() net.Addr             { return addr{} }
func (*conn) SetDeadline(time.Time) error      { return nil }
func (*conn) SetReadDeadline(time.Time) error  { return nil }
func (*conn) SetWriteDeadline(time.Time) error { return nil }

// Serve serves the gRPC server on a stream that this process dialled, until the
// stream ends, the connection in it is closed, or ctx is done. Its error is the
// one with which the stream ended, if it did and with one. The caller cancels the
// stream's context on return.
func Serve(ctx context.Context, s Stream, srv *grpc.Server) error {
	c := newConn(s)
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	l := &oneListener{conn: make(chan net.Conn, 1), done: c.closed}
	l.conn <- c
	// Serve returns when Accept fails, which is when the connection is closed, and at
	// once when the server was stopped before. The server itself may serve other
	// tunnels; it is not stopped here.
	_ = srv.Serve(l)
	_ = c.Close()
	if errors.Is(c.err, io.EOF) {
		return nil
	}
	return c.err
}

type oneListener struct {
	conn chan net.Conn
	done <-chan struct{}
}

func (l *oneListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (*oneListener) Close() error   { return nil }
func (*oneListener) Addr() net.Addr { return addr{} }

// Client gives a gRPC client over a stream that the other side dialled, and a
// channel that is closed when the tunnel is gone. The handler of the stream RPC
// must not return before that.
func Client(s Stream) (*grpc.ClientConn, <-chan struct{}, error) {
	c := newConn(s)
	used := false
	cc, err := grpc.NewClient("passthrough:///tunnel",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(api.MaxMessageBytes), grpc.MaxCallSendMsgSize(api.MaxMessageBytes)),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if used {
				return nil, io.ErrClosedPipe
			}
			used = true
			return c, nil
		}))
	if err != nil {
		return nil, nil, err
	}
	cc.Connect()
	return cc, c.closed, nil
}
