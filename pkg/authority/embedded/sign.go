package embedded

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded/internal/issue"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// signCounters are looked up once: signing is the hot path.
type signCounters struct{ x509, jwt [4]prometheus.Counter }

func newSignCounters(m *Metrics) (c signCounters) {
	for i, o := range []string{"ok", "refused", "not_ready", "error"} {
		c.x509[i] = m.signed.WithLabelValues(string(kindX509), o)
		c.jwt[i] = m.signed.WithLabelValues(string(kindJWT), o)
	}
	return c
}

func countSign(c *[4]prometheus.Counter, err error) {
	switch {
	case err == nil:
		c[0].Inc()
	case errors.Is(err, authority.ErrRefused), errors.Is(err, ErrInvalid):
		c[1].Inc()
	case errors.Is(err, authority.ErrNotReady):
		c[2].Inc()
	default:
		c[3].Inc()
	}
}

// SignX509 signs for an entry of the registry. ID, DNS names and TTL are the
// registry's; the request's SPIFFE ID must agree. It never waits for the disk.
func (a *Authority) SignX509(ctx context.Context, req authority.X509Request) (_ *authority.X509Issued, err error) {
	defer func() { countSign(&a.count.x509, err) }()
	e, err := a.authorize(ctx, req.EntryID, req.SPIFFEID)
	if err != nil {
		return nil, err
	}
	spki, _, err := issue.PublicKeyFromCSR(req.CSR)
	if err != nil {
		return nil, fmt.Errorf("%w: CSR for entry %s: %w", authority.ErrRefused, req.EntryID, err)
	}
	return a.signLeaf(issue.Leaf{ID: e.SPIFFEID, DNSNames: e.DNSNames, PublicKey: spki}, e.X509SVIDTTL)
}

// authorize finds the entry that a request names.
func (a *Authority) authorize(ctx context.Context, entryID string, id spiffeid.ID) (*entry.Entry, error) {
	if err := a.ready(ctx); err != nil {
		return nil, err
	}
	e, ok := a.Set().Get(entryID)
	switch {
	case entryID == "":
		return nil, fmt.Errorf("%w: missing entry ID", authority.ErrRefused)
	case !ok:
		return nil, fmt.Errorf("%w: entry %q not found or not authorized", authority.ErrRefused, entryID)
	case e.SPIFFEID != id:
		return nil, fmt.Errorf("%w: entry %q is for %s, not for %s", authority.ErrRefused, entryID, e.SPIFFEID, id)
	}
	return e, nil
}

func (a *Authority) ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-a.closed:
		return errClosed
	default:
		return nil
	}
}

// active is the key that signs now.
func (a *Authority) active(k kind, now time.Time) (*slot, error) {
	s := a.journal.Load().of(k).current
	if !s.usable(now) {
		return nil, fmt.Errorf("%w: no %s authority is valid at %s", authority.ErrNotReady, k.name(), now.UTC().Format(time.RFC3339))
	}
	return s, nil
}

func (a *Authority) signLeaf(leaf issue.Leaf, ttl time.Duration) (*authority.X509Issued, error) {
	if ttl <= 0 {
		ttl = a.cfg.DefaultX509SVIDTTL
	}
	issued, err := a.signWithin(ttl, func(ca *issue.Issuer, notBefore, notAfter time.Time) (*issue.Issued, error) {
		leaf.NotBefore, leaf.NotAfter = notBefore, notAfter
		return ca.IssueLeaf(leaf)
	})
	if err != nil {
		return nil, fmt.Errorf("certificate for %s: %w", leaf.ID, err)
	}
	return issued, nil
}

// signWithin has a certificate signed for a validity that lies within the CA's.
func (a *Authority) signWithin(ttl time.Duration, sign func(ca *issue.Issuer, notBefore, notAfter time.Time) (*issue.Issued, error)) (*authority.X509Issued, error) {
	now := time.Now()
	ca, err := a.active(kindX509, now)
	if err != nil {
		return nil, err
	}
	notBefore, notAfter := now.Add(-backdate), now.Add(ttl)
	// Back-dating must not reach behind the CA.
	if notBefore.Before(ca.notBefore) {
		notBefore = ca.notBefore
	}
	if notAfter.After(ca.notAfter) {
		notAfter = ca.notAfter
	}
	issued, err := sign(ca.x509, notBefore, notAfter)
	if err != nil {
		return nil, err
	}
	return &authority.X509Issued{Chain: append([][]byte{issued.DER}, ca.x509.Intermediates()...), NotBefore: issued.NotBefore, NotAfter: issued.NotAfter}, nil
}

// SignJWT signs for an entry of the registry. ID, TTL and the jti claim are the
// registry's; the request's SPIFFE ID must agree. It never waits for the disk.
func (a *Authority) SignJWT(ctx context.Context, req authority.JWTRequest) (_ *authority.JWTIssued, err error) {
	defer func() { countSign(&a.count.jwt, err) }()
	e, err := a.authorize(ctx, req.EntryID, req.SPIFFEID)
	if err != nil {
		return nil, err
	}
	audience := withoutEmpty(req.Audience)
	if len(audience) == 0 {
		return nil, fmt.Errorf("%w: at least one audience is required", authority.ErrRefused)
	}
	return a.signJWT(e.SPIFFEID, audience, e.JWTSVIDTTL, e.JWTSVIDIncludeJTI)
}

func withoutEmpty(audience []string) []string {
	return slices.DeleteFunc(slices.Clone(audience), func(s string) bool { return s == "" })
}

func (a *Authority) signJWT(id spiffeid.ID, audience []string, ttl time.Duration, jti bool) (*authority.JWTIssued, error) {
	now := time.Now().UTC().Truncate(time.Second)
	key, err := a.active(kindJWT, time.Now())
	if err != nil {
		return nil, err
	}
	if ttl <= 0 {
		ttl = a.cfg.DefaultJWTSVIDTTL
	}
	expires := now.Add(ttl)
	if expires.After(key.notAfter) {
		expires = key.notAfter
	}
	claims := issue.JWTClaims{
		Subject: id.String(), Audience: audience, Issuer: a.cfg.JWTIssuer,
		IssuedAt: now.Unix(), ExpiresAt: expires.Unix(),
	}
	if jti {
		random, err := uuid.NewRandom()
		if err != nil {
			return nil, fmt.Errorf("make a jti: %w", err)
		}
		claims.ID = base64URL(random[:])
	}
	token, err := key.jwt.Sign(id, claims)
	if err != nil {
		return nil, fmt.Errorf("JWT-SVID for %s: %w", id, err)
	}
	return &authority.JWTIssued{Token: token, IssuedAt: now, ExpiresAt: expires}, nil
}

// Bundles waits until the bundles are newer than after.
func (a *Authority) Bundles(ctx context.Context, after uint64) (*authority.BundleSet, error) {
	if err := a.ready(ctx); err != nil {
		return nil, err
	}
	book, err := wait(ctx, a, a.bundles, func(b *bundleBook) bool { return b.set.Version > after })
	if err != nil {
		return nil, err
	}
	return book.set, nil
}
