package embedded

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// ownRow is the row of the own bundle.
const ownRow = 0

// bundleBook is all bundles at one moment. Immutable.
type bundleBook struct {
	own       *bundleState // empty before the first CA
	federated map[spiffeid.TrustDomain]*bundleState
	lastRow   int64
	set       *authority.BundleSet
}

// with is the book with one bundle added or replaced; publishable makes the set
// fit.
func (b *bundleBook) with(s *bundleState) *bundleBook {
	out := &bundleBook{own: b.own, federated: b.federated, lastRow: max(b.lastRow, s.row), set: b.set}
	if s.row == ownRow {
		out.own = s
		return out
	}
	out.federated = maps.Clone(b.federated)
	if out.federated == nil {
		out.federated = make(map[spiffeid.TrustDomain]*bundleState)
	}
	out.federated[s.TrustDomain] = s
	return out
}

func (b *bundleBook) without(td spiffeid.TrustDomain) *bundleBook {
	out := *b
	out.federated = maps.Clone(b.federated)
	delete(out.federated, td)
	return &out
}

// publishable is the book with the next version of what the node gets; there is
// none before the first CA.
func (b *bundleBook) publishable() *bundleBook {
	out := *b
	if len(b.own.X509) == 0 {
		return &out
	}
	out.set = &authority.BundleSet{
		Version:     b.set.Version + 1,
		Own:         b.own.spiffe,
		Federated:   make(map[spiffeid.TrustDomain]*spiffebundle.Bundle, len(b.federated)),
		TaintedX509: make(map[string]bool),
		TaintedJWT:  make(map[string]bool),
	}
	for td, s := range b.federated {
		out.set.Federated[td] = s.spiffe
	}
	for _, r := range b.own.X509 {
		if r.Tainted {
			out.set.TaintedX509[r.authorityID()] = true
		}
	}
	for _, k := range b.own.JWT {
		if k.Tainted {
			out.set.TaintedJWT[k.ID] = true
		}
	}
	return &out
}

// publishBundle shows a stored bundle to readers. The caller holds mu.
func (a *Authority) publishBundle(s *bundleState) {
	a.bundles.Set(a.bundles.Get().with(s).publishable())
	if s.row == ownRow {
		a.metrics.version.Set(float64(s.Sequence))
	}
}

// OwnBundle is the bundle of the own trust domain: active, prepared, old and
// tainted authorities.
func (a *Authority) OwnBundle() *Bundle { return a.bundles.Get().own.Bundle }

// BundleCount is the number of bundles, the own one included.
func (a *Authority) BundleCount() int { return 1 + len(a.bundles.Get().federated) }

// FederatedBundle is a bundle at its place in the listing.
type FederatedBundle struct {
	Row    int64 // grows with each new bundle
	Bundle *Bundle
}

// FederatedBundles are in the order of their creation.
func (a *Authority) FederatedBundles() []FederatedBundle {
	book := a.bundles.Get()
	out := make([]FederatedBundle, 0, len(book.federated))
	for _, s := range book.federated {
		out = append(out, FederatedBundle{s.row, s.Bundle})
	}
	slices.SortFunc(out, func(x, y FederatedBundle) int { return cmp.Compare(x.Row, y.Row) })
	return out
}

// FederatedBundle is the bundle of one foreign trust domain. Error: ErrNotFound.
func (a *Authority) FederatedBundle(td spiffeid.TrustDomain) (*Bundle, error) {
	if s, ok := a.bundles.Get().federated[td]; ok {
		return s.Bundle, nil
	}
	return nil, notFound("bundle not found")
}

