package svid

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// ErrOverLimit says that too many callers of one pod are parked.
var ErrOverLimit = errors.New("over limit")

// Entries is where the manager learns of registration entries. Safe for
// concurrent use.
type Entries interface {
	// Entries waits until the set is newer than after, or ctx ends. It may
	// skip versions; the set tells what changed in between.
	Entries(ctx context.Context, after uint64) (*entry.Set, error)
}

// X509SVID is one issued key and chain. Immutable; consumers may cache what
// they derive from it under its pointer.
type X509SVID struct {
	ID           spiffeid.ID
	Certificates []*x509.Certificate // leaf first
	ChainDER     [][]byte            // the same, raw
	Key          crypto.Signer
	KeyDER       []byte // PKCS#8
	Serial       string // decimal
	NotBefore    time.Time
	NotAfter     time.Time
}

// Identity is an entry together with its current SVID. Immutable.
type Identity struct {
	Entry *entry.Entry
	SVID  *X509SVID
}

// Update is what one caller may have at one moment. Immutable; shared between
// all callers that may have the same.
type Update struct {
	// Identities are the matched entries with a valid SVID, the default
	// identity first.
	Identities []*Identity
	// Late are matched entries that have no valid SVID at the moment. An
	// identity missing from both lists was withdrawn deliberately.
	Late []*entry.Entry
	// Synced is false until entries have been heard of once.
	Synced bool
	// Own is the own trust bundle; nil until known.
	Own *spiffebundle.Bundle
	// Roots and Keys are the generations of the X.509 and JWT authorities in
	// Own, see Manager.Trust; 0 without Own.
	Roots, Keys uint32
	// Federated are the bundles of the trust domains that the caller's
	// identities federate with.
	Federated map[spiffeid.TrustDomain]*spiffebundle.Bundle
}
