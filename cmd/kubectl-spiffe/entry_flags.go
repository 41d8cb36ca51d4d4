package main

import (
	"errors"
	"fmt"
	"math"

	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// entryFlags are the flags of entry create and entry update.
type entryFlags struct {
	entryID, parentID, spiffeID, hint, data string
	selectors, federatesWith, dns           []string
	x509TTL, jwtTTL, expiry                 int64
	node, admin, downstream, store          bool
	noPrefetch, jti                         bool
}

func (f *entryFlags) register(flags *pflag.FlagSet, update bool) {
	about := "A custom ID for this registration entry (optional). If not set, a new entry ID will be generated"
	if update {
		about = "The Registration Entry ID of the record to update"
	} else {
		flags.BoolVar(&f.node, "node", false, "If set, this entry will be applied to matching nodes rather than workloads")
	}
	flags.StringVar(&f.entryID, "entryID", "", about)
	flags.StringVar(&f.parentID, "parentID", "", "The SPIFFE ID of this record's parent")
	flags.StringVar(&f.spiffeID, "spiffeID", "", "The SPIFFE ID that this record represents")
	flags.StringArrayVar(&f.selectors, "selector", nil, "A colon-delimited type:value selector. Can be used more than once")
	flags.StringArrayVar(&f.federatesWith, "federatesWith", nil, "SPIFFE ID of a trust domain to federate with. Can be used more than once")
	flags.StringArrayVar(&f.dns, "dns", nil, "A DNS name that will be included in SVIDs issued based on this entry, where appropriate. Can be used more than once")
	flags.Int64Var(&f.x509TTL, "x509SVIDTTL", 0, "The lifetime, in seconds, for x509-SVIDs issued based on this registration entry.")
	flags.Int64Var(&f.jwtTTL, "jwtSVIDTTL", 0, "The lifetime, in seconds, for JWT-SVIDs issued based on this registration entry.")
	flags.Int64Var(&f.expiry, "entryExpiry", 0, "An expiry, from epoch in seconds, for the resulting registration entry to be pruned")
	flags.StringVar(&f.hint, "hint", "", "The entry hint, used to disambiguate entries with the same SPIFFE ID")
	flags.BoolVar(&f.admin, "admin", false, "If set, the SPIFFE ID in this entry will be granted access to the SPIRE Server's management APIs")
	flags.BoolVar(&f.downstream, "downstream", false, "A boolean value that, when set, indicates that the entry describes a downstream SPIRE server")
	flags.BoolVar(&f.store, "storeSVID", false, "A boolean value that, when set, indicates that the resulting issued SVID from this entry must be stored through an SVIDStore plugin")
	flags.BoolVar(&f.noPrefetch, "disableX509SVIDPrefetch", false, "A boolean value that, when set, disables prefetching X509 SVID for this entry")
	flags.BoolVar(&f.jti, "jwtSVIDIncludeJTI", false, "A boolean value that, when set, includes a unique 'jti' claim in JWT-SVIDs issued for this entry")
	flags.StringVar(&f.data, "data", "", "Path to a file containing registration JSON (optional). If set to '-', read the JSON from stdin.")
}

// check refuses what the server need not be asked about.
func (f *entryFlags) check(update bool) error {
	switch {
	case f.data != "":
		return nil
	case update && f.entryID == "":
		return errors.New("entry ID is required")
	case len(f.selectors) == 0:
		return errors.New("at least one selector is required")
	case !f.node && f.parentID == "" && update:
		return errors.New("a parent ID is required")
	case !f.node && f.parentID == "":
		return errors.New("a parent ID is required if the node flag is not set")
	case f.spiffeID == "":
		return errors.New("a SPIFFE ID is required")
	case f.node && len(f.federatesWith) > 0:
		return errors.New("node entries can not federate")
	case f.x509TTL < 0:
		return errors.New("a positive x509-SVID TTL is required")
	case f.jwtTTL < 0:
		return errors.New("a positive JWT-SVID TTL is required")
	}
	return nil
}

// entry is the entry the flags describe.
func (f *entryFlags) entry() (*typespb.Entry, error) {
	id, err := spiffeid.FromString(f.spiffeID)
	if err != nil {
		return nil, err
	}
	var parent spiffeid.ID
	if f.node {
		parent, err = spiffeid.FromPath(id.TrustDomain(), "/spire/server")
	} else {
		parent, err = spiffeid.FromString(f.parentID)
	}
	if err != nil {
		return nil, err
	}
	e := &typespb.Entry{
		Id:            f.entryID,
		ParentId:      idToWire(parent),
		SpiffeId:      idToWire(id),
		FederatesWith: f.federatesWith,
		DnsNames:      f.dns,
		Hint:          f.hint,
		Admin:         f.admin,
		Downstream:    f.downstream,
		StoreSvid:     f.store,
		ExpiresAt:     f.expiry,
	}
	if e.X509SvidTtl, err = toInt32(f.x509TTL, "X509 SVID TTL"); err != nil {
		return nil, err
	}
	if e.JwtSvidTtl, err = toInt32(f.jwtTTL, "JWT SVID TTL"); err != nil {
		return nil, err
	}
	if e.Selectors, err = parseSelectors(f.selectors); err != nil {
		return nil, err
	}
	if f.noPrefetch || f.jti {
		e.AdditionalAttributes = &typespb.Entry_AdditionalAttributes{DisableX509SvidPrefetch: f.noPrefetch, JwtSvidIncludeJti: f.jti}
	}
	return e, nil
}

func toInt32(n int64, what string) (int32, error) {
	if n < math.MinInt32 || n > math.MaxInt32 {
		return 0, fmt.Errorf("invalid value for %s: overflow converting int(%d) to int32", what, n)
	}
	return int32(n), nil
}
