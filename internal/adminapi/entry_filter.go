package adminapi

import (
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// readEntryFilter reads a filter. by_downstream false selects nothing: the
// command line client always sends it.
func readEntryFilter(td spiffeid.TrustDomain, in *entrypb.ListEntriesRequest_Filter) (f entry.Filter, err error) {
	f = entry.Filter{Hint: in.GetByHint().GetValue(), DownstreamOnly: in.GetByDownstream().GetValue()}
	if in.GetByParentId() != nil {
		if f.ParentID, err = memberID(td, in.GetByParentId()); err != nil {
			return f, invalid("malformed parent ID filter", err)
		}
	}
	if in.GetBySpiffeId() != nil {
		if f.SPIFFEID, err = workloadID(td, in.GetBySpiffeId()); err != nil {
			return f, invalid("malformed SPIFFE ID filter", err)
		}
	}
	if in.GetBySelectors() != nil {
		if f.Selectors, err = readSelectorFilter(in.GetBySelectors()); err != nil {
			return f, invalid("malformed selectors filter", err)
		}
	}
	if in.GetByFederatesWith() != nil {
		if f.FederatesWith, err = readFederationFilter(in.GetByFederatesWith()); err != nil {
			return f, invalid("malformed federates with filter", err)
		}
	}
	return f, nil
}

var errEmptySelectors = errors.New("empty selector set")

func readSelectorFilter(in *typespb.SelectorMatch) (*entry.SelectorFilter, error) {
	selectors, err := spirewire.SelectorsFromWire(in.GetSelectors())
	if err != nil {
		return nil, err
	}
	if selectors.Len() == 0 {
		return nil, errEmptySelectors
	}
	return &entry.SelectorFilter{Selectors: selectors, Mode: entry.MatchMode(in.GetMatch())}, nil
}

func readFederationFilter(in *typespb.FederatesWithMatch) (*entry.FederationFilter, error) {
	if len(in.GetTrustDomains()) == 0 {
		return nil, errors.New("empty trust domain set")
	}
	tds, err := spirewire.TrustDomainsFromWire(in.GetTrustDomains())
	if err != nil {
		return nil, err
	}
	return &entry.FederationFilter{TrustDomains: tds, Mode: entry.MatchMode(in.GetMatch())}, nil
}

// checkModes refuses match numbers nobody knows, as the server's datastore
// does when it comes to them.
func checkModes(f entry.Filter) error {
	if f.Selectors != nil && !known(f.Selectors.Mode) {
		return unhandled("selectors ", f.Selectors.Mode)
	}
	if f.FederatesWith != nil && !known(f.FederatesWith.Mode) {
		return unhandled("federates with ", f.FederatesWith.Mode)
	}
	return nil
}

func known(m entry.MatchMode) bool { return m >= entry.MatchExact && m <= entry.MatchAny }

// unhandled prints the number as a character because the server does.
func unhandled(what string, m entry.MatchMode) error {
	return fmt.Errorf("datastore-sql: unhandled %smatch behavior %q", what, rune(m))
}
