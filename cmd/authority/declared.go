package main

import (
	"context"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/federation"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/registration"
)

// declared is the relationships that ClusterFederatedTrustDomains ask for. They
// are marked in the store, so that those made by hand are left alone.
type declared struct {
	authority *embedded.Authority
	poller    *federation.Poller
}

var _ registration.Relationships = declared{}

// Registered lists the relationships that were declared.
func (d declared) Registered(context.Context) ([]registration.Relationship, error) {
	var out []registration.Relationship
	for _, r := range d.authority.Relationships() {
		if r.Declared {
			out = append(out, registration.Relationship{TrustDomain: r.TrustDomain, URL: r.EndpointURL, EndpointSPIFFEID: r.EndpointID})
		}
	}
	return out, nil
}

// SetRelationship stores one. Its bundle is fetched at once.
func (d declared) SetRelationship(ctx context.Context, r registration.Relationship) error {
	return d.authority.DeclareRelationship(ctx, embedded.Relationship{TrustDomain: r.TrustDomain, EndpointURL: r.URL, EndpointID: r.EndpointSPIFFEID})
}

// DeleteRelationship deletes one if it was declared.
func (d declared) DeleteRelationship(ctx context.Context, td spiffeid.TrustDomain) error {
	r, err := d.authority.Relationship(td)
	switch {
	case errors.Is(err, embedded.ErrNotFound) || err == nil && !r.Declared:
		return nil
	case err != nil:
		return err
	}
	if err := d.authority.DeleteRelationship(ctx, td); !errors.Is(err, embedded.ErrNotFound) {
		return err
	}
	return nil
}

// Refresh says how fetching a bundle goes; false while nothing is known.
func (d declared) Refresh(td spiffeid.TrustDomain) (registration.Refresh, bool) {
	s, ok := d.poller.StatusOf(td)
	if !ok || s.LastAttempt.IsZero() {
		return registration.Refresh{}, false
	}
	return registration.Refresh{Error: s.LastError, Fetched: !s.LastSuccess.IsZero(), Stale: !s.StaleSince.IsZero()}, true
}

// Changed closes when an outcome has changed, or the set of relationships.
func (d declared) Changed() <-chan struct{} { return d.poller.Changed() }
