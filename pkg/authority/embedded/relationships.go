package embedded

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Relationship says where the bundle of a foreign trust domain is served.
type Relationship struct {
	Row         int64 // grows with each new relationship
	TrustDomain spiffeid.TrustDomain
	// EndpointURL is an https URL with a host and without user information.
	EndpointURL string
	// EndpointID is whom the endpoint must be under https_spiffe; zero = the
	// web's PKI says who it is (https_web).
	EndpointID spiffeid.ID
	// Declared marks what a ClusterFederatedTrustDomain asked for: only that is
	// withdrawn when the resource goes.
	Declared bool
}

// maxEndpointURL bounds what is stored and shown, in bytes.
const maxEndpointURL = 2048

// relationBook is all relationships at one moment. Immutable.
type relationBook struct {
	of      map[spiffeid.TrustDomain]*Relationship
	lastRow int64
}

func (b *relationBook) with(r *Relationship) *relationBook {
	out := &relationBook{of: maps.Clone(b.of), lastRow: max(b.lastRow, r.Row)}
	if out.of == nil {
		out.of = make(map[spiffeid.TrustDomain]*Relationship)
	}
	out.of[r.TrustDomain] = r
	return out
}

func (b *relationBook) without(td spiffeid.TrustDomain) *relationBook {
	out := &relationBook{of: maps.Clone(b.of), lastRow: b.lastRow}
	delete(out.of, td)
	return out
}

// CheckEndpointURL says why a text cannot be the URL of a bundle endpoint, in
// SPIRE Server's words.
func CheckEndpointURL(text string) error {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return fmt.Errorf("failed to parse bundle endpoint URL: %w", err)
	case u.Scheme != "https":
		return errors.New("bundle endpoint URL must use the https scheme")
	case u.Host == "":
		return errors.New("bundle endpoint URL must specify the host")
	case u.User != nil:
		return errors.New("bundle endpoint URL must not contain user info")
	case len(text) > maxEndpointURL:
		return fmt.Errorf("bundle endpoint URL is longer than %d bytes", maxEndpointURL)
	}
	return nil
}

// Relationships are in the order of their creation.
func (a *Authority) Relationships() []Relationship {
	book := a.relations.Get()
	out := make([]Relationship, 0, len(book.of))
	for _, r := range book.of {
		out = append(out, *r)
	}
	slices.SortFunc(out, func(x, y Relationship) int { return cmp.Compare(x.Row, y.Row) })
	return out
}

// Relationship is the one with a trust domain. Error: ErrNotFound.
func (a *Authority) Relationship(td spiffeid.TrustDomain) (Relationship, error) {
	if r, ok := a.relations.Get().of[td]; ok {
		return *r, nil
	}
	return Relationship{}, notFound("federation relationship does not exist")
}

// RelationshipChanges closes at the next change of a relationship. Who takes it
// first and looks second misses nothing.
func (a *Authority) RelationshipChanges() <-chan struct{} {
	_, changed := a.relations.Look()
	return changed
}

// CreateRelationship stores a new relationship and, if bundle is not nil, the
// trust domain's bundle in the same durable step. Row is given here. Errors:
// ErrExists, ErrInvalid.
func (a *Authority) CreateRelationship(ctx context.Context, r Relationship, bundle *Bundle) (Relationship, error) {
	return a.changeRelationship(ctx, r.TrustDomain, bundle, func(old *Relationship) (Relationship, error) {
		if old != nil {
			return r, exists("datastore-sql: UNIQUE constraint failed: federated_trust_domains.trust_domain")
		}
		return r, nil
	})
}

// UpdateRelationship lets edit change a copy of a stored relationship, and
// stores bundle as CreateRelationship does. Errors: ErrNotFound, ErrInvalid.
func (a *Authority) UpdateRelationship(ctx context.Context, td spiffeid.TrustDomain, bundle *Bundle, edit func(*Relationship) error) (Relationship, error) {
	return a.changeRelationship(ctx, td, bundle, func(old *Relationship) (Relationship, error) {
		if old == nil {
			return Relationship{}, notFound("unable to fetch federation relationship: record not found")
		}
		r := *old
		err := edit(&r)
		return r, err
	})
}

// DeclareRelationship creates or replaces a declared relationship; an equal one
// changes nothing. One that somebody made by hand is not replaced:
// ErrPrecondition. Error: ErrInvalid.
func (a *Authority) DeclareRelationship(ctx context.Context, r Relationship) error {
	r.Declared = true
	_, err := a.changeRelationship(ctx, r.TrustDomain, nil, func(old *Relationship) (Relationship, error) {
		if old != nil && !old.Declared {
			return r, &kindError{ErrPrecondition, fmt.Sprintf("a federation relationship with %q was made by hand; delete it with `federation delete`, and this one takes its place", r.TrustDomain), nil}
		}
		return r, nil
	})
	return err
}

