package adminapi

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/adminapi/federationpb"
)

// Federation fetches the bundles of foreign trust domains from their endpoints.
// Safe for concurrent use.
type Federation interface {
	// Refresh fetches and stores a bundle now. It waits for the outcome. Error:
	// embedded.ErrNotFound without a relationship.
	Refresh(ctx context.Context, td spiffeid.TrustDomain) error
	// Status is that of all relationships, in the order of their creation.
	Status() []RelationshipStatus
}

// RelationshipStatus says how fetching one bundle has gone. Zero times are
// never.
type RelationshipStatus struct {
	TrustDomain spiffeid.TrustDomain
	LastSuccess time.Time
	LastAttempt time.Time
	NextAttempt time.Time
	StaleSince  time.Time
	LastError   string // "" = the last attempt succeeded
	Failures    int    // since the last success
	Declared    bool   // by a ClusterFederatedTrustDomain
}

// federationService is spiffe.node.federation.v1.Federation.
type federationService struct {
	federationpb.UnimplementedFederationServer
	fetcher Federation
}

// GetStatus answers with all relationships.
func (s *federationService) GetStatus(context.Context, *federationpb.GetStatusRequest) (*federationpb.GetStatusResponse, error) {
	resp := &federationpb.GetStatusResponse{}
	for _, r := range s.fetcher.Status() {
		resp.Relationships = append(resp.Relationships, &federationpb.RelationshipStatus{
			TrustDomain: r.TrustDomain.Name(),
			LastSuccess: unixOrZero(r.LastSuccess),
			LastAttempt: unixOrZero(r.LastAttempt),
			NextAttempt: unixOrZero(r.NextAttempt),
			StaleSince:  unixOrZero(r.StaleSince),
			LastError:   r.LastError,
			Failures:    int64(r.Failures),
			Declared:    r.Declared,
		})
	}
	return resp, nil
}

func unixOrZero(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
