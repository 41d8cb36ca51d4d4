// Package jointoken attests agents by a secret that an administrator made for
// one of them: the join_token type of SPIRE.
//
// Promise: a token attests one agent once. It is gone from the store before
// anything is signed, so neither a race nor a crash lets a second agent in.
//
// Threats: who has the token is the agent. It is a bearer secret with a short
// life; it is no part of errors or logs here (the agent's SPIFFE ID contains
// it, and by then it has been used up).
package jointoken

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
)

// Type is the attestation type.
const Type = "join_token"

// Store hands out each token once; *embedded.Authority is one.
type Store interface {
	// UseJoinToken removes a token durably and returns it. Error:
	// embedded.ErrNotFound.
	UseJoinToken(ctx context.Context, value string) (*embedded.JoinToken, error)
}

// Attestor attests by join token. Safe for concurrent use.
type Attestor struct {
	td    spiffeid.TrustDomain
	store Store
}

// New is an attestor for the tokens of a store.
func New(td spiffeid.TrustDomain, store Store) *Attestor { return &Attestor{td, store} }

// Type is join_token.
func (a *Attestor) Type() string { return Type }

// Attest takes the token itself as payload; it asks for no challenge.
func (a *Attestor) Attest(ctx context.Context, payload []byte, _ func([]byte) ([]byte, error)) (*nodeattest.Result, error) {
	token, err := a.store.UseJoinToken(ctx, string(payload))
	switch {
	case errors.Is(err, embedded.ErrNotFound):
		return nil, nodeattest.Invalid("failed to attest: join token does not exist or has already been used")
	case err != nil:
		return nil, fmt.Errorf("failed to delete join token: %w", err)
	case !time.Now().Before(token.ExpiresAt):
		return nil, nodeattest.Invalid("join token expired")
	}
	id, err := embedded.JoinTokenAgentID(a.td, token.Value)
	if err != nil {
		return nil, fmt.Errorf("failed to create join token ID: %w", err)
	}
	return &nodeattest.Result{AgentID: id}, nil
}
