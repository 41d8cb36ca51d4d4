package attest

import "github.com/spiffe-node/spiffe-node/pkg/selector"

// Selector is one attested fact about a caller; see package selector.
type Selector = selector.Selector

// Selectors is a set of them.
type Selectors = selector.Set

// Errors of NewSelector and ParseSelector.
var (
	ErrSelectorFormat       = selector.ErrFormat
	ErrSelectorTypeMissing  = selector.ErrTypeMissing
	ErrSelectorTypeColon    = selector.ErrTypeColon
	ErrSelectorValueMissing = selector.ErrValueMissing
)

// NewSelector builds a selector from its two parts.
func NewSelector(kind, value string) (Selector, error) { return selector.New(kind, value) }

// ParseSelector reads the type:value form; the value may contain colons.
func ParseSelector(s string) (Selector, error) { return selector.Parse(s) }

// MustSelector is ParseSelector for constants and tests; it panics on a bad
// selector.
func MustSelector(s string) Selector { return selector.Must(s) }

// NewSelectors builds a set; zero selectors and repetitions are dropped.
func NewSelectors(in ...Selector) Selectors { return selector.NewSet(in...) }

// MustSelectors is NewSelectors over MustSelector.
func MustSelectors(in ...string) Selectors { return selector.MustSet(in...) }
