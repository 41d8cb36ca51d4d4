package embedded

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"slices"
	"time"
)

// FromUpstream is kept of an authority that came from upstream.
type FromUpstream struct {
	// NeededUntil is when the last CA that was signed for this authority below
	// it ends; zero: none was.
	NeededUntil time.Time `json:"needed_until,omitzero"`
	// GoneSince is when upstream was first seen without it; zero: it has it.
	GoneSince time.Time `json:"gone_since,omitzero"`
}

// over says whether an authority that upstream has dropped is needed no more.
func (f *FromUpstream) over(now time.Time) bool {
	if f == nil || f.GoneSince.IsZero() {
		return false
	}
	last := f.GoneSince
	if f.NeededUntil.After(last) {
		last = f.NeededUntil
	}
	return now.Sub(last) > pruneSafety
}

// seen is the mark of an authority that upstream has.
func (f *FromUpstream) seen() *FromUpstream {
	if f != nil && f.GoneSince.IsZero() {
		return f
	}
	out := FromUpstream{}
	if f != nil {
		out.NeededUntil = f.NeededUntil
	}
	return &out
}

// missed is the mark of an authority that upstream does not have.
func (f *FromUpstream) missed(now time.Time) *FromUpstream {
	if f == nil || !f.GoneSince.IsZero() {
		return f
	}
	return &FromUpstream{NeededUntil: f.NeededUntil, GoneSince: now.UTC().Truncate(time.Second)}
}

// neededUntil notes in b that there is a CA below a root.
func (b *Bundle) neededUntil(root string, until time.Time) {
	for i, r := range b.X509 {
		if r.authorityID() == root && r.Upstream != nil && until.After(r.Upstream.NeededUntil) {
			b.X509[i].Upstream = &FromUpstream{NeededUntil: until.UTC(), GoneSince: r.Upstream.GoneSince}
		}
	}
}

// add takes what upstream has into b: new authorities, and known ones back.
func (b *Bundle) add(up *UpstreamBundle) {
	for _, r := range up.X509 {
		if slices.Contains(b.Revoked, fingerprint(r.Certificate)) {
			continue
		}
		i := slices.IndexFunc(b.X509, func(have Root) bool { return have.Certificate.Equal(r.Certificate) })
		if i < 0 {
			b.X509 = append(b.X509, Root{Certificate: r.Certificate, Tainted: r.Tainted, Upstream: &FromUpstream{}})
			continue
		}
		b.X509[i].Upstream = b.X509[i].Upstream.seen()
	}
	for _, k := range up.JWT {
		// A second key under a known ID would make one of them unusable.
		i := slices.IndexFunc(b.JWT, func(have JWTKey) bool { return have.ID == k.ID })
		if i < 0 {
			k.Upstream = &FromUpstream{}
			b.JWT = append(b.JWT, k)
			continue
		}
		b.JWT[i].Upstream = b.JWT[i].Upstream.seen()
	}
}

// follow makes b what upstream's bundle asks for: new authorities are added,
// taints taken over, tainted ones that are gone are revoked. Others that are
// gone are marked and pruned when nothing below them is left. isOwn keeps the
// own JWT keys, which upstream may have lost.
func (b *Bundle) follow(up *UpstreamBundle, isOwn func(jwtID string) bool, now time.Time) {
	b.add(up)
	b.X509 = slices.DeleteFunc(b.X509, func(r Root) bool {
		return r.Upstream != nil && r.Tainted && !up.hasRoot(r.Certificate)
	})
	for i, r := range b.X509 {
		if r.Upstream != nil && !up.hasRoot(r.Certificate) {
			b.X509[i].Upstream = r.Upstream.missed(now)
		}
		b.X509[i].Tainted = r.Tainted || up.taintsRoot(r)
	}
	b.JWT = slices.DeleteFunc(b.JWT, func(k JWTKey) bool {
		return k.Upstream != nil && k.Tainted && up.key(k.ID) == nil
	})
	for i, k := range b.JWT {
		theirs := up.key(k.ID)
		switch {
		case theirs != nil:
			b.JWT[i].Tainted = k.Tainted || theirs.Tainted
		case !isOwn(k.ID):
			b.JWT[i].Upstream = k.Upstream.missed(now)
		}
	}
	b.Revoked = slices.DeleteFunc(b.Revoked, func(sum string) bool {
		return !slices.ContainsFunc(up.X509, func(r Root) bool { return fingerprint(r.Certificate) == sum })
	})
}

func (u *UpstreamBundle) hasRoot(c *x509.Certificate) bool {
	return slices.ContainsFunc(u.X509, func(r Root) bool { return r.Certificate.Equal(c) })
}

func (u *UpstreamBundle) taintsRoot(have Root) bool {
	return slices.ContainsFunc(u.X509, func(r Root) bool { return r.Tainted && r.Certificate.Equal(have.Certificate) })
}

func (u *UpstreamBundle) key(id string) *JWTKey {
	if i := slices.IndexFunc(u.JWT, func(k JWTKey) bool { return k.ID == id }); i >= 0 {
		return &u.JWT[i]
	}
	return nil
}

// leave marks all that came from upstream as gone, where there is none any
// more. It says whether that changed anything.
func (b *Bundle) leave(now time.Time) (changed bool) {
	for i, r := range b.X509 {
		b.X509[i].Upstream = r.Upstream.missed(now)
		changed = changed || b.X509[i].Upstream != r.Upstream
	}
	for i, k := range b.JWT {
		b.JWT[i].Upstream = k.Upstream.missed(now)
		changed = changed || b.JWT[i].Upstream != k.Upstream
	}
	return changed
}

func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}
