package embedded

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Root is an X.509 authority of a trust bundle.
type Root struct {
	Certificate *x509.Certificate
	Tainted     bool
	Upstream    *FromUpstream // nil = not from there
}

// JWTKey is a public key that JWT-SVIDs are verified with.
type JWTKey struct {
	ID        string
	PublicKey []byte    // PKIX DER
	ExpiresAt time.Time // zero = not known
	Tainted   bool
	Upstream  *FromUpstream // nil = not from there
}

// Bundle is the trust bundle of one trust domain. Immutable once handed to or
// by the authority.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	X509        []Root
	JWT         []JWTKey
	RefreshHint time.Duration // whole seconds
	Sequence    uint64
	// Revoked are the SHA-256 sums of roots that were revoked here and that
	// upstream still has.
	Revoked []string
}

// bundleState is a stored bundle with what is derived from it.
type bundleState struct {
	row int64
	*Bundle
	spiffe  *spiffebundle.Bundle
	encoded []byte // without frame
}

func (b *Bundle) clone() *Bundle {
	c := *b
	c.X509, c.JWT, c.Revoked = slices.Clone(b.X509), slices.Clone(b.JWT), slices.Clone(b.Revoked)
	return &c
}

// check refuses what could not be stored and read back.
func (b *Bundle) check() error {
	for _, k := range b.JWT {
		if err := checkJWTKey(k); err != nil {
			return err
		}
	}
	if b.RefreshHint < 0 || b.RefreshHint/time.Second > maxSeconds {
		return invalid("failed to convert bundle", fmt.Errorf("refresh hint of %s is out of range", b.RefreshHint))
	}
	return nil
}

// BundleOf is a bundle in go-spiffe's form as it is stored. Equal bundles give
// equal ones: JWT keys, which have no order there, are sorted. A refresh hint
// that is out of range counts as none.
func BundleOf(in *spiffebundle.Bundle) (*Bundle, error) {
	out := &Bundle{TrustDomain: in.TrustDomain()}
	for _, cert := range in.X509Authorities() {
		out.X509 = append(out.X509, Root{Certificate: cert})
	}
	keys := in.JWTAuthorities()
	for _, id := range slices.Sorted(maps.Keys(keys)) {
		der, err := x509.MarshalPKIXPublicKey(keys[id])
		if err != nil {
			return nil, fmt.Errorf("JWT authority %q: %w", id, err)
		}
		out.JWT = append(out.JWT, JWTKey{ID: id, PublicKey: der})
	}
	if hint, ok := in.RefreshHint(); ok && hint > 0 && hint/time.Second <= maxSeconds {
		out.RefreshHint = hint.Truncate(time.Second)
	}
	out.Sequence, _ = in.SequenceNumber()
	return out, nil
}

// authorityID is the lowercase hex of the subject key identifier.
func (r Root) authorityID() string { return hex.EncodeToString(r.Certificate.SubjectKeyId) }

// X509Bundle is the roots alone, to verify with. A tainted one counts until it is
// revoked.
func (b *Bundle) X509Bundle() *x509bundle.Bundle {
	out := x509bundle.New(b.TrustDomain)
	for _, r := range b.X509 {
		out.AddX509Authority(r.Certificate)
	}
	return out
}

// spiffeBundle is the bundle in go-spiffe's form. Tainted authorities are in
// it: they count until they are revoked.
func (b *Bundle) spiffeBundle() (*spiffebundle.Bundle, error) {
	out := spiffebundle.New(b.TrustDomain)
	for _, r := range b.X509 {
		out.AddX509Authority(r.Certificate)
	}
	for _, k := range b.JWT {
		pub, err := x509.ParsePKIXPublicKey(k.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("JWT authority %q: %w", k.ID, err)
		}
		if err := out.AddJWTAuthority(k.ID, pub); err != nil {
			return nil, fmt.Errorf("JWT authority %q: %w", k.ID, err)
		}
	}
	out.SetSequenceNumber(b.Sequence)
	if b.RefreshHint > 0 {
		out.SetRefreshHint(b.RefreshHint)
	}
	return out, nil
}

