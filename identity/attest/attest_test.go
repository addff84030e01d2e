package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"
)

func root(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<32, 0), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func TestTokenRoundTrip(t *testing.T) {
	token, hash := NewToken([]byte("root"))
	got, rootHash, err := ParseToken(" " + token + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if !EqualHash(got, hash) || Hash(token+"\n") != hash || len(hash) != 64 {
		t.Errorf("hash %q, minted with %q", got, hash)
	}
	if rootHash != sha256.Sum256([]byte("root")) {
		t.Error("another root")
	}
	if other, _ := NewToken([]byte("root")); other == token {
		t.Error("two tokens are the same")
	}
}

func TestBadTokens(t *testing.T) {
	token, _ := NewToken([]byte("root"))
	flip := func(i int) string {
		c := byte('A')
		if token[i] == c {
			c = 'B'
		}
		return token[:i] + string(c) + token[i+1:]
	}
	bad := map[string]string{
		"empty": "", "prefix only": Prefix, "other version": "ptj2_" + token[len(Prefix):], "short": token[:len(token)-1],
		"long": token + "A", "inner space": token[:20] + " " + token[21:], "padded": token[:len(token)-1] + "=",
	}
	for i := len(Prefix); i < len(token); i++ {
		bad["character "+token[i:i+1]+" changed"] = flip(i)
	}
	for name, tok := range bad {
		_, _, err := ParseToken(tok)
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		if len(tok) > 20 && strings.Contains(err.Error(), tok[len(Prefix):20]) {
			t.Errorf("%s: the error gives the token away: %v", name, err)
		}
	}
}

func TestRedact(t *testing.T) {
	token, _ := NewToken([]byte("root"))
	in := "join with " + token + ", twice: " + token + "; ptj9_x"
	got := Redact(in)
	if want := "join with ptj1_[redacted], twice: ptj1_[redacted]; ptj9_[redacted]"; got != want {
		t.Errorf("%q", got)
	}
	if s := "nothing to hide"; Redact(s) != s {
		t.Error("changed what holds no token")
	}
}

func TestProof(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"ecdsa": ec, "ed25519": ed} {
		t.Run(name, func(t *testing.T) {
			bundle := root(t, key)
			token, _ := NewToken(bundle)
			other, _ := NewToken(bundle)
			proof, err := MakeProof(key, token, bundle)
			if err != nil {
				t.Fatal(err)
			}
			if err := VerifyProof(token+"\n", bundle, proof); err != nil {
				t.Error(err)
			}
			bad := bytes.Clone(proof)
			bad[len(bad)-1] ^= 1
			for what, err := range map[string]error{
				"another token":       VerifyProof(other, bundle, proof),
				"another signature":   VerifyProof(token, bundle, bad),
				"no signature":        VerifyProof(token, bundle, nil),
				"a longer bundle":     VerifyProof(token, append(bytes.Clone(bundle), bundle...), proof),
				"an attacker's root":  VerifyProof(token, append(root(t, ec2(t)), bundle...), proof),
				"no bundle":           VerifyProof(token, nil, proof),
				"a bundle that is no": VerifyProof(token, []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), proof),
			} {
				if err == nil {
					t.Errorf("accepted %s", what)
				}
			}
		})
	}
}

func ec2(t *testing.T) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func FuzzParseToken(f *testing.F) {
	token, _ := NewToken([]byte("root"))
	for _, s := range []string{token, "", Prefix, token[:30], "ptj1_" + strings.Repeat("A", 91), token + "\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		hash, _, err := ParseToken(s)
		if err != nil {
			if hash != "" {
				t.Error("a hash with an error")
			}
			return
		}
		// There is one spelling per token: what parses is what was hashed.
		if hash != Hash(s) || len(strings.TrimSpace(s)) != textLen {
			t.Errorf("%q", s)
		}
		if strings.Contains(Redact("x "+strings.TrimSpace(s)), s[len(Prefix):][:20]) {
			t.Error("not redacted")
		}
	})
}
