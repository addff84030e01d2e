package etcd

import (
	"bytes"
	"compress/flate"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A record's value is: one byte of form, the first eight bytes of the SHA-256 of
// the content, then the content as the form says.
const (
	formPlain   = 0 // the content
	formFlate   = 1 // the content, deflated
	formChunked = 2 // 4 bytes: number of chunks; they hold a value of another form
)

const (
	headBytes = 9
	// compressFrom is the size from which content is deflated: packs repeat specs.
	compressFrom = 4 << 10
	// maxInline is the greatest value that is not cut.
	maxInline = 512 << 10
	// maxContent bounds what a deflated value may become.
	maxContent = 512 << 20
)

// record is one logical value; nil data deletes it.
type record struct {
	key  string
	data []byte
}

func sum(data []byte) []byte {
	h := sha256.Sum256(data)
	return h[:8]
}

func encode(data []byte) []byte {
	head := append([]byte{formPlain}, sum(data)...)
	if len(data) < compressFrom {
		return append(head, data...)
	}
	var b bytes.Buffer
	head[0] = formFlate
	b.Write(head)
	w, err := flate.NewWriter(&b, flate.BestSpeed)
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil || b.Len() > len(data) {
		head[0] = formPlain
		return append(head, data...)
	}
	return b.Bytes()
}

func decode(value []byte) ([]byte, error) {
	if len(value) < headBytes {
		return nil, fmt.Errorf("%d bytes are no record", len(value))
	}
	data := value[headBytes:]
	switch value[0] {
	case formPlain:
	case formFlate:
		var err error
		data, err = io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(data)), maxContent))
		if err != nil {
			return nil, fmt.Errorf("inflate a record: %w", err)
		}
	default:
		return nil, fmt.Errorf("form %d of a record is not known", value[0])
	}
	if !bytes.Equal(sum(data), value[1:headBytes]) {
		return nil, fmt.Errorf("checksum of a record of %d bytes does not fit", len(data))
	}
	return data, nil
}

// putRecords writes records in as few transactions as the limits allow. One
// record is never half visible; several may be.
func (s *Store) putRecords(ctx context.Context, doing string, recs []record) error {
	var ops []clientv3.Op
	size := 0
	flush := func() error {
		if len(ops) == 0 {
			return nil
		}
		err := s.txn(ctx, doing, ops...)
		ops, size = nil, 0
		return err
	}
	for _, r := range recs {
		add, n, err := s.recordOps(ctx, doing, r)
		if err != nil {
			return err
		}
		if len(ops)+len(add) > s.ops || size+n > maxBatch {
			if err := flush(); err != nil {
				return err
			}
		}
		ops, size = append(ops, add...), size+n
	}
	return flush()
}

// recordOps gives the operations that switch a record to its new content, and
// writes the chunks that it needs beforehand.
func (s *Store) recordOps(ctx context.Context, doing string, r record) ([]clientv3.Op, int, error) {
	chunks := s.key("chunk") + r.key + "/"
	var clear []clientv3.Op
	if r.data == nil {
		if s.chunked[r.key] {
			clear = append(clear, clientv3.OpDelete(chunks, clientv3.WithPrefix()))
		}
		delete(s.chunked, r.key)
		return append(clear, clientv3.OpDelete(r.key)), len(r.key), nil
	}
	v := encode(r.data)
	if len(v) <= maxInline {
		if s.chunked[r.key] {
			clear = append(clear, clientv3.OpDelete(chunks, clientv3.WithPrefix()))
		}
		delete(s.chunked, r.key)
		return append(clear, clientv3.OpPut(r.key, string(v))), len(r.key) + len(v), nil
	}
	h := sha256.Sum256(v)
	version := chunks + hex.EncodeToString(h[:8]) + "/"
	n := 0
	for rest := v; len(rest) > 0; n++ {
		c := rest[:min(len(rest), maxInline)]
		rest = rest[len(c):]
		if err := s.txn(ctx, doing, clientv3.OpPut(version+fmt.Sprintf("%06d", n), string(c))); err != nil {
			return nil, 0, err
		}
	}
	head := append([]byte{formChunked}, h[:8]...)
	head = binary.BigEndian.AppendUint32(head, uint32(n))
	s.chunked[r.key] = true
	return []clientv3.Op{
		clientv3.OpPut(r.key, string(head)),
		clientv3.OpDelete(chunks, clientv3.WithRange(version)),
		clientv3.OpDelete(clientv3.GetPrefixRangeEnd(version), clientv3.WithRange(clientv3.GetPrefixRangeEnd(chunks))),
	}, len(r.key) + len(head), nil
}

// read gives the content of a record's value, collecting its chunks.
func (s *Store) read(ctx context.Context, kv *mvccpb.KeyValue) ([]byte, error) {
	v := kv.Value
	if len(v) == 0 || v[0] != formChunked {
		return decode(v)
	}
	s.chunked[string(kv.Key)] = true
	if len(v) != headBytes+4 {
		return nil, fmt.Errorf("head of %d bytes is no head of chunks", len(v))
	}
	want := int(binary.BigEndian.Uint32(v[headBytes:]))
	kvs, err := s.list(ctx, s.key("chunk")+string(kv.Key)+"/"+hex.EncodeToString(v[1:headBytes])+"/")
	if err != nil {
		return nil, err
	}
	if len(kvs) != want {
		return nil, fmt.Errorf("%d chunks of %d are there", len(kvs), want)
	}
	var b bytes.Buffer
	for _, c := range kvs {
		b.Write(c.Value)
	}
	if !bytes.Equal(sum(b.Bytes()), v[1:headBytes]) {
		return nil, fmt.Errorf("checksum over %d chunks does not fit", want)
	}
	return decode(b.Bytes())
}

// list reads all keys of a prefix in order, page by page.
func (s *Store) list(ctx context.Context, prefix string) ([]*mvccpb.KeyValue, error) {
	var out []*mvccpb.KeyValue
	end := clientv3.GetPrefixRangeEnd(prefix)
	for from := prefix; ; {
		page, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
		r, err := s.client.Get(page, from, clientv3.WithRange(end), clientv3.WithLimit(maxOps))
		cancel()
		if err != nil {
			return nil, fault("read "+strconv.Quote(prefix), err)
		}
		out = append(out, r.Kvs...)
		if !r.More {
			return out, nil
		}
		from = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
}
