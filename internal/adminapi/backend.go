package adminapi

import (
	"context"
	"crypto/x509"
	"errors"
	"iter"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// ErrNotFound is what a Source wraps when nothing is known of a target.
var ErrNotFound = errors.New("not found")

// Authority is the embedded authority as the services see it; *embedded.Authority
// is one. What a call changed is durable when it returns; reads see every
// change that has returned. Errors are those of package embedded. Safe for
// concurrent use.
type Authority interface {
	entryStore
	bundleStore
	agentStore
	minter
	keyRotator
	relationshipStore
}

var _ Authority = (*embedded.Authority)(nil)

// entryStore holds the registration entries. A batch is one durable step in
// which each item succeeds or fails for itself.
type entryStore interface {
	Set() *entry.Set
	CreateEntries(ctx context.Context, entries ...*entry.Entry) []embedded.Result
	UpdateEntries(ctx context.Context, updates ...embedded.EntryUpdate) []embedded.Result
	DeleteEntries(ctx context.Context, ids ...string) []error
}

// bundleStore holds the own trust bundle and the federated ones.
type bundleStore interface {
	OwnBundle() *embedded.Bundle
	BundleCount() int
	AppendBundle(ctx context.Context, roots []*x509.Certificate, keys []embedded.JWTKey) (*embedded.Bundle, error)
	FederatedBundles() []embedded.FederatedBundle
	FederatedBundle(td spiffeid.TrustDomain) (*embedded.Bundle, error)
	CreateFederatedBundle(ctx context.Context, b *embedded.Bundle) error
	SetFederatedBundle(ctx context.Context, b *embedded.Bundle) error
	UpdateFederatedBundle(ctx context.Context, td spiffeid.TrustDomain, edit func(*embedded.Bundle)) (*embedded.Bundle, error)
	DeleteFederatedBundle(ctx context.Context, td spiffeid.TrustDomain, mode embedded.DeleteMode) error
}

// agentStore holds the attested nodes.
type agentStore interface {
	Agents() iter.Seq[*embedded.Agent]
	AgentCount() int
	Agent(id spiffeid.ID) (*embedded.Agent, error)
	BanAgent(ctx context.Context, id spiffeid.ID) (*embedded.Agent, error)
	DeleteAgent(ctx context.Context, id spiffeid.ID) error
}

// minter signs for the administrator.
type minter interface {
	MintX509(ctx context.Context, csr []byte, ttl time.Duration) (spiffeid.ID, *authority.X509Issued, error)
	MintJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (*authority.JWTIssued, error)
}
