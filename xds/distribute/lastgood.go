package distribute

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api"
)

// DefaultKeep is how many generations LastGood keeps when not told.
const DefaultKeep = 5

const (
	lastGoodMagic  = "PORTGEN1"
	lastGoodSuffix = ".gen"
	// maxGenerationBytes bounds what is read back.
	maxGenerationBytes = 1 << 30
)

// Saved is a generation that was read back.
type Saved struct {
	Generation
	Meta []byte
	// Number counts up with each Save.
	Number uint64
}

// LastGood keeps the newest generations in a directory, one file each, so that
// a reader falls back from a broken one to the one before. One process saves;
// any number of them load.
//
// A file is the magic, SHA-256 of all that follows, the length of meta, meta,
// and the generation as a DeltaDiscoveryResponse. Changed and Removed are not
// kept.
type LastGood struct {
	dir  string
	keep int

	mu   sync.Mutex
	next uint64
}

// OpenLastGood makes the directory when there is none. keep ≤ 0 means DefaultKeep.
func OpenLastGood(dir string, keep int) (*LastGood, error) {
	if keep <= 0 {
		keep = DefaultKeep
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open last good: %w", err)
	}
	l := &LastGood{dir: dir, keep: keep}
	numbers, err := l.numbers()
	if err != nil {
		return nil, err
	}
	if len(numbers) > 0 {
		l.next = numbers[0] + 1
	}
	return l, nil
}

// Save writes a generation durably before it returns.
func (l *LastGood) Save(g Generation, meta []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, err := encodeGeneration(g, meta)
	if err != nil {
		return fmt.Errorf("save generation: %w", err)
	}
	if err := l.write(l.file(l.next), b); err != nil {
		return fmt.Errorf("save generation: %w", err)
	}
	l.next++
	return l.prune()
}

// Load reads what is kept, newest first. The error joins those that are broken
// and were left out; it can come with generations.
func (l *LastGood) Load() ([]Saved, error) { return l.load(l.keep) }

// Latest reads the newest sound generation; api.NotFound when there is none. The
// second error speaks of broken ones that were passed over.
func (l *LastGood) Latest() (Saved, error, error) {
	saved, broken := l.load(1)
	if len(saved) == 0 {
		return Saved{}, api.E(api.NotFound, "load last good", "no sound generation in the directory"), broken
	}
	return saved[0], nil, broken
}

func (l *LastGood) load(limit int) ([]Saved, error) {
	numbers, err := l.numbers()
	if err != nil {
		return nil, err
	}
	var out []Saved
	var broken []error
	for _, n := range numbers {
		if len(out) == limit {
			break
		}
		b, err := readBounded(l.file(n))
		if errors.Is(err, fs.ErrNotExist) {
			continue // pruned meanwhile
		}
		if err == nil {
			var s Saved
			if s, err = decodeGeneration(b); err == nil {
				s.Number = n
				out = append(out, s)
				continue
			}
		}
		broken = append(broken, fmt.Errorf("load generation %s: %w", filepath.Base(l.file(n)), err))
	}
	return out, errors.Join(broken...)
}

func readBounded(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxGenerationBytes {
		return nil, fmt.Errorf("is %d bytes long, more than %d", info.Size(), maxGenerationBytes)
	}
	return os.ReadFile(path)
}

func (l *LastGood) file(n uint64) string {
	return filepath.Join(l.dir, fmt.Sprintf("%020d%s", n, lastGoodSuffix))
}

// numbers of the files that are there, newest first.
func (l *LastGood) numbers() ([]uint64, error) {
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return nil, fmt.Errorf("list last good: %w", err)
	}
	var out []uint64
	for _, e := range entries {
		digits, ok := strings.CutSuffix(e.Name(), lastGoodSuffix)
		if !ok {
			continue
		}
		if n, err := strconv.ParseUint(digits, 10, 64); err == nil {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	slices.Reverse(out)
	return out, nil
}

// write is atomic: a temporary file, synced, renamed, and the directory synced.
func (l *LastGood) write(path string, b []byte) (err error) {
	tmp := filepath.Join(l.dir, "new.tmp")
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	d, err := os.Open(l.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (l *LastGood) prune() error {
	numbers, err := l.numbers()
	if err != nil {
		return err
	}
	for _, n := range numbers[min(l.keep, len(numbers)):] {
		if err := os.Remove(l.file(n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("prune generations: %w", err)
		}
	}
	return nil
}

func encodeGeneration(g Generation, meta []byte) ([]byte, error) {
	m := &discovery.DeltaDiscoveryResponse{}
	names := make([]string, 0, len(g.Resources))
	for name := range g.Resources {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		m.TypeUrl = g.Resources[name].Type
		m.Resources = append(m.Resources, g.Resources[name].message())
	}
	if g.Watermark != nil {
		m.TypeUrl = g.Watermark.Type
		m.Resources = append(m.Resources, g.Watermark.message())
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	payload := binary.BigEndian.AppendUint32(nil, uint32(len(meta)))
	payload = append(append(payload, meta...), body...)
	sum := sha256.Sum256(payload)
	return append(append([]byte(lastGoodMagic), sum[:]...), payload...), nil
}

func decodeGeneration(b []byte) (Saved, error) {
	rest, ok := bytes.CutPrefix(b, []byte(lastGoodMagic))
	if !ok || len(rest) < sha256.Size+4 {
		return Saved{}, errors.New("is no generation, or cut short")
	}
	sum, payload := rest[:sha256.Size], rest[sha256.Size:]
	if got := sha256.Sum256(payload); !bytes.Equal(sum, got[:]) {
		return Saved{}, errors.New("checksum does not match")
	}
	n := binary.BigEndian.Uint32(payload)
	if uint64(n) > uint64(len(payload)-4) {
		return Saved{}, errors.New("length of meta is out of range")
	}
	m := &discovery.DeltaDiscoveryResponse{}
	if err := proto.Unmarshal(payload[4+n:], m); err != nil {
		return Saved{}, fmt.Errorf("parse: %w", err)
	}
	s := Saved{Meta: bytes.Clone(payload[4 : 4+n]), Generation: Generation{Resources: make(map[string]*Resource, len(m.GetResources()))}}
	for _, w := range m.GetResources() {
		r := &Resource{Type: m.GetTypeUrl(), Name: w.GetName(), Version: w.GetVersion(), Body: w.GetResource(), wire: w}
		if r.Name == api.WatermarkName {
			s.Watermark = r
			continue
		}
		s.Resources[r.Name] = r
	}
	return s, nil
}
