package issue

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// JWTKey signs JWT-SVIDs.
type JWTKey struct {
	id       string
	key      crypto.Signer
	signer   jose.Signer
	notAfter time.Time
}

// JWTClaims is what goes into a JWT-SVID; the names are those of RFC 7519. The
// audience is always an array, also with one member, as SPIRE writes it.
type JWTClaims struct {
	Audience  []string `json:"aud"`
	ExpiresAt int64    `json:"exp"`
	IssuedAt  int64    `json:"iat"`
	Issuer    string   `json:"iss,omitempty"`
	ID        string   `json:"jti,omitempty"`
	Subject   string   `json:"sub"`
}

const (
	keyIDLength   = 32
	keyIDAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
)

// GenerateJWTKey makes a key with a random 32-character key ID.
func GenerateJWTKey(keyType KeyType, notAfter time.Time) (*JWTKey, error) {
	key, err := keyType.Generate()
	if err != nil {
		return nil, fmt.Errorf("make a JWT key: %w", err)
	}
	id, err := newKeyID()
	if err != nil {
		return nil, fmt.Errorf("make a JWT key ID: %w", err)
	}
	return NewJWTKey(id, key, notAfter)
}

func newKeyID() (string, error) {
	id := make([]byte, 0, keyIDLength)
	// Bytes past the last multiple of the alphabet's length would make the
	// first letters likelier.
	const limit = 256 - 256%len(keyIDAlphabet)
	for buf := make([]byte, 2*keyIDLength); ; {
		if _, err := rand.Read(buf); err != nil {
			return "", err
		}
		for _, b := range buf {
			if int(b) >= limit {
				continue
			}
			if id = append(id, keyIDAlphabet[int(b)%len(keyIDAlphabet)]); len(id) == keyIDLength {
				return string(id), nil
			}
		}
	}
}

// NewJWTKey wraps an existing key. It signs and verifies once to prove it.
func NewJWTKey(id string, key crypto.Signer, notAfter time.Time) (*JWTKey, error) {
	if id == "" {
		return nil, errors.New("JWT key has no ID")
	}
	var alg jose.SignatureAlgorithm
	switch pub := key.Public().(type) {
	case *ecdsa.PublicKey:
		switch pub.Curve.Params().BitSize {
		case 256:
			alg = jose.ES256
		case 384:
			alg = jose.ES384
		}
	case *rsa.PublicKey:
		if err := CheckPublicKey(pub); err != nil {
			return nil, err
		}
		alg = jose.RS256
	}
	if alg == "" {
		return nil, fmt.Errorf("a key of type %T cannot sign JWT-SVIDs here", key)
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: id}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, fmt.Errorf("JWT key %s: %w", id, err)
	}
	k := &JWTKey{id: id, key: key, signer: signer, notAfter: notAfter.UTC().Truncate(time.Second)}
	return k, k.prove(alg)
}

func (k *JWTKey) prove(alg jose.SignatureAlgorithm) error {
	token, err := jwt.Signed(k.signer).Claims(JWTClaims{Subject: "self-test"}).Serialize()
	if err != nil {
		return fmt.Errorf("JWT key %s self-test: %w", k.id, err)
	}
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{alg})
	if err != nil {
		return fmt.Errorf("JWT key %s self-test: %w", k.id, err)
	}
	if err := parsed.Claims(k.key.Public(), &JWTClaims{}); err != nil {
		return fmt.Errorf("JWT key %s self-test: %w", k.id, err)
	}
	return nil
}

// ID is the key ID.
func (k *JWTKey) ID() string { return k.id }

// Public is the public key.
func (k *JWTKey) Public() crypto.PublicKey { return k.key.Public() }

// NotAfter is the time until which the key signs, in whole seconds.
func (k *JWTKey) NotAfter() time.Time { return k.notAfter }

// MarshalKey is the private key in PKCS#8, for the state file only.
func (k *JWTKey) MarshalKey() ([]byte, error) { return x509.MarshalPKCS8PrivateKey(k.key) }

// Sign makes a JWT-SVID. It refuses claims that no JWT-SVID may have: no
// subject, no audience, or a life that does not end before the key's.
func (k *JWTKey) Sign(id spiffeid.ID, c JWTClaims) (string, error) {
	switch {
	case id.IsZero() || c.Subject != id.String():
		return "", fmt.Errorf("JWT-SVID subject %q is not %q", c.Subject, id)
	case len(c.Audience) == 0:
		return "", errors.New("JWT-SVID without audience")
	case c.ExpiresAt <= c.IssuedAt:
		return "", errors.New("JWT-SVID that expires before it is issued")
	case c.ExpiresAt > k.notAfter.Unix():
		return "", errors.New("JWT-SVID that outlives its key")
	}
	token, err := jwt.Signed(k.signer).Claims(c).Serialize()
	if err != nil {
		return "", fmt.Errorf("sign: %w", err)
	}
	return token, nil
}
