package issue

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/fips140"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // RFC 5280 4.2.1.2 method 1: an identifier, not a signature
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
)

// Sizes of RSA keys that get a certificate, in bits: below is weak, above is a
// way to make the verifier work.
const (
	minRSABits = 2048
	maxRSABits = 8192
)

// KeyType is the kind of a CA or JWT signing key, spelled as SPIRE Server's
// ca_key_type.
type KeyType string

// The key types.
const (
	ECP256  KeyType = "ec-p256"
	ECP384  KeyType = "ec-p384"
	RSA2048 KeyType = "rsa-2048"
	RSA4096 KeyType = "rsa-4096"
)

// Validate says whether k is one of the key types.
func (k KeyType) Validate() error {
	switch k {
	case ECP256, ECP384, RSA2048, RSA4096:
		return nil
	default:
		return fmt.Errorf("key type %q is none of ec-p256, ec-p384, rsa-2048, rsa-4096", string(k))
	}
}

// Generate makes a new private key.
func (k KeyType) Generate() (crypto.Signer, error) {
	switch k {
	case ECP256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case ECP384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	case RSA4096:
		return rsa.GenerateKey(rand.Reader, 4096)
	default:
		return nil, k.Validate()
	}
}

// ParseKey reads a PKCS#8 private key that can sign.
func ParseKey(der []byte) (crypto.Signer, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("parse private key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("private key of type %T cannot sign", key)
	}
	return signer, nil
}

// CheckPublicKey refuses keys too weak to carry an identity and keys made to
// keep verifiers busy.
func CheckPublicKey(pub crypto.PublicKey) error {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		switch pub.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
			return nil
		default:
			return fmt.Errorf("elliptic curve %s is not accepted, use P-256, P-384 or P-521", pub.Curve.Params().Name)
		}
	case *rsa.PublicKey:
		if bits := pub.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return fmt.Errorf("RSA key of %d bits is not accepted, use %d to %d", bits, minRSABits, maxRSABits)
		}
		return nil
	case ed25519.PublicKey:
		return nil
	default:
		return fmt.Errorf("public key of type %T is not accepted", pub)
	}
}

// subjectKeyID is the SHA-1 of the public key's bit string, as SPIRE's; where
// only FIPS 140 algorithms may run, the first 20 bytes of its SHA-256.
func subjectKeyID(spki []byte) ([]byte, error) {
	var info struct {
		Algorithm asn1.RawValue
		PublicKey asn1.BitString
	}
	rest, err := asn1.Unmarshal(spki, &info)
	if err != nil {
		return nil, fmt.Errorf("parse public key: %w", err)
	}
	if len(rest) != 0 {
		return nil, errors.New("parse public key: trailing data")
	}
	if fips140.Enforced() {
		sum := sha256.Sum256(info.PublicKey.Bytes)
		return sum[:20], nil
	}
	sum := sha1.Sum(info.PublicKey.Bytes) //nolint:gosec // see the import
	return sum[:], nil
}

// signingFor is how a CA key signs certificates.
func signingFor(pub crypto.PublicKey) (x509.SignatureAlgorithm, crypto.Hash, error) {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		switch pub.Curve {
		case elliptic.P256():
			return x509.ECDSAWithSHA256, crypto.SHA256, nil
		case elliptic.P384():
			return x509.ECDSAWithSHA384, crypto.SHA384, nil
		}
	case *rsa.PublicKey:
		if err := CheckPublicKey(pub); err != nil {
			return 0, 0, err
		}
		return x509.SHA256WithRSA, crypto.SHA256, nil
	}
	return 0, 0, fmt.Errorf("a key of type %T cannot be a CA key here", pub)
}
