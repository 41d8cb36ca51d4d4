package jointoken_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/jointoken"
)

// tokens are those that a store has.
type tokens map[string]time.Time

func (s tokens) UseJoinToken(_ context.Context, value string) (*embedded.JoinToken, error) {
	if value == "disk" {
		return nil, errors.New("disk is full")
	}
	expires, ok := s[value]
	if !ok {
		return nil, embedded.ErrNotFound
	}
	delete(s, value)
	return &embedded.JoinToken{Value: value, ExpiresAt: expires}, nil
}

var td = spiffeid.RequireTrustDomainFromString("example.org")

func TestAttest(t *testing.T) {
	a := jointoken.New(td, tokens{"good": time.Now().Add(time.Minute), "old": time.Now().Add(-time.Minute), "a/b": time.Now().Add(time.Minute)})
	if a.Type() != "join_token" {
		t.Error(a.Type())
	}
	got, err := a.Attest(t.Context(), []byte("good"), nil)
	if err != nil || got.AgentID.String() != "spiffe://example.org/spire/agent/join_token/good" || got.Reattestable || got.Selectors.Len() != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	for _, tc := range []struct {
		token, want string
		kind        error
	}{
		{"good", "failed to attest: join token does not exist or has already been used", nodeattest.ErrInvalid},
		{"old", "join token expired", nodeattest.ErrInvalid},
		{"old", "failed to attest: join token does not exist or has already been used", nodeattest.ErrInvalid},
		{"a/b", "failed to create join token ID: path segment characters are limited to letters, numbers, dots, dashes, and underscores", nil},
		{"disk", "failed to delete join token: disk is full", nil},
	} {
		_, err := a.Attest(t.Context(), []byte(tc.token), nil)
		if err == nil || err.Error() != tc.want || errors.Is(err, nodeattest.ErrInvalid) != (tc.kind != nil) || errors.Is(err, nodeattest.ErrDenied) {
			t.Errorf("%s: %v", tc.token, err)
		}
	}
}

// FuzzToken: only the token itself gets in, and whatever gets in has an ID.
func FuzzToken(f *testing.F) {
	f.Add("good", []byte("good"))
	f.Add("a/b", []byte("a/b"))
	f.Add("..", []byte(".."))
	f.Add("", []byte{})
	f.Add("\xff", []byte("\xff"))
	f.Fuzz(func(t *testing.T, stored string, sent []byte) {
		a := jointoken.New(td, tokens{stored: time.Now().Add(time.Hour)})
		got, err := a.Attest(t.Context(), sent, nil)
		if err == nil && (stored != string(sent) || got.AgentID.Path() != "/spire/agent/join_token/"+stored) {
			t.Errorf("%q got in with %q as %s", sent, stored, got.AgentID)
		}
		if _, err := a.Attest(t.Context(), sent, nil); err == nil {
			t.Errorf("%q got in twice", sent)
		}
	})
}
