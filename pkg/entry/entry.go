// Package entry holds registration entries: who, by which selectors, gets
// which SPIFFE ID, and the index that finds the entries a caller matches
// without looking at all of them.
//
// # Promise
//
// A Set is an immutable snapshot: whoever holds one may read it for ever, from
// any goroutine, while others make the next one. Match answers exactly what a
// scan of all entries would. A Scope holds exactly what one agent is
// authorized for, whatever the order in which entries came and went.
//
// # Threats
//
// Entries come from administrators and controllers, selectors from attested
// callers; both may hold anything a client could put on the wire. An entry
// that should match nobody (no selectors) matches nobody; chosen selectors
// cannot degrade the index by aiming at one hash bucket, as the hashes are
// seeded per set; a cycle of parents ends. What is stored is read back in full
// or refused.
package entry

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// Entry is a registration entry with the fields of SPIRE's
// (spire.api.types.Entry). Immutable once it is in a Set.
type Entry struct {
	ID        string
	SPIFFEID  spiffeid.ID
	ParentID  spiffeid.ID
	Selectors selector.Set
	// X509SVIDTTL and JWTSVIDTTL are whole seconds; 0 = the authority's default.
	X509SVIDTTL time.Duration
	JWTSVIDTTL  time.Duration
	// FederatesWith are the trust domains whose bundles the workload gets, in
	// the order given.
	FederatesWith []spiffeid.TrustDomain
	// DNSNames in the order given; the first becomes the certificate's CN.
	DNSNames   []string
	Hint       string
	Admin      bool
	Downstream bool
	StoreSVID  bool
	// ExpiresAt is the time the entry is deleted; zero = never.
	ExpiresAt time.Time
	// Revision starts at 0 and grows by one with each update.
	Revision  int64
	CreatedAt time.Time
	// DisableX509SVIDPrefetch leaves signing to the first caller.
	DisableX509SVIDPrefetch bool
	JWTSVIDIncludeJTI       bool
	// Fallback marks an entry that yields to any other match as the default
	// identity (ClusterSPIFFEID's fallback).
	Fallback bool
	// Suspended marks an entry that its server has stopped listing, while it is
	// not certain yet that it was deleted: who has its SVID keeps it, but it is
	// not renewed and nobody else gets it.
	Suspended bool
}
