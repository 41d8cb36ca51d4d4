// Package authority is the seam between the node and whoever signs its
// identities: the embedded authority or a SPIRE Server.
//
// Private keys never cross it: a CSR goes out, a certificate comes back. Every
// implementation passes the suite in authoritytest.
package authority

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Errors an implementation wraps so that callers know what to do next. Any
// other error is internal and is treated like ErrTryLater.
var (
	// ErrRefused: the authority will not sign this; asking again is useless
	// until the entry changes.
	ErrRefused = errors.New("authority refused")
	// ErrTryLater: a passing fault; ask again after a pause.
	ErrTryLater = errors.New("authority cannot answer now")
	// ErrNotReady: the authority has not finished starting.
	ErrNotReady = errors.New("authority not ready")
)

// Authority signs identities and hands out trust bundles. Safe for concurrent
// use.
type Authority interface {
	// SignX509 signs the public key of the CSR for one registration entry.
	// The certificate's contents come from the request's entry, never from
	// the CSR. Errors wrap ErrRefused, ErrTryLater or ErrNotReady.
	SignX509(ctx context.Context, req X509Request) (*X509Issued, error)
	// SignJWT signs a JWT-SVID for one registration entry.
	SignJWT(ctx context.Context, req JWTRequest) (*JWTIssued, error)
	// Bundles waits until the bundles are newer than after, or ctx ends.
	// after 0 asks for the first known set. Versions only grow within one
	// process.
	Bundles(ctx context.Context, after uint64) (*BundleSet, error)
}

// X509Request asks for one X.509-SVID.
type X509Request struct {
	EntryID  string        // registration entry to sign for
	SPIFFEID spiffeid.ID   // the entry's SPIFFE ID
	CSR      []byte        // PKCS#10 DER; only the public key counts, the signature is verified
	DNSNames []string      // DNS SANs in order; the first becomes the CN
	TTL      time.Duration // 0 = the authority's default
}

// X509Issued is a signed X.509-SVID.
type X509Issued struct {
	Chain     [][]byte // DER, leaf first, then intermediates; never a self-signed root
	NotBefore time.Time
	NotAfter  time.Time
}

// JWTRequest asks for one JWT-SVID.
type JWTRequest struct {
	EntryID    string
	SPIFFEID   spiffeid.ID
	Audience   []string      // at least one
	TTL        time.Duration // 0 = the authority's default
	IncludeJTI bool
}

// JWTIssued is a signed JWT-SVID.
type JWTIssued struct {
	Token     string
	IssuedAt  time.Time
	ExpiresAt time.Time
}

// BundleSet is an immutable picture of all trust bundles. A bundle whose
// content did not change keeps its pointer from one set to the next; nobody
// may modify the bundles in a set.
type BundleSet struct {
	Version   uint64
	Own       *spiffebundle.Bundle
	Federated map[spiffeid.TrustDomain]*spiffebundle.Bundle
	// TaintedX509 holds the lowercase hex subject key IDs of tainted X.509
	// authorities; SVIDs below them must be replaced.
	TaintedX509 map[string]bool
	// TaintedJWT holds the key IDs of tainted JWT authorities.
	TaintedJWT map[string]bool
}
