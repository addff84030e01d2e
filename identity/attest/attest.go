// Package attest holds the proofs by which a machine gets its first identity:
// one-time join tokens, and the proof that a joiner holds the key of the roots
// that it brings. It owns the text form of both. It never stores a token, never
// decides whether one was used, and does no I/O but reading randomness.
//
// A token is a secret and the SHA-256 of the server's root certificate, so that
// the joiner can authenticate the server before it says anything:
//
//	ptj1_ base64url( secret[32] || SHA-256(root DER)[32] || checksum[4] )
//
// The server keeps only the token's hash.
//
// Concurrency: functions only, safe for concurrent use.
package attest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"regexp"
	"strings"

	"github.com/portolan-io/portolan/federation/api"
)

// Prefix begins every join token; its digit is the version of the form.
const Prefix = "ptj1_"

const (
	secretLen   = 32
	checksumLen = 4
	payloadLen  = secretLen + sha256.Size + checksumLen
)

var (
	encoding = base64.RawURLEncoding.Strict()
	textLen  = len(Prefix) + encoding.EncodedLen(payloadLen)
	tokens   = regexp.MustCompile(`ptj[0-9]+_[A-Za-z0-9_-]*`)
)

// NewToken mints a token for servers under the root whose DER form is given. The
// token goes to the joiner; only the hash (hex SHA-256 of the token) is stored.
func NewToken(rootDER []byte) (token, hash string) {
	p := make([]byte, secretLen, payloadLen)
	// Documented never to fail: the program ends when there is no randomness.
	_, _ = rand.Read(p)
	root := sha256.Sum256(rootDER)
	p = append(p, root[:]...)
	p = append(p, checksum(p)...)
	token = Prefix + encoding.EncodeToString(p)
	return token, Hash(token)
}

// ParseToken checks the form and the checksum of a token, which catches a
// truncated or mistyped one before it is sent anywhere. White space around it is
// ignored. It returns the hash under which the server keeps it, and the SHA-256
// of the server's root. Errors never contain the token.
func ParseToken(token string) (secretHash string, rootHash [32]byte, err error) {
	const doing = "parse join token"
	token = strings.TrimSpace(token)
	body, ok := strings.CutPrefix(token, Prefix)
	if !ok {
		return "", rootHash, api.E(api.Invalid, doing, "it does not begin with %q", Prefix)
	}
	if len(token) != textLen {
		return "", rootHash, api.E(api.Invalid, doing, "it has %d characters, not %d: was it copied in full?", len(token), textLen)
	}
	p, err := encoding.DecodeString(body)
	if err != nil || len(p) != payloadLen {
		return "", rootHash, api.E(api.Invalid, doing, "it has characters that no token has")
	}
	if subtle.ConstantTimeCompare(checksum(p[:payloadLen-checksumLen]), p[payloadLen-checksumLen:]) != 1 {
		return "", rootHash, api.E(api.Invalid, doing, "its checksum does not fit: was it mistyped?")
	}
	copy(rootHash[:], p[secretLen:])
	return Hash(token), rootHash, nil
}

// Hash is the key under which a server keeps a token: hex SHA-256 of its text.
func Hash(token string) string {
	h := sha256.Sum256([]byte(strings.TrimSpace(token)))
	return hex.EncodeToString(h[:])
}

// EqualHash compares two hashes in constant time.
func EqualHash(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// Redact replaces every join token in a text, of any version, so that the text
// may be logged.
func Redact(s string) string {
	if !strings.Contains(s, "ptj") {
		return s
	}
	return tokens.ReplaceAllStringFunc(s, func(t string) string {
		prefix, _, _ := strings.Cut(t, "_")
		return prefix + "_[redacted]"
	})
}

func checksum(p []byte) []byte {
	h := sha256.New()
	h.Write([]byte(Prefix))
	h.Write(p)
	return h.Sum(nil)[:checksumLen]
}

// MakeProof signs SHA-256(token || bundle) with the key of the bundle's first
// root, which binds the token to that key.
func MakeProof(key crypto.Signer, token string, bundle []byte) ([]byte, error) {
	const doing = "prove the key of a bundle"
	d := digest(token, bundle)
	var proof []byte
	var err error
	if _, ok := key.Public().(ed25519.PublicKey); ok {
		proof, err = key.Sign(rand.Reader, d, crypto.Hash(0))
	} else {
		proof, err = key.Sign(rand.Reader, d, crypto.SHA256)
	}
	if err != nil {
		return nil, api.E(api.Internal, doing, "sign: %w", err)
	}
	return proof, nil
}

// VerifyProof checks a proof against the first root of the bundle. The bundle
// must be PEM certificates and nothing else.
func VerifyProof(token string, bundle, proof []byte) error {
	const doing = "verify the proof of a bundle's key"
	block, _ := pem.Decode(bundle)
	if block == nil || block.Type != "CERTIFICATE" {
		return api.E(api.Invalid, doing, "the bundle does not begin with a PEM certificate")
	}
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return api.E(api.Invalid, doing, "parse the first root: %w", err)
	}
	var ok bool
	switch pub := root.PublicKey.(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(pub, digest(token, bundle), proof)
	case ed25519.PublicKey:
		ok = ed25519.Verify(pub, digest(token, bundle), proof)
	default:
		return api.E(api.Invalid, doing, "the first root has a key of type %T: use ECDSA or Ed25519", pub)
	}
	if !ok {
		return api.E(api.Denied, doing, "the signature is not by the key of the bundle's first root over this token and bundle")
	}
	return nil
}

// digest needs no separator: tokens have one length.
func digest(token string, bundle []byte) []byte {
	h := sha256.New()
	h.Write([]byte(strings.TrimSpace(token)))
	h.Write(bundle)
	return h.Sum(nil)
}
