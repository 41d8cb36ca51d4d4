package adminapi

import (
	"errors"

	"google.golang.org/grpc/codes"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// readEntry is an entry as a client spells it.
func readEntry(in *typespb.Entry) *entry.Input {
	out := &entry.Input{
		ID:                      in.GetId(),
		ParentID:                readEntryID(in.GetParentId()),
		SPIFFEID:                readEntryID(in.GetSpiffeId()),
		X509SVIDTTL:             in.GetX509SvidTtl(),
		JWTSVIDTTL:              in.GetJwtSvidTtl(),
		FederatesWith:           in.GetFederatesWith(),
		DNSNames:                in.GetDnsNames(),
		Hint:                    in.GetHint(),
		Admin:                   in.GetAdmin(),
		Downstream:              in.GetDownstream(),
		StoreSVID:               in.GetStoreSvid(),
		ExpiresAt:               in.GetExpiresAt(),
		DisableX509SVIDPrefetch: in.GetAdditionalAttributes().GetDisableX509SvidPrefetch(),
		JWTSVIDIncludeJTI:       in.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
	}
	for _, s := range in.GetSelectors() {
		out.Selectors = append(out.Selectors, entry.InputSelector{Type: s.GetType(), Value: s.GetValue()})
	}
	return out
}

func readEntryID(in *typespb.SPIFFEID) *entry.InputID {
	if in == nil {
		return nil
	}
	return &entry.InputID{TrustDomain: in.GetTrustDomain(), Path: in.GetPath()}
}

// readFields is what an input mask selects; without a mask everything. The ID
// names the entry and is never changed; revision and time of creation are the
// authority's.
func readFields(m *typespb.EntryMask) entry.Fields {
	if m == nil {
		return entry.AllFields &^ entry.FieldID
	}
	var out entry.Fields
	for _, f := range []struct {
		given bool
		field entry.Fields
	}{
		{m.GetParentId(), entry.FieldParentID},
		{m.GetSpiffeId(), entry.FieldSPIFFEID},
		{m.GetSelectors(), entry.FieldSelectors},
		{m.GetX509SvidTtl(), entry.FieldX509SVIDTTL},
		{m.GetJwtSvidTtl(), entry.FieldJWTSVIDTTL},
		{m.GetFederatesWith(), entry.FieldFederatesWith},
		{m.GetDnsNames(), entry.FieldDNSNames},
		{m.GetHint(), entry.FieldHint},
		{m.GetAdmin(), entry.FieldAdmin},
		{m.GetDownstream(), entry.FieldDownstream},
		{m.GetStoreSvid(), entry.FieldStoreSVID},
		{m.GetExpiresAt(), entry.FieldExpiresAt},
		{m.GetAdditionalAttributes(), entry.FieldAttributes},
	} {
		if f.given {
			out |= f.field
		}
	}
	return out
}

// errStorable is what the server's datastore says to a new entry whose SVID is
// to be stored and not fetched ahead.
var errStorable = errors.New("datastore-validation: specifying cache behaviour is incompatible with storable SVIDs")

// entryFailure turns what a check or the store said into an answer; message
// says what was to be done.
func entryFailure(message string, err error) error {
	var (
		conversion *entry.ConversionError
		store      *entry.StoreError
		repeat     *entry.RepeatError
		similar    *embedded.SimilarError
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &similar):
		return fail(codes.AlreadyExists, similar.Error(), nil)
	case errors.As(err, &conversion):
		return invalid("failed to convert entry", conversion)
	case errors.As(err, &store):
		return invalid(message, store)
	case errors.Is(err, errStorable):
		return invalid(message, err)
	case errors.As(err, &repeat):
		return fail(codes.AlreadyExists, message, repeat)
	case errors.Is(err, embedded.ErrNotFound):
		return fail(codes.NotFound, message, nil)
	case errors.Is(err, embedded.ErrExists):
		return fail(codes.AlreadyExists, message, err)
	case errors.Is(err, embedded.ErrInvalid):
		return invalid(message, err)
	}
	// A missing bundle is among these: the server has no better code for it.
	return fail(codes.Internal, message, err)
}
