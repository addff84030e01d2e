package source

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/portolan-io/portolan/federation/api"
)

// The files of an identity, all of mode 0600. nextFile exists only while a
// rotation is under way: a crash between the two renames leaves a chain whose
// key is still there.
const (
	keyFile    = "key.pem"
	chainFile  = "chain.pem"
	bundleFile = "bundle.pem"
	nextFile   = "next-key.pem"

	maxFile = 1 << 20
)

// WriteDir stores an identity. A reader, or a crash at any point, sees the old
// identity or the new one, never a mixture.
func WriteDir(dir string, id *Identity) error {
	doing := "store the identity in " + dir
	der, err := x509.MarshalPKCS8PrivateKey(id.Key)
	if err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	// A chain left by an interrupted rotation may need the next key that is
	// overwritten now.
	if err := settle(dir); err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	var chain bytes.Buffer
	for _, c := range id.RawChain() {
		chain.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c}))
	}
	files := []struct {
		name string
		data []byte
	}{
		{nextFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})},
		{bundleFile, id.Bundle},
		{chainFile, chain.Bytes()},
	}
	for _, f := range files {
		if f.name == bundleFile && len(f.data) == 0 {
			continue
		}
		if err := writeFile(filepath.Join(dir, f.name), f.data); err != nil {
			return api.E(api.Internal, doing, "%w", err)
		}
	}
	if err := os.Rename(filepath.Join(dir, nextFile), filepath.Join(dir, keyFile)); err != nil {
		return api.E(api.Internal, doing, "%w", err)
	}
	return syncDir(dir)
}

// settle finishes a rotation that was interrupted after its chain was renamed.
func settle(dir string) error {
	chain, err := readPEM(filepath.Join(dir, chainFile), "CERTIFICATE")
	if err != nil {
		return nil //nolint:nilerr // no usable chain needs no key
	}
	if key, err := readKey(filepath.Join(dir, keyFile)); err == nil {
		if _, err := NewIdentity(key, chain, nil); err == nil {
			return nil
		}
	}
	key, err := readKey(filepath.Join(dir, nextFile))
	if err != nil {
		return nil //nolint:nilerr // nothing to finish
	}
	if _, err := NewIdentity(key, chain, nil); err != nil {
		return nil //nolint:nilerr // neither key fits: the chain is lost anyway
	}
	return os.Rename(filepath.Join(dir, nextFile), filepath.Join(dir, keyFile))
}

// ReadDir reads an identity; api.NotFound when there is none. bundle.pem may be
// absent.
func ReadDir(dir string) (*Identity, error) {
	doing := "read the identity in " + dir
	// A rotation may run between two reads: then key and chain do not fit once.
	for attempt := 0; ; attempt++ {
		id, err := readDir(dir)
		switch {
		case err == nil:
			return id, nil
		case errors.Is(err, fs.ErrNotExist):
			return nil, api.E(api.NotFound, doing, "%w", err)
		case !errors.Is(err, errMismatch) || attempt == 3:
			return nil, api.E(api.Precondition, doing, "%w", err)
		}
	}
}

func readDir(dir string) (*Identity, error) {
	chain, err := readPEM(filepath.Join(dir, chainFile), "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	bundle, err := readFile(filepath.Join(dir, bundleFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var last error
	for _, f := range []string{keyFile, nextFile, keyFile} {
		key, err := readKey(filepath.Join(dir, f))
		if err != nil {
			if last == nil || !errors.Is(err, fs.ErrNotExist) {
				last = err
			}
			continue
		}
		id, err := NewIdentity(key, chain, bundle)
		if err == nil || !errors.Is(err, errMismatch) {
			return id, err
		}
		last = err
	}
	return nil, last
}

func readKey(path string) (crypto.Signer, error) {
	blocks, err := readPEM(path, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(blocks[0])
	if err != nil {
		return nil, err
	}
	signer, ok := k.(crypto.Signer)
	if !ok {
		return nil, api.E(api.Invalid, "read "+path, "a key that cannot sign")
	}
	return signer, nil
}

func readPEM(path, typ string) ([][]byte, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	var out [][]byte
	for rest := bytes.TrimSpace(data); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil || b.Type != typ {
			return nil, api.E(api.Invalid, "read "+path, "it holds something else than PEM of type %s", typ)
		}
		out = append(out, b.Bytes)
	}
	if len(out) == 0 {
		return nil, api.E(api.Invalid, "read "+path, "it is empty")
	}
	return out, nil
}

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxFile {
		return nil, api.E(api.Invalid, "read "+path, "it has %d bytes", info.Size())
	}
	return os.ReadFile(path)
}

// writeFile replaces the file whole, with mode 0600.
func writeFile(path string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-*") // mode 0600
	if err != nil {
		return err
	}
	if _, err = tmp.Write(data); err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
