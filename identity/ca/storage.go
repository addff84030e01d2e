package ca

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/portolan-io/portolan/federation/api"
)

// Storage keeps sealed bytes under a key. cluster/state is one.
type Storage interface {
	// LoadBlob of an absent key is api.NotFound.
	LoadBlob(ctx context.Context, key string) ([]byte, error)
	// SaveBlob with create fails with api.Exists when the key is present.
	SaveBlob(ctx context.Context, key string, data []byte, create bool) error
}

// DirStorage keeps each blob as a file of mode 0600 in dir, which is made with
// mode 0700 at the first write. Files appear whole or not at all. Their names are
// legal keys of a Kubernetes Secret (letters, digits, "-", "_", "."), so that a
// Secret made of the folder can be mounted as the folder.
func DirStorage(dir string) Storage { return dirStorage(dir) }

type dirStorage string

func (d dirStorage) path(key string) string {
	return filepath.Join(string(d), fileName(key)+".sealed")
}

// oldPath is what files were called before names had to be a Secret's keys: with
// a "%", which no name of today has; empty for a key that was always legal.
func (d dirStorage) oldPath(key string) string {
	name := url.PathEscape(key)
	if !strings.Contains(name, "%") {
		return ""
	}
	return filepath.Join(string(d), name+".sealed")
}

// fileName escapes all but letters, digits, "-" and "." as "_" and two hex digits.
func fileName(key string) string {
	var b strings.Builder
	for _, c := range []byte(key) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '.':
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "_%02X", c)
		}
	}
	return b.String()
}

func (d dirStorage) LoadBlob(_ context.Context, key string) ([]byte, error) {
	b, err := os.ReadFile(d.path(key))
	if old := d.oldPath(key); old != "" && errors.Is(err, fs.ErrNotExist) {
		b, err = os.ReadFile(old)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, api.E(api.NotFound, "load "+key, "no such file in %s", string(d))
	}
	if err != nil {
		return nil, api.E(api.Internal, "load "+key, "%w", err)
	}
	return b, nil
}

func (d dirStorage) SaveBlob(_ context.Context, key string, data []byte, create bool) error {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return api.E(api.Internal, "save "+key, "%w", err)
	}
	if old := d.oldPath(key); old != "" && create {
		if _, err := os.Lstat(old); err == nil {
			return api.E(api.Exists, "save "+key, "already in %s", string(d))
		}
	}
	if err := writeFile(d.path(key), data, create); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return api.E(api.Exists, "save "+key, "already in %s", string(d))
		}
		return api.E(api.Internal, "save "+key, "%w", err)
	}
	return nil
}

// LoadOrCreateSealKey reads a sealing key (32 bytes in hex), or makes one. The
// file must be readable by its owner alone, or, as Kubernetes mounts a Secret for
// a pod with an fsGroup, have mode 0440 and a group of this process's. It belongs
// outside the store that holds what it seals.
func LoadOrCreateSealKey(file string) ([]byte, error) {
	doing := "read sealing key " + file
	for {
		info, err := os.Stat(file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			key := make([]byte, sealKeyLen)
			_, _ = rand.Read(key)
			if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
				return nil, api.E(api.Internal, doing, "%w", err)
			}
			err := writeFile(file, []byte(hex.EncodeToString(key)+"\n"), true)
			if errors.Is(err, fs.ErrExist) {
				continue // another process made it first: use that one
			}
			if err != nil {
				return nil, api.E(api.Internal, doing, "%w", err)
			}
			return key, nil
		case err != nil:
			return nil, api.E(api.Internal, doing, "%w", err)
		case info.Mode().Perm()&0o077 != 0 && !ownGroupReads(info):
			return nil, api.E(api.Precondition, doing, "mode %#o lets others read it: chmod 600 it, and consider the key known", info.Mode().Perm())
		}
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, api.E(api.Internal, doing, "%w", err)
		}
		key, err := hex.DecodeString(strings.TrimSpace(string(text)))
		if err != nil || len(key) != sealKeyLen {
			return nil, api.E(api.Precondition, doing, "it does not hold %d bytes in hex", sealKeyLen)
		}
		return key, nil
	}
}

// ownGroupReads: nobody may write the file, and of others only a group reads it in
// which this process is.
func ownGroupReads(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || info.Mode().Perm() != 0o440 {
		return false
	}
	if int(st.Gid) == os.Getegid() {
		return true
	}
	groups, err := os.Getgroups()
	return err == nil && slices.Contains(groups, int(st.Gid))
}

// writeFile makes the file appear whole, with mode 0600; with create it fails
// with fs.ErrExist when there is one.
func writeFile(path string, data []byte, create bool) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if rerr := os.Remove(tmp.Name()); err == nil && rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = rerr
		}
	}()
	if _, err = tmp.Write(data); err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if create {
		err = os.Link(tmp.Name(), path)
	} else {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}
