package spirewire

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Errors of the conversions from the wire. The texts are those SPIRE Server
// answers for the same mistakes.
var (
	ErrIDMissing   = errors.New("request must specify SPIFFE ID")
	ErrNoSelectors = errors.New("selector list is empty")
	ErrNoEntryID   = errors.New("entry has no ID")
)

// IDToWire is the two-part form; the zero ID has no wire form and is nil.
func IDToWire(id spiffeid.ID) *typespb.SPIFFEID {
	if id.IsZero() {
		return nil
	}
	return &typespb.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

// IDFromWire reads the two-part form. As with the server, the trust domain may
// be given as a full SPIFFE ID, of which only the trust domain counts.
func IDFromWire(in *typespb.SPIFFEID) (spiffeid.ID, error) {
	if in == nil {
		return spiffeid.ID{}, ErrIDMissing
	}
	td, err := spiffeid.TrustDomainFromString(in.GetTrustDomain())
	if err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromPath(td, in.GetPath())
}

// SelectorsToWire lists a set in its order.
func SelectorsToWire(in attest.Selectors) []*typespb.Selector {
	out := make([]*typespb.Selector, 0, in.Len())
	for sel := range in.All() {
		out = append(out, &typespb.Selector{Type: sel.Type(), Value: sel.Value()})
	}
	return out
}

// SelectorsFromWire reads a list of selectors; repetitions are dropped.
func SelectorsFromWire(in []*typespb.Selector) (attest.Selectors, error) {
	list := make([]attest.Selector, len(in))
	for i, s := range in {
		sel, err := attest.NewSelector(s.GetType(), s.GetValue())
		if err != nil {
			return attest.Selectors{}, err
		}
		list[i] = sel
	}
	return attest.NewSelectors(list...), nil
}

// TrustDomainsFromWire reads trust domain names or IDs.
func TrustDomainsFromWire(in []string) ([]spiffeid.TrustDomain, error) {
	out := make([]spiffeid.TrustDomain, len(in))
	for i, s := range in {
		td, err := spiffeid.TrustDomainFromString(s)
		if err != nil {
			return nil, err
		}
		out[i] = td
	}
	return out, nil
}

// EntryToWire is the entry with every field set.
func EntryToWire(e *entry.Entry) *typespb.Entry {
	out := &typespb.Entry{
		Id:             e.ID,
		SpiffeId:       IDToWire(e.SPIFFEID),
		ParentId:       IDToWire(e.ParentID),
		Selectors:      SelectorsToWire(e.Selectors),
		X509SvidTtl:    SecondsToWire(e.X509SVIDTTL),
		JwtSvidTtl:     SecondsToWire(e.JWTSVIDTTL),
		Admin:          e.Admin,
		Downstream:     e.Downstream,
		ExpiresAt:      TimeToWire(e.ExpiresAt),
		DnsNames:       e.DNSNames,
		RevisionNumber: e.Revision,
		StoreSvid:      e.StoreSVID,
		Hint:           e.Hint,
		CreatedAt:      TimeToWire(e.CreatedAt),
	}
	for _, td := range e.FederatesWith {
		out.FederatesWith = append(out.FederatesWith, td.Name())
	}
	if e.DisableX509SVIDPrefetch || e.JWTSVIDIncludeJTI {
		out.AdditionalAttributes = &typespb.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: e.DisableX509SVIDPrefetch,
			JwtSvidIncludeJti:       e.JWTSVIDIncludeJTI,
		}
	}
	return out
}

// EntryFromWire reads an entry as an agent gets it from a server: the mask may
// have removed the parent ID and further fields, but ID, SPIFFE ID and
// selectors must be there. Errors name the field.
func EntryFromWire(in *typespb.Entry) (*entry.Entry, error) {
	if in.GetId() == "" {
		return nil, ErrNoEntryID
	}
	id, err := IDFromWire(in.GetSpiffeId())
	if err != nil {
		return nil, fmt.Errorf("entry %s: invalid spiffe ID: %w", in.GetId(), err)
	}
	out := &entry.Entry{
		ID:                      in.GetId(),
		SPIFFEID:                id,
		X509SVIDTTL:             SecondsFromWire(in.GetX509SvidTtl()),
		JWTSVIDTTL:              SecondsFromWire(in.GetJwtSvidTtl()),
		DNSNames:                in.GetDnsNames(),
		Hint:                    in.GetHint(),
		Admin:                   in.GetAdmin(),
		Downstream:              in.GetDownstream(),
		StoreSVID:               in.GetStoreSvid(),
		ExpiresAt:               TimeFromWire(in.GetExpiresAt()),
		Revision:                in.GetRevisionNumber(),
		CreatedAt:               TimeFromWire(in.GetCreatedAt()),
		DisableX509SVIDPrefetch: in.GetAdditionalAttributes().GetDisableX509SvidPrefetch(),
		JWTSVIDIncludeJTI:       in.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
	}
	if in.GetParentId() != nil {
		if out.ParentID, err = IDFromWire(in.GetParentId()); err != nil {
			return nil, fmt.Errorf("entry %s: invalid parent ID: %w", in.GetId(), err)
		}
	}
	if len(in.GetSelectors()) == 0 {
		return nil, fmt.Errorf("entry %s: %w", in.GetId(), ErrNoSelectors)
	}
	if out.Selectors, err = SelectorsFromWire(in.GetSelectors()); err != nil {
		return nil, fmt.Errorf("entry %s: %w", in.GetId(), err)
	}
	if out.FederatesWith, err = TrustDomainsFromWire(in.GetFederatesWith()); err != nil {
		return nil, fmt.Errorf("entry %s: invalid federated trust domain: %w", in.GetId(), err)
	}
	return out, nil
}

// TimeToWire is unix seconds, rounded; the zero time is 0.
func TimeToWire(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Round(time.Second).Unix()
}

// TimeFromWire is the reverse of TimeToWire.
func TimeFromWire(seconds int64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0).UTC()
}

// SecondsToWire is whole seconds, held at the limits of int32.
func SecondsToWire(d time.Duration) int32 {
	s := int64(d / time.Second)
	return int32(min(max(s, math.MinInt32), math.MaxInt32))
}

// SecondsFromWire is the reverse of SecondsToWire.
func SecondsFromWire(s int32) time.Duration { return time.Duration(s) * time.Second }
