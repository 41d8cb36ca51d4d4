package entry

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// The texts in this file are SPIRE Server's: clients compare them.

// ConversionError says why what a client wrote is no entry. The server answers
// code 3 and puts "failed to convert entry: " before the text.
type ConversionError struct{ Err error }

// Error is the text without the server's prefix.
func (e *ConversionError) Error() string { return e.Err.Error() }

// Unwrap is the cause.
func (e *ConversionError) Unwrap() error { return e.Err }

// StoreError says why the store refuses an entry. The server answers code 3 and
// puts "failed to create entry: " (or update) before the text.
type StoreError struct{ Reason string }

// Error is the text without the server's prefix.
func (e *StoreError) Error() string { return "datastore-validation: " + e.Reason }

func invalidEntry(reason string) error {
	return &StoreError{"invalid registration entry: " + reason}
}

// RepeatError says that a selector or DNS name is given twice. The server
// answers code 6 and puts "failed to create entry: " (or update) before the text.
type RepeatError struct{ columns string }

// Error is the text without the server's prefix.
func (e *RepeatError) Error() string {
	return "datastore-sql: UNIQUE constraint failed: " + e.columns
}

// Limits of an entry's fields, in bytes.
const (
	MaxHint = 1024
	MaxID   = 255
)

var (
	errNoID        = errors.New("request must specify SPIFFE ID")
	errNoSelectors = errors.New("selector list is empty")
	errHint        = errors.New("hint is too long, max length is 1024 characters")
)

// Validate checks a new entry that was not read from an Input, by the same
// rules and with the same errors. td is the authority's trust domain.
func (e *Entry) Validate(td spiffeid.TrustDomain) error {
	return e.validate(td, AllFields)
}

// ValidateUpdate is Validate for an entry that has been updated. SPIRE Server
// lets updates make what it would not have created: a storable SVID with mixed
// selector types (unless the update names the selectors) or without prefetch.
// Apply looks at the former.
func (e *Entry) ValidateUpdate(td spiffeid.TrustDomain) error {
	return e.validate(td, FieldX509SVIDTTL|FieldJWTSVIDTTL)
}

func (e *Entry) validate(td spiffeid.TrustDomain, store Fields) error {
	if err := e.validateContent(td); err != nil {
		return &ConversionError{err}
	}
	return e.checkStore(store)
}

func (e *Entry) validateContent(td spiffeid.TrustDomain) error {
	if err := checkParentID(td, e.ParentID); err != nil {
		return err
	}
	if err := checkSPIFFEID(td, e.SPIFFEID); err != nil {
		return err
	}
	if err := checkDNSNames(e.DNSNames); err != nil {
		return err
	}
	for _, with := range e.FederatesWith {
		if with.IsZero() {
			return fmt.Errorf("invalid federated trust domain: %w", errNoTrustDomain)
		}
	}
	switch {
	case e.Selectors.Len() == 0:
		return errNoSelectors
	case len(e.Hint) > MaxHint:
		return errHint
	}
	return nil
}

var errNoTrustDomain = errors.New("trust domain is missing")

// checkStore is what the server's data store checks of the fields written, in
// its order. Only a new entry has its ID among them.
func (e *Entry) checkStore(fields Fields) error {
	if fields&FieldID != 0 && e.StoreSVID && e.DisableX509SVIDPrefetch {
		return &StoreError{"specifying cache behaviour is incompatible with storable SVIDs"}
	}
	if fields&FieldSelectors != 0 && e.StoreSVID && !oneType(e.Selectors) {
		return invalidEntry("selector types must be the same when store SVID is enabled")
	}
	if fields&FieldID != 0 {
		if len(e.ID) > MaxID {
			return invalidEntry("entry ID too long")
		}
		if strings.ContainsFunc(e.ID, func(r rune) bool { return !idRune(r) }) {
			return invalidEntry("entry ID contains invalid characters")
		}
	}
	if fields&FieldX509SVIDTTL != 0 && e.X509SVIDTTL < 0 {
		return invalidEntry("X509SvidTtl is not set")
	}
	if fields&FieldJWTSVIDTTL != 0 && e.JWTSVIDTTL < 0 {
		return invalidEntry("JwtSvidTtl is not set")
	}
	return nil
}

func oneType(s selector.Set) bool {
	// The set is sorted by type first.
	return s.Len() == 0 || s.At(0).Type() == s.At(s.Len()-1).Type()
}

func idRune(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '-' || r == '.' || r == '_'
}

func checkParentID(td spiffeid.TrustDomain, id spiffeid.ID) error {
	err := checkGiven(id)
	if err == nil {
		err = CheckMember(td, id)
	}
	if err != nil {
		return fmt.Errorf("invalid parent ID: %w", err)
	}
	return nil
}

func checkSPIFFEID(td spiffeid.TrustDomain, id spiffeid.ID) error {
	err := checkGiven(id)
	if err == nil {
		err = CheckWorkload(td, id)
	}
	if err != nil {
		return fmt.Errorf("invalid spiffe ID: %w", err)
	}
	return nil
}

func checkGiven(id spiffeid.ID) error {
	if id.IsZero() {
		return errNoID
	}
	return nil
}

// CheckMember refuses IDs outside the trust domain and the trust domain's own.
func CheckMember(td spiffeid.TrustDomain, id spiffeid.ID) error {
	return checkPath(td, id, "a member of")
}

// CheckWorkload refuses what CheckMember refuses and the path /spire with
// everything below it.
func CheckWorkload(td spiffeid.TrustDomain, id spiffeid.ID) error {
	if err := checkPath(td, id, "a workload in"); err != nil {
		return err
	}
	if path := id.Path(); path == "/spire" || strings.HasPrefix(path, "/spire/") {
		return fmt.Errorf("%q is not a workload in trust domain %q; path is in the reserved namespace", id, td)
	}
	return nil
}

func checkPath(td spiffeid.TrustDomain, id spiffeid.ID, what string) error {
	switch {
	case !id.MemberOf(td):
		return fmt.Errorf("%q is not a member of trust domain %q", id, td)
	case id.Path() == "":
		return fmt.Errorf("%q is not %s trust domain %q; path is empty", id, what, td)
	}
	return nil
}
