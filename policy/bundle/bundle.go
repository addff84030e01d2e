// Package bundle loads policy bundles from folders, says whether their paths and
// sizes are acceptable, and digests their content. It owns the canonical form of
// a bundle. It never parses Rego: that is policy/opa's.
//
// Concurrency: functions only, safe for concurrent use.
package bundle

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/portolan-io/portolan/federation/api"
)

// Limits of one bundle. Zero fields have the defaults of DefaultLimits.
type Limits struct {
	// Files at most; 64.
	Files int
	// FileBytes and TotalBytes at most; 256 KiB and 1 MiB.
	FileBytes, TotalBytes int
}

// DefaultLimits are those of the API (PolicyBundleSpec.files).
func DefaultLimits() Limits { return Limits{Files: 64, FileBytes: 256 << 10, TotalBytes: 1 << 20} }

func (l Limits) withDefaults() Limits {
	d := DefaultLimits()
	if l.Files == 0 {
		l.Files = d.Files
	}
	if l.FileBytes == 0 {
		l.FileBytes = d.FileBytes
	}
	if l.TotalBytes == 0 {
		l.TotalBytes = d.TotalBytes
	}
	return l
}

const (
	maxPath  = 200
	maxDepth = 8
)

// LoadDir reads the Rego files of a folder and its sub-folders. Other files and
// everything whose name begins with a dot are left out; symbolic links are not
// followed out of the folder.
func LoadDir(dir string, l Limits) (files map[string]string, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, api.E(api.NotFound, "load policy bundle "+dir, "%w", err)
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	return Load(root.FS(), l)
}

// Load reads the Rego files of a file system. Faults are api.Invalid with
// violations.
func Load(fsys fs.FS, l Limits) (map[string]string, error) {
	const doing = "load policy bundle"
	l = l.withDefaults()
	files := map[string]string{}
	err := fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case p != "." && strings.HasPrefix(d.Name(), "."):
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case d.IsDir() || path.Ext(p) != ".rego":
			return nil
		case len(files) == l.Files:
			return api.E(api.Invalid, doing, "more than %d files", l.Files)
		}
		text, err := readFile(fsys, p, l.FileBytes)
		if err != nil {
			return err
		}
		files[p] = text
		return nil
	})
	if err != nil {
		return nil, api.E(kindOf(err), doing, "%w", err)
	}
	if err := api.InvalidFields(doing, Validate(files, l)); err != nil {
		return nil, err
	}
	return files, nil
}

func kindOf(err error) api.Kind {
	if errors.Is(err, fs.ErrNotExist) {
		return api.NotFound
	}
	return api.KindOf(err)
}

func readFile(fsys fs.FS, p string, limit int) (text string, err error) {
	f, err := fsys.Open(p)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return "", err
	}
	if len(b) > limit {
		return "", api.E(api.Invalid, "read "+p, "it has more than %d bytes", limit)
	}
	return string(b), nil
}

// Validate checks number, sizes and paths of files: relative, canonical, ending
// in ".rego".
func Validate(files map[string]string, l Limits) []api.Violation {
	l = l.withDefaults()
	var vs []api.Violation
	if len(files) == 0 {
		vs = append(vs, api.Violation{Field: "spec.files", Message: "no .rego file"})
	}
	if len(files) > l.Files {
		return append(vs, api.Violation{Field: "spec.files", Message: fmt.Sprintf("%d files; at most %d", len(files), l.Files)})
	}
	total := 0
	for _, p := range slices.Sorted(maps.Keys(files)) {
		text := files[p]
		total += len(text)
		if msg := checkPath(p); msg != "" {
			vs = append(vs, api.Violation{Field: Field(p), Message: msg})
		}
		if len(text) > l.FileBytes {
			vs = append(vs, api.Violation{Field: Field(p), Message: fmt.Sprintf("%d bytes; at most %d", len(text), l.FileBytes), File: p})
		}
		if !utf8.ValidString(text) {
			vs = append(vs, api.Violation{Field: Field(p), Message: "not UTF-8", File: p})
		}
	}
	if total > l.TotalBytes {
		vs = append(vs, api.Violation{Field: "spec.files", Message: fmt.Sprintf("%d bytes in all; at most %d", total, l.TotalBytes)})
	}
	return vs
}

// Field is the path of a file in a PolicyBundle.
func Field(file string) string {
	if len(file) > maxPath {
		file = file[:maxPath] + "…"
	}
	return fmt.Sprintf("spec.files[%q]", file)
}

func checkPath(p string) string {
	switch {
	case len(p) > maxPath:
		return fmt.Sprintf("path of %d bytes; at most %d", len(p), maxPath)
	case !fs.ValidPath(p) || p == ".":
		return "not a canonical relative path: use slashes, no empty, '.' or '..' element"
	case strings.Count(p, "/") >= maxDepth:
		return fmt.Sprintf("more than %d folders deep", maxDepth)
	case path.Ext(p) != ".rego":
		return "only .rego files belong into a bundle"
	}
	for _, r := range p {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/", r) {
			return fmt.Sprintf("character %q in the path: use letters, digits, '.', '_', '-' and '/'", r)
		}
	}
	return ""
}

// Digest is "sha256:" and the hash of the canonical content: each file in order
// of its path, path and text each after their length as 64 bits big-endian.
func Digest(files map[string]string) string {
	h := sha256.New()
	field := func(s string) {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(s)))
		h.Write(n[:])
		h.Write([]byte(s))
	}
	for _, p := range slices.Sorted(maps.Keys(files)) {
		field(p)
		field(files[p])
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}
