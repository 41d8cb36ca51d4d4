package entry

import (
	"slices"
	"time"
)

// Equal says whether both entries are the same in every field. The order of
// FederatesWith and DNSNames counts.
func (e *Entry) Equal(o *Entry) bool {
	if e == o {
		return true
	}
	if e == nil || o == nil {
		return false
	}
	return e.ID == o.ID &&
		e.Revision == o.Revision &&
		e.CreatedAt.Equal(o.CreatedAt) &&
		e.Suspended == o.Suspended &&
		slices.Equal(e.FederatesWith, o.FederatesWith) &&
		e.SameContent(o)
}

// SameContent says whether both entries give the same workloads the same
// identity in the same way, whatever their IDs, revisions, times of creation,
// suspension and order of federated trust domains. The order of DNS names counts: the
// first becomes the common name.
func (e *Entry) SameContent(o *Entry) bool {
	return e.SPIFFEID == o.SPIFFEID &&
		e.ParentID == o.ParentID &&
		e.Selectors.Equal(o.Selectors) &&
		e.X509SVIDTTL == o.X509SVIDTTL &&
		e.JWTSVIDTTL == o.JWTSVIDTTL &&
		sameSet(e.FederatesWith, o.FederatesWith) &&
		slices.Equal(e.DNSNames, o.DNSNames) &&
		e.Hint == o.Hint &&
		e.Admin == o.Admin &&
		e.Downstream == o.Downstream &&
		e.StoreSVID == o.StoreSVID &&
		e.ExpiresAt.Equal(o.ExpiresAt) &&
		e.DisableX509SVIDPrefetch == o.DisableX509SVIDPrefetch &&
		e.JWTSVIDIncludeJTI == o.JWTSVIDIncludeJTI &&
		e.Fallback == o.Fallback
}

// Clone is a copy that may be changed.
func (e *Entry) Clone() *Entry {
	c := *e
	c.FederatesWith = slices.Clone(e.FederatesWith)
	c.DNSNames = slices.Clone(e.DNSNames)
	return &c
}

// Expired says whether the entry's time has passed at now. Entries without
// ExpiresAt never expire.
func (e *Entry) Expired(now time.Time) bool {
	return !e.ExpiresAt.IsZero() && e.ExpiresAt.Before(now)
}

// sameSet compares two lists as sets. The lists are short.
func sameSet[T comparable](a, b []T) bool {
	return within(a, b) && within(b, a)
}

// within says whether every element of a is in b.
func within[T comparable](a, b []T) bool {
	for _, v := range a {
		if !slices.Contains(b, v) {
			return false
		}
	}
	return true
}
