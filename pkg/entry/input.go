package entry

import (
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// Input is an entry as a client spells it: nothing in it has been checked.
type Input struct {
	ID       string
	ParentID *InputID // nil = not given
	SPIFFEID *InputID // nil = not given
	// Selectors in the order given, repetitions included.
	Selectors               []InputSelector
	X509SVIDTTL             int32    // seconds, 0 = the authority's default
	JWTSVIDTTL              int32    // seconds, 0 = the authority's default
	FederatesWith           []string // names, or SPIFFE IDs of which only the trust domain counts
	DNSNames                []string
	Hint                    string
	Admin                   bool
	Downstream              bool
	StoreSVID               bool
	ExpiresAt               int64 // seconds since 1970, 0 = never
	DisableX509SVIDPrefetch bool
	JWTSVIDIncludeJTI       bool
}

// InputID is a SPIFFE ID in two parts. TrustDomain may also be a whole SPIFFE
// ID, of which only the trust domain counts.
type InputID struct{ TrustDomain, Path string }

// InputSelector is a selector in two parts.
type InputSelector struct{ Type, Value string }

// Fields is a set of an entry's fields.
type Fields uint32

// The fields an Input sets. Prefetch and JTI travel together as the wire's
// additional attributes.
const (
	FieldID Fields = 1 << iota
	FieldParentID
	FieldSPIFFEID
	FieldSelectors
	FieldX509SVIDTTL
	FieldJWTSVIDTTL
	FieldFederatesWith
	FieldDNSNames
	FieldHint
	FieldAdmin
	FieldDownstream
	FieldStoreSVID
	FieldExpiresAt
	FieldAttributes

	// AllFields are all of them.
	AllFields = 1<<iota - 1
)

// Entry reads the whole input as a new entry. td is the authority's trust
// domain. Errors: *ConversionError, *StoreError; with several mistakes the one
// SPIRE Server would name.
func (in *Input) Entry(td spiffeid.TrustDomain) (*Entry, error) {
	return in.Apply(&Entry{}, AllFields, td)
}

// Apply is a copy of base in which the given fields are the input's; only they
// are checked. Lists are replaced, not merged. Fields of an update leave out
// FieldID. Errors as of Entry.
func (in *Input) Apply(base *Entry, fields Fields, td spiffeid.TrustDomain) (*Entry, error) {
	e := base.Clone()
	if err := in.convert(e, fields, td); err != nil {
		return nil, &ConversionError{err}
	}
	if err := e.checkStore(fields); err != nil {
		return nil, err
	}
	return e, nil
}

// convert sets the fields in the order in which the server looks at them.
func (in *Input) convert(e *Entry, fields Fields, td spiffeid.TrustDomain) (err error) {
	if fields&FieldID != 0 {
		e.ID = in.ID
	}
	if fields&FieldParentID != 0 {
		if e.ParentID, err = in.ParentID.parse(); err != nil {
			return fmt.Errorf("invalid parent ID: %w", err)
		}
		if err := checkParentID(td, e.ParentID); err != nil {
			return err
		}
	}
	if fields&FieldSPIFFEID != 0 {
		if e.SPIFFEID, err = in.SPIFFEID.parse(); err != nil {
			return fmt.Errorf("invalid spiffe ID: %w", err)
		}
		if err := checkSPIFFEID(td, e.SPIFFEID); err != nil {
			return err
		}
	}
	if fields&FieldDNSNames != 0 {
		if err := checkDNSNames(in.DNSNames); err != nil {
			return err
		}
		e.DNSNames = slices.Clone(in.DNSNames)
	}
	if fields&FieldFederatesWith != 0 {
		if e.FederatesWith, err = in.federatesWith(); err != nil {
			return err
		}
	}
	if fields&FieldSelectors != 0 {
		if e.Selectors, err = in.selectors(); err != nil {
			return err
		}
	}
	if fields&FieldHint != 0 {
		if len(in.Hint) > MaxHint {
			return errHint
		}
		e.Hint = in.Hint
	}
	in.convertRest(e, fields)
	return nil
}

// convertRest sets the fields that nothing is wrong with by themselves.
func (in *Input) convertRest(e *Entry, fields Fields) {
	if fields&FieldX509SVIDTTL != 0 {
		e.X509SVIDTTL = time.Duration(in.X509SVIDTTL) * time.Second
	}
	if fields&FieldJWTSVIDTTL != 0 {
		e.JWTSVIDTTL = time.Duration(in.JWTSVIDTTL) * time.Second
	}
	if fields&FieldAdmin != 0 {
		e.Admin = in.Admin
	}
	if fields&FieldDownstream != 0 {
		e.Downstream = in.Downstream
	}
	if fields&FieldExpiresAt != 0 {
		e.ExpiresAt = fromUnix(in.ExpiresAt)
	}
	if fields&FieldStoreSVID != 0 {
		e.StoreSVID = in.StoreSVID
	}
	if fields&FieldAttributes != 0 {
		e.DisableX509SVIDPrefetch, e.JWTSVIDIncludeJTI = in.DisableX509SVIDPrefetch, in.JWTSVIDIncludeJTI
	}
}

// fromUnix is the time of a number any client may have sent: 0 is never, and
// one that time.Time cannot hold must not come out as a time long past.
func fromUnix(seconds int64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(min(seconds, 1<<61), 0).UTC()
}

func (in *InputID) parse() (spiffeid.ID, error) {
	if in == nil {
		return spiffeid.ID{}, errNoID
	}
	td, err := spiffeid.TrustDomainFromString(in.TrustDomain)
	if err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromPath(td, in.Path)
}

func (in *Input) federatesWith() ([]spiffeid.TrustDomain, error) {
	var out []spiffeid.TrustDomain
	for _, s := range in.FederatesWith {
		td, err := spiffeid.TrustDomainFromString(s)
		if err != nil {
			return nil, fmt.Errorf("invalid federated trust domain: %w", err)
		}
		if !slices.Contains(out, td) {
			out = append(out, td)
		}
	}
	return out, nil
}

func (in *Input) selectors() (selector.Set, error) {
	if len(in.Selectors) == 0 {
		return selector.Set{}, errNoSelectors
	}
	out := make([]selector.Selector, len(in.Selectors))
	for i, s := range in.Selectors {
		var err error
		if out[i], err = selector.New(s.Type, s.Value); err != nil {
			return selector.Set{}, err
		}
	}
	return selector.NewSet(out...), nil
}

// CheckRepeated is the last check before an entry is stored, after those for
// similar entries, taken IDs and missing bundles: a *RepeatError if a selector
// or a DNS name is given twice.
func (in *Input) CheckRepeated(fields Fields) error {
	if fields&FieldSelectors != 0 && repeated(in.Selectors) {
		return &RepeatError{"selectors.registered_entry_id, selectors.type, selectors.value"}
	}
	if fields&FieldDNSNames != 0 && repeated(in.DNSNames) {
		return &RepeatError{"dns_names.registered_entry_id, dns_names.value"}
	}
	return nil
}

func repeated[T comparable](list []T) bool {
	seen := make(map[T]bool, len(list))
	for _, v := range list {
		if seen[v] {
			return true
		}
		seen[v] = true
	}
	return false
}
