package embedded

import (
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Errors of changes. What is none of these is an internal fault, most often of
// the disk. The texts are those of SPIRE Server where clients compare them.
var (
	// ErrNotFound: nothing has this ID or name.
	ErrNotFound = errors.New("not found")
	// ErrExists: the ID or name is taken.
	ErrExists = errors.New("already exists")
	// ErrInvalid: the request was refused for its content.
	ErrInvalid = errors.New("invalid")
	// ErrPrecondition: the request is fine but not in the present state.
	ErrPrecondition = errors.New("failed precondition")
	// ErrReadOnly: the state file could only be opened for reading, or an
	// earlier write left it in doubt. Reading and signing go on.
	ErrReadOnly = errors.New("state is read-only")
)

// Errors of Open.
var (
	// ErrCorrupt: the state file is damaged. It was not touched.
	ErrCorrupt = errors.New("corrupt state file")
	// ErrLocked: another process has the state file open.
	ErrLocked = errors.New("state file is in use")
	// ErrForeign: the state belongs to another trust domain.
	ErrForeign = errors.New("state of another trust domain")
	// ErrNewer: a newer version of this program wrote the state.
	ErrNewer = errors.New("state of a newer version")
)

var errClosed = fmt.Errorf("%w: the embedded authority is closed", authority.ErrNotReady)

// SimilarError refuses a second entry with the SPIFFE ID, parent and selectors
// of a stored one. It is an ErrExists.
type SimilarError struct{ Stored *entry.Entry }

// Error is SPIRE Server's text.
func (e *SimilarError) Error() string { return "similar entry already exists" }

// Is makes it an ErrExists.
func (e *SimilarError) Is(target error) bool { return target == ErrExists }

// NoBundleError refuses an entry that federates with a trust domain without a
// stored bundle.
type NoBundleError struct{ TrustDomain spiffeid.TrustDomain }

// Error is SPIRE Server's text.
func (e *NoBundleError) Error() string {
	return fmt.Sprintf("unable to find federated bundle %q", e.TrustDomain.IDString())
}

// InUseError refuses to delete a bundle that entries federate with. It is an
// ErrPrecondition.
type InUseError struct{ Entries int }

// Error is SPIRE Server's text.
func (e *InUseError) Error() string {
	return fmt.Sprintf("cannot delete bundle; federated with %d registration entries", e.Entries)
}

// Is makes it an ErrPrecondition.
func (e *InUseError) Is(target error) bool { return target == ErrPrecondition }

// kindError is a text that clients compare, of one of the kinds above.
type kindError struct {
	kind  error
	text  string
	cause error
}

// Error is the text and the cause, if any.
func (e *kindError) Error() string {
	switch {
	case e.cause == nil:
		return e.text
	case e.text == "":
		return e.cause.Error()
	default:
		return e.text + ": " + e.cause.Error()
	}
}

// Is makes it its kind.
func (e *kindError) Is(target error) bool { return target == e.kind }

// Unwrap is the cause.
func (e *kindError) Unwrap() error { return e.cause }

func invalid(text string, cause error) error { return &kindError{ErrInvalid, text, cause} }
func exists(text string) error               { return &kindError{ErrExists, text, nil} }
func notFound(text string) error             { return &kindError{ErrNotFound, text, nil} }
