package warden

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// replicaConn is a connection that came in on one replica's socket.
type replicaConn struct {
	net.Conn
	allocation string
	onClose    func()
	once       sync.Once
}

func (c *replicaConn) Close() error {
	c.once.Do(c.onClose)
	return c.Conn.Close()
}

// replicaListener is one replica's socket; closing it closes its connections.
type replicaListener struct {
	net.Listener
	allocation string
	inode      uint64

	mu     sync.Mutex
	conns  map[*replicaConn]bool
	closed bool
}

func (l *replicaListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	rc := &replicaConn{Conn: c, allocation: l.allocation}
	rc.onClose = func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.conns, rc)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		_ = c.Close()
		return nil, net.ErrClosed
	}
	l.conns[rc] = true
	return rc, nil
}

// end closes the socket and every connection that came in on it.
func (l *replicaListener) end() {
	_ = l.Close()
	l.mu.Lock()
	l.closed = true
	conns := make([]*replicaConn, 0, len(l.conns))
	for c := range l.conns {
		conns = append(conns, c)
	}
	l.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

// replicaInfo says on whose socket a call came.
type replicaInfo struct {
	credentials.CommonAuthInfo
	allocation string
}

// AuthType implements credentials.AuthInfo.
func (replicaInfo) AuthType() string { return "unix-peer" }

// socketCreds lets only the users in who may use a socket: the kernel says who
// they are.
type socketCreds struct {
	uids    []uint32
	peerUID func(net.Conn) (uint32, error)
}

func (c socketCreds) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	inner, allocation := conn, ""
	if rc, ok := conn.(*replicaConn); ok {
		inner, allocation = rc.Conn, rc.allocation
	}
	uid, err := c.peerUID(inner)
	if err != nil {
		return nil, nil, fmt.Errorf("handshake on socket: %w", err)
	}
	if slices.Contains(c.uids, uid) {
		info := replicaInfo{allocation: allocation}
		info.SecurityLevel = credentials.PrivacyAndIntegrity
		return conn, info, nil
	}
	return nil, nil, fmt.Errorf("handshake on socket: user %d may not use it", uid)
}

func (socketCreds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for servers only")
}

func (socketCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}

func (c socketCreds) Clone() credentials.TransportCredentials { return c }

func (socketCreds) OverrideServerName(string) error { return nil }

// allocationOf is the replica on whose socket the call came.
func allocationOf(ctx context.Context) (string, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", false
	}
	info, ok := p.AuthInfo.(replicaInfo)
	return info.allocation, ok && info.allocation != ""
}
