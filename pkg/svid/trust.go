package svid

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
)

// maxGenerations is how many contents of the own bundle are remembered. They
// change twice in the life of a CA; a stream that is further behind has none of
// today's.
const maxGenerations = 32

// Generation is one content of the own trust bundle: its X.509 or its JWT
// authorities. Equal contents have one number, so that streams need to remember
// no more than that.
type Generation struct {
	Number uint32
	IDs    []string // sorted: subject key IDs in lowercase hex, or JWT key IDs

	sum [sha256.Size]byte
}

// Trust is the content of the own trust bundle now and before. Immutable.
type Trust struct {
	roots, keys []Generation // the present one last
	made        uint32
}

// Roots are the X.509 authorities now; Number 0 = no bundle yet.
func (t *Trust) Roots() Generation { return last(t.roots) }

// Keys are the JWT authorities now.
func (t *Trust) Keys() Generation { return last(t.keys) }

// RootsAt are the X.509 authorities of a generation; nil if it is forgotten.
func (t *Trust) RootsAt(number uint32) []string { return at(t.roots, number) }

// KeysAt are the JWT authorities of a generation; nil if it is forgotten.
func (t *Trust) KeysAt(number uint32) []string { return at(t.keys, number) }

func (t *Trust) current() (roots, keys uint32) { return t.Roots().Number, t.Keys().Number }

func last(all []Generation) Generation {
	if len(all) == 0 {
		return Generation{}
	}
	return all[len(all)-1]
}

func at(all []Generation, number uint32) []string {
	for _, g := range all {
		if g.Number == number {
			return g.IDs
		}
	}
	return nil
}

// With is the trust after a bundle.
func (t *Trust) With(b *spiffebundle.Bundle) *Trust {
	if b == nil {
		return t
	}
	out := &Trust{made: t.made}
	out.roots = out.add(t.roots, rootsGeneration(b))
	out.keys = out.add(t.keys, keysGeneration(b))
	return out
}

// add makes g the present one; a content that was there before keeps its number.
func (t *Trust) add(all []Generation, g Generation) []Generation {
	if i := slices.IndexFunc(all, func(o Generation) bool { return o.sum == g.sum }); i >= 0 {
		return append(slices.Delete(slices.Clone(all), i, i+1), all[i])
	}
	t.made++
	g.Number = t.made
	return append(slices.Clone(all[max(0, len(all)-maxGenerations+1):]), g)
}

func rootsGeneration(b *spiffebundle.Bundle) (g Generation) {
	h := sha256.New()
	for _, c := range b.X509Authorities() {
		sum := sha256.Sum256(c.Raw)
		h.Write(sum[:])
		g.IDs = append(g.IDs, RootID(c))
	}
	h.Sum(g.sum[:0])
	slices.Sort(g.IDs)
	g.IDs = slices.Compact(g.IDs)
	return g
}

func keysGeneration(b *spiffebundle.Bundle) (g Generation) {
	h := sha256.New()
	for id := range b.JWTAuthorities() {
		g.IDs = append(g.IDs, id)
	}
	slices.Sort(g.IDs)
	for _, id := range g.IDs {
		// A key ID stands for one key for ever.
		sum := sha256.Sum256([]byte(id))
		h.Write(sum[:])
	}
	h.Sum(g.sum[:0])
	return g
}

// RootID is what an X.509 authority is called: its subject key ID in lowercase
// hex; one without has a hash.
func RootID(c *x509.Certificate) string {
	if len(c.SubjectKeyId) > 0 {
		return hex.EncodeToString(c.SubjectKeyId)
	}
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// Trust is the content of the own trust bundle, as this node holds it.
func (m *Manager) Trust() *Trust { return m.trust.Load() }

// TrustChanged gets a value after Trust has changed. It is for one reader.
func (m *Manager) TrustChanged() <-chan struct{} { return m.spread }

// Outdated is how many X.509-SVIDs in use hang on an authority that is tainted
// or no longer in the own bundle, and wait for their successors.
func (m *Manager) Outdated() (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.records {
		if r.svid != nil && len(r.groups) > 0 && m.outdatedLocked(r.svid) {
			n++
		}
	}
	return n
}

// takeTrustLocked notes the own bundle's content.
func (m *Manager) takeTrustLocked() {
	if m.bundles == nil {
		return
	}
	old := m.trust.Load()
	now := old.With(m.bundles.Own)
	m.trust.Store(now)
	if a, b := old.current(); a != now.Roots().Number || b != now.Keys().Number {
		signal(m.spread)
	}
}

// outdatedLocked says whether an SVID has to be replaced because of what it
// hangs on: an authority that is tainted, or one that has been revoked, below
// which it verifies nowhere.
func (m *Manager) outdatedLocked(s *X509SVID) bool {
	return m.taintedLocked(s) || m.orphanedLocked(s)
}

func (m *Manager) orphanedLocked(s *X509SVID) bool {
	if m.bundles == nil || m.bundles.Own == nil {
		return false
	}
	roots := m.bundles.Own.X509Authorities()
	top := s.Certificates[len(s.Certificates)-1]
	if len(roots) == 0 || len(top.AuthorityKeyId) == 0 {
		return false // nothing to go by
	}
	id := hex.EncodeToString(top.AuthorityKeyId)
	return !slices.ContainsFunc(roots, func(c *x509.Certificate) bool { return len(c.SubjectKeyId) == 0 || RootID(c) == id })
}
