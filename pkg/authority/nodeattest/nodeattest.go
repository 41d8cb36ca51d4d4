// Package nodeattest is what node attestors have in common: an agent sends a
// proof of the node it runs on, and an attestor in the authority turns it into
// the agent's SPIFFE ID and selectors of the node.
//
// Promise: an attestor either returns a result it vouches for, or an error
// whose kind says whether the proof was unusable (ErrInvalid), understood and
// refused (ErrDenied), or could not be looked at (anything else).
//
// Threats: whoever reaches the authority's port can send a proof, so payloads
// are hostile until proven: bounded, parsed strictly, never quoted in errors
// when they are secrets.
package nodeattest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// The kinds of errors of an attestor.
var (
	// ErrInvalid: the payload is not what this attestor reads, or cannot be
	// used any more.
	ErrInvalid = errors.New("attestation data is invalid")
	// ErrDenied: the proof was understood and does not suffice.
	ErrDenied = errors.New("attestation denied")
)

// Result is an agent whose node has been proven.
type Result struct {
	// AgentID lies below /spire/agent/ and the attestor's type.
	AgentID spiffeid.ID
	// Selectors describe the node; entries for node aliases match them.
	Selectors attest.Selectors
	// Reattestable agents attest again instead of renewing their SVID.
	Reattestable bool
}

// Invalid is an ErrInvalid with a text for the agent.
func Invalid(format string, args ...any) error {
	return &kindError{ErrInvalid, fmt.Sprintf(format, args...)}
}

// Denied is an ErrDenied with a text for the agent.
func Denied(format string, args ...any) error {
	return &kindError{ErrDenied, fmt.Sprintf(format, args...)}
}

type kindError struct {
	kind error
	text string
}

// Error is the text alone: clients compare it.
func (e *kindError) Error() string { return e.text }

// Is makes it its kind.
func (e *kindError) Is(target error) bool { return target == e.kind }

type callerKey struct{}

// WithCaller is a context in which the agent's connection comes from address.
func WithCaller(ctx context.Context, address netip.Addr) context.Context {
	return context.WithValue(ctx, callerKey{}, address)
}

// Caller is where the agent's connection comes from; not valid if nobody said.
func Caller(ctx context.Context) netip.Addr {
	address, _ := ctx.Value(callerKey{}).(netip.Addr)
	return address
}
