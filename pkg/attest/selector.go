package attest

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
)

// Selector is one attested fact about a caller, such as k8s:ns:default: a type
// and a value. The zero value is no selector. Selectors are comparable and
// cannot be built with an empty part or a colon in the type.
type Selector struct {
	kind  string
	value string
}

// Errors of NewSelector and ParseSelector. The texts are those SPIRE Server
// returns for the same mistakes.
var (
	ErrSelectorFormat       = errors.New("must be formatted as type:value")
	ErrSelectorTypeMissing  = errors.New("missing selector type")
	ErrSelectorTypeColon    = errors.New("selector type contains ':'")
	ErrSelectorValueMissing = errors.New("missing selector value")
)

// NewSelector builds a selector from its two parts.
func NewSelector(kind, value string) (Selector, error) {
	switch {
	case kind == "":
		return Selector{}, ErrSelectorTypeMissing
	case strings.Contains(kind, ":"):
		return Selector{}, ErrSelectorTypeColon
	case value == "":
		return Selector{}, ErrSelectorValueMissing
	}
	return Selector{kind: kind, value: value}, nil
}

// ParseSelector reads the type:value form; the value may contain colons.
func ParseSelector(s string) (Selector, error) {
	kind, value, ok := strings.Cut(s, ":")
	if !ok {
		return Selector{}, fmt.Errorf("selector %q %w", s, ErrSelectorFormat)
	}
	sel, err := NewSelector(kind, value)
	if err != nil {
		return Selector{}, fmt.Errorf("selector %q: %w", s, err)
	}
	return sel, nil
}

// MustSelector is ParseSelector for constants and tests; it panics on a bad
// selector.
func MustSelector(s string) Selector {
	sel, err := ParseSelector(s)
	if err != nil {
		panic(err)
	}
	return sel
}

// Type is the part before the first colon.
func (s Selector) Type() string { return s.kind }

// Value is everything after the first colon.
func (s Selector) Value() string { return s.value }

// IsZero says whether s is no selector.
func (s Selector) IsZero() bool { return s == Selector{} }

// String is the type:value form.
func (s Selector) String() string { return s.kind + ":" + s.value }

// Compare orders selectors by type, then by value.
func (s Selector) Compare(o Selector) int {
	return cmp.Or(cmp.Compare(s.kind, o.kind), cmp.Compare(s.value, o.value))
}

// MarshalText is the type:value form.
func (s Selector) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is the reverse of MarshalText; the empty text is no selector.
func (s *Selector) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*s = Selector{}
		return nil
	}
	sel, err := ParseSelector(string(text))
	if err != nil {
		return err
	}
	*s = sel
	return nil
}

// Selectors is an immutable, sorted set of selectors. The zero value is the
// empty set. Safe for concurrent use.
type Selectors struct {
	sorted []Selector
}

// NewSelectors builds a set; zero selectors and repetitions are dropped.
func NewSelectors(in ...Selector) Selectors {
	out := make([]Selector, 0, len(in))
	for _, s := range in {
		if !s.IsZero() {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, Selector.Compare)
	return Selectors{sorted: slices.Clip(slices.Compact(out))}
}

// MustSelectors is NewSelectors over MustSelector.
func MustSelectors(in ...string) Selectors {
	out := make([]Selector, len(in))
	for i, s := range in {
		out[i] = MustSelector(s)
	}
	return NewSelectors(out...)
}

// Len is the number of selectors in the set.
func (s Selectors) Len() int { return len(s.sorted) }

// All yields the selectors in order.
func (s Selectors) All() iter.Seq[Selector] { return slices.Values(s.sorted) }

// At is the i-th selector in order.
func (s Selectors) At(i int) Selector { return s.sorted[i] }

// Contains says whether sel is in the set.
func (s Selectors) Contains(sel Selector) bool {
	_, ok := slices.BinarySearchFunc(s.sorted, sel, Selector.Compare)
	return ok
}

// SubsetOf says whether every selector of s is in o. The empty set is a subset
// of every set.
func (s Selectors) SubsetOf(o Selectors) bool {
	if len(s.sorted) > len(o.sorted) {
		return false
	}
	i := 0
	for _, want := range s.sorted {
		for i < len(o.sorted) && o.sorted[i] != want {
			i++
		}
		if i == len(o.sorted) {
			return false
		}
		i++
	}
	return true
}

// Equal says whether both sets hold the same selectors.
func (s Selectors) Equal(o Selectors) bool { return slices.Equal(s.sorted, o.sorted) }

// Union is the set of selectors in s or o.
func (s Selectors) Union(o Selectors) Selectors {
	if s.Len() == 0 {
		return o
	}
	if o.Len() == 0 {
		return s
	}
	return NewSelectors(slices.Concat(s.sorted, o.sorted)...)
}

// Strings is the set in type:value form, in order.
func (s Selectors) Strings() []string {
	out := make([]string, len(s.sorted))
	for i, sel := range s.sorted {
		out[i] = sel.String()
	}
	return out
}

// Key is a text that is equal for equal sets and different for different ones.
func (s Selectors) Key() string { return strings.Join(s.Strings(), "\x00") }