// newBundleState derives everything from a bundle, which it does not check
// beyond what that takes.
func newBundleState(row int64, b *Bundle) (*bundleState, error) {
	spiffe, err := b.spiffeBundle()
	if err != nil {
		return nil, err
	}
	encoded, err := encodeBundle(b)
	if err != nil {
		return nil, err
	}
	return &bundleState{row: row, Bundle: b, spiffe: spiffe, encoded: encoded}, nil
}

func (s *bundleState) sameContent(o *bundleState) bool { return bytes.Equal(s.encoded, o.encoded) }

func (s *bundleState) change() change { return put(bucketBundles, rowKey(s.row), s.encoded) }

// The stored form.
type (
	bundleRecord struct {
		TrustDomain spiffeid.TrustDomain `json:"trust_domain"`
		X509        []rootRecord         `json:"x509,omitempty"`
		JWT         []jwtKeyRecord       `json:"jwt,omitempty"`
		RefreshHint int64                `json:"refresh_hint,omitempty"` // seconds
		Sequence    uint64               `json:"sequence"`
		Revoked     []string             `json:"revoked,omitempty"` // hex SHA-256
	}
	rootRecord struct {
		DER      []byte        `json:"der"`
		Tainted  bool          `json:"tainted,omitempty"`
		Upstream *FromUpstream `json:"upstream,omitempty"`
	}
	jwtKeyRecord struct {
		ID        string        `json:"id"`
		PublicKey []byte        `json:"public_key"`
		ExpiresAt time.Time     `json:"expires_at,omitzero"`
		Tainted   bool          `json:"tainted,omitempty"`
		Upstream  *FromUpstream `json:"upstream,omitempty"`
	}
)

func encodeBundle(b *Bundle) ([]byte, error) {
	rec := bundleRecord{TrustDomain: b.TrustDomain, RefreshHint: int64(b.RefreshHint / time.Second), Sequence: b.Sequence, Revoked: b.Revoked}
	for _, r := range b.X509 {
		rec.X509 = append(rec.X509, rootRecord{r.Certificate.Raw, r.Tainted, r.Upstream})
	}
	for _, k := range b.JWT {
		rec.JWT = append(rec.JWT, jwtKeyRecord{k.ID, k.PublicKey, k.ExpiresAt.UTC(), k.Tainted, k.Upstream})
	}
	out, err := json.Marshal(rec)
	if err != nil {
		return nil, fmt.Errorf("encode bundle of %s: %w", b.TrustDomain, err)
	}
	return out, nil
}

// maxSeconds keeps stored durations within time.Duration.
const maxSeconds = 1 << 33

func decodeBundle(content []byte) (*Bundle, error) {
	var rec bundleRecord
	if err := unmarshalStrict(content, &rec); err != nil {
		return nil, err
	}
	if rec.TrustDomain.IsZero() {
		return nil, errNoTrustDomain
	}
	if rec.RefreshHint < 0 || rec.RefreshHint > maxSeconds {
		return nil, fmt.Errorf("refresh hint of %d s", rec.RefreshHint)
	}
	b := &Bundle{TrustDomain: rec.TrustDomain, RefreshHint: time.Duration(rec.RefreshHint) * time.Second, Sequence: rec.Sequence, Revoked: rec.Revoked}
	for i, r := range rec.X509 {
		cert, err := x509.ParseCertificate(r.DER)
		if err != nil {
			return nil, fmt.Errorf("X.509 authority %d: %w", i, err)
		}
		b.X509 = append(b.X509, Root{cert, r.Tainted, r.Upstream})
	}
	for _, k := range rec.JWT {
		b.JWT = append(b.JWT, JWTKey(k))
	}
	return b, nil
}
