package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// redis speaks as much of Redis's protocol (RESP 2) as the cart needs, over one
// connection that stays open: tests watch what a denial does to it.
type redis struct {
	addr string
	mu   sync.Mutex
	conn net.Conn
	r    *bufio.Reader
}

func (c *redis) do(ctx context.Context, args ...string) (any, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, err := c.try(ctx, args)
	var perr redisError
	if err != nil && !errors.As(err, &perr) {
		// The open connection may have died while idle: once more on a new one.
		v, err = c.try(ctx, args)
	}
	return v, err
}

type redisError string

func (e redisError) Error() string { return "redis: " + string(e) }

func (c *redis) try(ctx context.Context, args []string) (any, error) {
	if c.conn == nil {
		conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "tcp", c.addr)
		if err != nil {
			return nil, err
		}
		c.conn, c.r = conn, bufio.NewReader(conn)
	}
	v, err := c.exchange(args)
	var perr redisError
	if err != nil && !errors.As(err, &perr) {
		_ = c.conn.Close()
		c.conn = nil
	}
	return v, err
}

func (c *redis) exchange(args []string) (any, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(args))
	for _, a := range args {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(a), a)
	}
	if err := c.conn.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(c.conn, b.String()); err != nil {
		return nil, err
	}
	return c.read()
}

func (c *redis) read() (any, error) {
	line, err := c.r.ReadString('\n')
	if err != nil {
		return nil, err
	}
	line = strings.TrimSuffix(line, "\r\n")
	if line == "" {
		return nil, errors.New("empty reply")
	}
	switch line[0] {
	case '+':
		return line[1:], nil
	case '-':
		return nil, redisError(line[1:])
	case ':':
		return strconv.ParseInt(line[1:], 10, 64)
	case '$':
		n, err := strconv.Atoi(line[1:])
		if err != nil || n < 0 || n > 1<<20 {
			return nil, err
		}
		buf := make([]byte, n+2)
		_, err = io.ReadFull(c.r, buf)
		return string(buf[:n]), err
	case '*':
		n, err := strconv.Atoi(line[1:])
		if err != nil || n < 0 || n > 1<<16 {
			return nil, err
		}
		list := make([]any, n)
		for i := range list {
			if list[i], err = c.read(); err != nil {
				return nil, err
			}
		}
		return list, nil
	}
	return nil, fmt.Errorf("unknown reply %q", line)
}

func (c *redis) list(ctx context.Context, key string) ([]any, error) {
	v, err := c.do(ctx, "LRANGE", key, "0", "99")
	l, _ := v.([]any)
	return l, err
}

func (c *redis) push(ctx context.Context, key, item string) (int64, error) {
	v, err := c.do(ctx, "RPUSH", key, item)
	n, _ := v.(int64)
	return n, err
}

func (c *redis) del(ctx context.Context, key string) error {
	_, err := c.do(ctx, "DEL", key)
	return err
}
