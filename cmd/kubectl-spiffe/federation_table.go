package main

import (
	"context"
	"strconv"
	"time"

	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/internal/adminapi/federationpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// relationStatus asks how the bundles are being kept fresh, where the output
// shows it. A SPIRE Server does not know; then nothing is shown.
func (a *app) relationStatus(ctx context.Context, conn grpc.ClientConnInterface) map[string]*federationpb.RelationshipStatus {
	if a.output != formatTable && a.output != formatWide {
		return nil
	}
	resp, err := federationpb.NewFederationClient(conn).GetStatus(ctx, &federationpb.GetStatusRequest{})
	if err != nil {
		return nil
	}
	out := make(map[string]*federationpb.RelationshipStatus)
	for _, s := range resp.GetRelationships() {
		out[s.GetTrustDomain()] = s
	}
	return out
}

// relationTable is one row per relationship.
func relationTable(all []*typespb.FederationRelationship, status map[string]*federationpb.RelationshipStatus) func(*table, bool) {
	return func(t *table, wide bool) {
		now := time.Now()
		t.columns("TRUST DOMAIN", "PROFILE", "BUNDLE", "SEQUENCE", "REFRESH", "FETCHED", "NEXT")
		if wide {
			t.columns("URL", "ENDPOINT ID", "MADE BY", "FAILURES", "LAST ERROR")
		}
		for _, r := range all {
			profile := profileWeb
			if r.GetHttpsSpiffe() != nil {
				profile = profileSPIFFE
			}
			bundle, sequence := "missing", ""
			if b := r.GetTrustDomainBundle(); b != nil {
				bundle = count(len(b.GetX509Authorities()), "root", "roots")
				sequence = strconv.FormatUint(b.GetSequenceNumber(), 10)
			}
			s := status[r.GetTrustDomain()]
			cells := []string{r.GetTrustDomain(), profile, bundle, sequence, refreshWord(s), ""}
			if at := s.GetLastSuccess(); at != 0 {
				cells[5] = age(at) + " ago"
			}
			next := ""
			if at := s.GetNextAttempt(); at != 0 {
				next = "in " + short3(max(time.Unix(at, 0).Sub(now), 0))
			}
			cells = append(cells, next)
			if wide {
				by := "hand"
				switch {
				case s == nil:
					by = ""
				case s.GetDeclared():
					by = "resource"
				}
				cells = append(cells, r.GetBundleEndpointUrl(), r.GetHttpsSpiffe().GetEndpointSpiffeId(), by, strconv.FormatInt(s.GetFailures(), 10), s.GetLastError())
			}
			t.row(cells...)
		}
	}
}

// refreshWord is how the bundle is doing, in one word.
func refreshWord(s *federationpb.RelationshipStatus) string {
	switch {
	case s == nil:
		return ""
	case s.GetStaleSince() != 0:
		return "stale"
	case s.GetFailures() > 0 && s.GetLastSuccess() == 0:
		return "failing"
	case s.GetFailures() > 0:
		return "retrying"
	case s.GetLastSuccess() == 0:
		return "pending"
	}
	return "ok"
}
