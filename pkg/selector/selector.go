// Package selector is the one fact registration entries and callers have in
// common: a selector, and sets of them.
//
// It promises that a selector has both its parts, that sets are immutable,
// sorted and without repetitions, and that it runs wherever Go does: people
// look at entries on machines that could attest nobody. Threat: both come from
// outside; whatever they hold, comparing them costs no more than their length.
package selector

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

// Errors of New and Parse. The texts are those SPIRE Server
// returns for the same mistakes.
var (
	ErrFormat       = errors.New("must be formatted as type:value")
	ErrTypeMissing  = errors.New("missing selector type")
	ErrTypeColon    = errors.New("selector type contains ':'")
	ErrValueMissing = errors.New("missing selector value")
)

// New builds a selector from its two parts.
func New(kind, value string) (Selector, error) {
	switch {
	case kind == "":
		return Selector{}, ErrTypeMissing
	case strings.Contains(kind, ":"):
		return Selector{}, ErrTypeColon
	case value == "":
		return Selector{}, ErrValueMissing
	}
	return Selector{kind: kind, value: value}, nil
}

// Parse reads the type:value form; the value may contain colons.
func Parse(s string) (Selector, error) {
	kind, value, ok := strings.Cut(s, ":")
	if !ok {
		return Selector{}, fmt.Errorf("selector %q %w", s, ErrFormat)
	}
	sel, err := New(kind, value)
	if err != nil {
		return Selector{}, fmt.Errorf("selector %q: %w", s, err)
	}
	return sel, nil
}

// Must is Parse for constants and tests; it panics on a bad
// selector.
func Must(s string) Selector {
	sel, err := Parse(s)
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
	sel, err := Parse(string(text))
	if err != nil {
		return err
	}
	*s = sel
	return nil
}

// Set is an immutable, sorted set of selectors. The zero value is the
// empty set. Safe for concurrent use.
type Set struct {
	sorted []Selector
}

// NewSet builds a set; zero selectors and repetitions are dropped.
func NewSet(in ...Selector) Set {
	out := make([]Selector, 0, len(in))
	for _, s := range in {
		if !s.IsZero() {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, Selector.Compare)
	return Set{sorted: slices.Clip(slices.Compact(out))}
}

// MustSet is NewSet over Must.
func MustSet(in ...string) Set {
	out := make([]Selector, len(in))
	for i, s := range in {
		out[i] = Must(s)
	}
	return NewSet(out...)
}

// Len is the number of selectors in the set.
func (s Set) Len() int { return len(s.sorted) }

// All yields the selectors in order.
func (s Set) All() iter.Seq[Selector] { return slices.Values(s.sorted) }

// At is the i-th selector in order.
func (s Set) At(i int) Selector { return s.sorted[i] }

// Contains says whether sel is in the set.
func (s Set) Contains(sel Selector) bool {
	_, ok := slices.BinarySearchFunc(s.sorted, sel, Selector.Compare)
	return ok
}

// SubsetOf says whether every selector of s is in o. The empty set is a subset
// of every set.
func (s Set) SubsetOf(o Set) bool {
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
func (s Set) Equal(o Set) bool { return slices.Equal(s.sorted, o.sorted) }

// Union is the set of selectors in s or o.
func (s Set) Union(o Set) Set {
	if s.Len() == 0 {
		return o
	}
	if o.Len() == 0 {
		return s
	}
	return NewSet(slices.Concat(s.sorted, o.sorted)...)
}

// Strings is the set in type:value form, in order.
func (s Set) Strings() []string {
	out := make([]string, len(s.sorted))
	for i, sel := range s.sorted {
		out[i] = sel.String()
	}
	return out
}

// Key is a text that is equal for equal sets and different for different ones.
func (s Set) Key() string { return strings.Join(s.Strings(), "\x00") }

// OfPod are the selectors of a pod as a whole that name it, in SPIRE's
// spelling; what is empty is left out.
func OfPod(uid, namespace, serviceAccount, name, node string) []Selector {
	out := make([]Selector, 0, 5)
	for _, s := range [...]struct{ name, value string }{
		{"pod-uid", uid},
		{"ns", namespace},
		{"sa", serviceAccount},
		{"pod-name", name},
		{"node-name", node},
	} {
		if s.value != "" {
			out = append(out, Selector{kind: "k8s", value: s.name + ":" + s.value})
		}
	}
	return out
}