// DeleteRelationship removes a relationship; the bundle stays. Error:
// ErrNotFound.
func (a *Authority) DeleteRelationship(ctx context.Context, td spiffeid.TrustDomain) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	book := a.relations.Get()
	r, ok := book.of[td]
	if !ok {
		return notFound("federation relationship not found")
	}
	if err := a.commit(remove(bucketRelationships, rowKey(r.Row))); err != nil {
		return fmt.Errorf("delete federation relationship with %s: %w", td, err)
	}
	a.relations.Set(book.without(td))
	return nil
}

func (a *Authority) changeRelationship(ctx context.Context, td spiffeid.TrustDomain, bundle *Bundle, f func(old *Relationship) (Relationship, error)) (Relationship, error) {
	if err := ctx.Err(); err != nil {
		return Relationship{}, err
	}
	switch {
	case td.IsZero():
		return Relationship{}, invalid("trust domain is missing", nil)
	case td == a.cfg.TrustDomain:
		return Relationship{}, invalid("unable to create federation relationship for server trust domain", nil)
	case bundle != nil && bundle.TrustDomain != td:
		return Relationship{}, invalid(fmt.Sprintf("trust domain bundle (%q) must match the trust domain of the federation relationship (%q)", bundle.TrustDomain, td), nil)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	book := a.relations.Get()
	old := book.of[td]
	next, err := f(old)
	if err != nil {
		return Relationship{}, err
	}
	next.TrustDomain, next.Row = td, book.lastRow+1
	if old != nil {
		next.Row = old.Row
	}
	if err := CheckEndpointURL(next.EndpointURL); err != nil {
		return Relationship{}, invalid("", err)
	}
	var changes []change
	changed := old == nil || *old != next
	if changed {
		c, err := next.change()
		if err != nil {
			return Relationship{}, err
		}
		changes = append(changes, c)
	}
	var state *bundleState
	if bundle != nil {
		if state, err = a.nextFederated(bundle); err != nil {
			return Relationship{}, err
		}
	}
	if state != nil {
		changes = append(changes, state.change())
	}
	if len(changes) == 0 {
		return next, nil
	}
	if err := a.commit(changes...); err != nil {
		return Relationship{}, fmt.Errorf("store federation relationship with %s: %w", td, err)
	}
	if state != nil {
		a.publishBundle(state)
	}
	if changed {
		a.relations.Set(book.with(&next))
	}
	return next, nil
}

// nextFederated is the state to store for a federated bundle, nil if that is
// what is stored. The caller holds mu.
func (a *Authority) nextFederated(b *Bundle) (*bundleState, error) {
	book := a.bundles.Get()
	row := book.lastRow + 1
	old := book.federated[b.TrustDomain]
	if old != nil {
		row = old.row
	}
	if err := b.check(); err != nil {
		return nil, err
	}
	state, err := newBundleState(row, b.clone())
	if err != nil {
		return nil, invalid("failed to convert bundle", err)
	}
	if old != nil && old.sameContent(state) {
		return nil, nil //nolint:nilnil // as documented
	}
	return state, nil
}

// relationshipRecord is the stored form; the row is the key.
type relationshipRecord struct {
	TrustDomain spiffeid.TrustDomain `json:"trust_domain"`
	EndpointURL string               `json:"endpoint_url"`
	EndpointID  string               `json:"endpoint_id,omitempty"`
	Declared    bool                 `json:"declared,omitempty"`
}

func (r *Relationship) change() (change, error) {
	rec := relationshipRecord{TrustDomain: r.TrustDomain, EndpointURL: r.EndpointURL, Declared: r.Declared}
	if !r.EndpointID.IsZero() {
		rec.EndpointID = r.EndpointID.String()
	}
	content, err := json.Marshal(rec)
	if err != nil {
		return change{}, fmt.Errorf("encode federation relationship: %w", err)
	}
	return put(bucketRelationships, rowKey(r.Row), content), nil
}

func decodeRelationship(row int64, content []byte) (*Relationship, error) {
	var rec relationshipRecord
	if err := unmarshalStrict(content, &rec); err != nil {
		return nil, err
	}
	if rec.TrustDomain.IsZero() {
		return nil, errNoTrustDomain
	}
	r := &Relationship{Row: row, TrustDomain: rec.TrustDomain, EndpointURL: rec.EndpointURL, Declared: rec.Declared}
	if err := CheckEndpointURL(rec.EndpointURL); err != nil {
		return nil, err
	}
	if rec.EndpointID != "" {
		var err error
		if r.EndpointID, err = spiffeid.FromString(rec.EndpointID); err != nil {
			return nil, fmt.Errorf("endpoint ID: %w", err)
		}
	}
	return r, nil
}

func (l *loading) addRelationship(key string, content []byte) error {
	row, err := parseRow(key)
	if err != nil {
		return err
	}
	r, err := decodeRelationship(row, content)
	if err != nil {
		return err
	}
	if _, twice := l.relations.of[r.TrustDomain]; twice || r.TrustDomain == l.a.cfg.TrustDomain {
		return fmt.Errorf("relationship with %q in row %d", r.TrustDomain, row)
	}
	l.relations = l.relations.with(r)
	return nil
}