// AppendBundle adds authorities to the own bundle; those it has already are
// skipped. Without any new one nothing changes. Errors: ErrInvalid.
func (a *Authority) AppendBundle(ctx context.Context, roots []*x509.Certificate, keys []JWTKey) (*Bundle, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if len(roots)+len(keys) == 0 {
		return nil, invalid("no authorities to append", nil)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	b := a.bundles.Get().own.clone()
	before := len(b.X509) + len(b.JWT)
	for _, cert := range roots {
		if !slices.ContainsFunc(b.X509, func(r Root) bool { return r.Certificate.Equal(cert) }) {
			b.X509 = append(b.X509, Root{Certificate: cert})
		}
	}
	for _, k := range keys {
		if err := checkJWTKey(k); err != nil {
			return nil, err
		}
		// A second key under a known ID would make one of them unusable.
		if b.find(kindJWT, k.ID) == nil {
			k.Tainted = false
			b.JWT = append(b.JWT, k)
		}
	}
	if len(b.X509)+len(b.JWT) == before {
		return a.OwnBundle(), nil
	}
	if err := a.storeOwn(b); err != nil {
		return nil, fmt.Errorf("failed to append bundle: %w", err)
	}
	return a.OwnBundle(), nil
}

func checkJWTKey(k JWTKey) error {
	if k.ID == "" {
		return invalid("missing key ID", nil)
	}
	if _, err := x509.ParsePKIXPublicKey(k.PublicKey); err != nil {
		return invalid("unable to parse JWT authority", err)
	}
	return nil
}

// CreateFederatedBundle stores a new bundle. Errors: ErrExists, ErrInvalid.
func (a *Authority) CreateFederatedBundle(ctx context.Context, b *Bundle) error {
	_, err := a.changeFederated(ctx, b.TrustDomain, "creating a", func(old *Bundle) (*Bundle, error) {
		if old != nil {
			return nil, exists("bundle already exists")
		}
		return b, nil
	})
	return err
}

// SetFederatedBundle stores a bundle whether or not there was one. Setting an
// equal one changes nothing. Error: ErrInvalid.
func (a *Authority) SetFederatedBundle(ctx context.Context, b *Bundle) error {
	_, err := a.changeFederated(ctx, b.TrustDomain, "setting a", func(*Bundle) (*Bundle, error) { return b, nil })
	return err
}

// UpdateFederatedBundle lets edit change a copy of a stored bundle. Errors:
// ErrNotFound, ErrInvalid.
func (a *Authority) UpdateFederatedBundle(ctx context.Context, td spiffeid.TrustDomain, edit func(*Bundle)) (*Bundle, error) {
	return a.changeFederated(ctx, td, "updating a", func(old *Bundle) (*Bundle, error) {
		if old == nil {
			return nil, notFound("bundle not found")
		}
		b := old.clone()
		edit(b)
		b.TrustDomain = td
		return b, nil
	})
}

func (a *Authority) changeFederated(ctx context.Context, td spiffeid.TrustDomain, what string, f func(old *Bundle) (*Bundle, error)) (*Bundle, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	switch {
	case td.IsZero():
		return nil, invalid("trust domain is missing", nil)
	case td == a.cfg.TrustDomain:
		return nil, invalid(what+" federated bundle for the server's own trust domain is not allowed", nil)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	book := a.bundles.Get()
	var oldBundle *Bundle
	if old := book.federated[td]; old != nil {
		oldBundle = old.Bundle
	}
	b, err := f(oldBundle)
	if err != nil {
		return nil, err
	}
	state, err := a.nextFederated(b)
	switch {
	case err != nil:
		return nil, err
	case state == nil:
		return oldBundle, nil
	}
	if err := a.commit(state.change()); err != nil {
		return nil, fmt.Errorf("store bundle of %s: %w", td, err)
	}
	a.publishBundle(state)
	return state.Bundle, nil
}

// DeleteMode says what becomes of the entries that federate with a deleted
// bundle.
type DeleteMode int

// The modes.
const (
	Restrict      DeleteMode = iota // refuse with *InUseError
	DeleteEntries                   // delete them too
	Dissociate                      // take the trust domain out of them
)

// DeleteFederatedBundle removes a bundle and, in the same step, what mode says.
// Errors: ErrNotFound, ErrInvalid, *InUseError.
func (a *Authority) DeleteFederatedBundle(ctx context.Context, td spiffeid.TrustDomain, mode DeleteMode) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if td == a.cfg.TrustDomain {
		return invalid("removing the bundle for the server trust domain is not allowed", nil)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	book := a.bundles.Get()
	s, ok := book.federated[td]
	if !ok {
		return notFound("bundle not found")
	}
	var users []*entry.Entry
	for e := range a.Set().All() {
		if slices.Contains(e.FederatesWith, td) {
			users = append(users, e)
		}
	}
	var changed []*entry.Entry
	var removed []string
	switch mode {
	case DeleteEntries:
		for _, e := range users {
			removed = append(removed, e.ID)
		}
	case Dissociate:
		for _, e := range users {
			c := e.Clone()
			c.FederatesWith = slices.DeleteFunc(c.FederatesWith, func(o spiffeid.TrustDomain) bool { return o == td })
			c.Revision++
			changed = append(changed, c)
		}
	default:
		if len(users) > 0 {
			return &InUseError{len(users)}
		}
	}
	if err := a.storeEntries(changed, removed, remove(bucketBundles, rowKey(s.row))); err != nil {
		return fmt.Errorf("delete bundle of %s: %w", td, err)
	}
	a.bundles.Set(book.without(td).publishable())
	return nil
}
