package main

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/federation"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/registration"
)

// Relationships of resources and those made by hand are kept apart, and the
// resource hears how fetching goes.
func TestDeclaredRelationships(t *testing.T) {
	a, err := embedded.Open(embedded.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), StatePath: filepath.Join(t.TempDir(), "state", "authority.db"),
	})
	if err != nil {
		t.Fatal(err)
	}
	poller, err := federation.New(federation.Config{Store: a, Fetch: func(context.Context, embedded.Relationship) (*spiffebundle.Bundle, error) {
		return nil, errors.New("nobody is there")
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- poller.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, a.Close()); err != nil {
			t.Error(err)
		}
	})
	d := declared{a, poller}
	hand, mine := spiffeid.RequireTrustDomainFromString("hand.org"), spiffeid.RequireTrustDomainFromString("mine.org")
	if _, err := a.CreateRelationship(ctx, embedded.Relationship{TrustDomain: hand, EndpointURL: "https://hand.org"}, nil); err != nil {
		t.Fatal(err)
	}
	want := registration.Relationship{TrustDomain: mine, URL: "https://mine.org", EndpointSPIFFEID: spiffeid.RequireFromPath(mine, "/x")}
	changed := d.Changed()
	for range 2 {
		if err := d.SetRelationship(ctx, want); err != nil {
			t.Fatal(err)
		}
	}
	<-changed
	if got, err := d.Registered(ctx); err != nil || len(got) != 1 || got[0] != want {
		t.Errorf("registered are %v, %v", got, err)
	}
	if err := d.SetRelationship(ctx, registration.Relationship{TrustDomain: hand, URL: "https://other.org"}); !errors.Is(err, embedded.ErrPrecondition) {
		t.Errorf("the one made by hand was replaced: %v", err)
	}
	if err := poller.Refresh(ctx, mine); err == nil {
		t.Error("it was fetched")
	}
	if r, ok := d.Refresh(mine); !ok || r.Error == "" || r.Fetched || r.Stale {
		t.Errorf("it is said to be %+v, %t", r, ok)
	}
	if _, ok := d.Refresh(spiffeid.RequireTrustDomainFromString("none.org")); ok {
		t.Error("something is known of a stranger")
	}
	for _, td := range []spiffeid.TrustDomain{hand, mine, mine} {
		if err := d.DeleteRelationship(ctx, td); err != nil {
			t.Error(err)
		}
	}
	if left := a.Relationships(); len(left) != 1 || left[0].TrustDomain != hand {
		t.Errorf("left are %v", left)
	}
}
