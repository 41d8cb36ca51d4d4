package embedded_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bolt "go.etcd.io/bbolt"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

func relationship(name string) embedded.Relationship {
	return embedded.Relationship{TrustDomain: spiffeid.RequireTrustDomainFromString(name), EndpointURL: "https://" + name}
}

func sameRelationships(t *testing.T, got, want []embedded.Relationship) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b embedded.Relationship) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Relationships are kept across restarts, in the order of their creation, and
// rows are not used twice.
func TestRelationshipsAreKept(t *testing.T) {
	cfg := testConfig(t)
	a := start(t, cfg)
	ctx := t.Context()
	changed := a.RelationshipChanges()
	one, err := a.CreateRelationship(ctx, relationship("one.org"), nil)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody is told of the new relationship")
	}
	two := relationship("two.org")
	two.EndpointID = spiffeid.RequireFromString("spiffe://elsewhere.org/x")
	bundle := &embedded.Bundle{TrustDomain: two.TrustDomain, X509: a.OwnBundle().X509, Sequence: 3}
	if two, err = a.CreateRelationship(ctx, two, bundle); err != nil {
		t.Fatal(err)
	}
	declared := relationship("three.org")
	if err := a.DeclareRelationship(ctx, declared); err != nil {
		t.Fatal(err)
	}
	if err := a.DeleteRelationship(ctx, one.TrustDomain); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	b := start(t, cfg)
	declared.Row, declared.Declared = 3, true
	sameRelationships(t, b.Relationships(), []embedded.Relationship{two, declared})
	stored, err := b.FederatedBundle(two.TrustDomain)
	if err != nil || stored.Sequence != 3 {
		t.Errorf("the bundle stored with it: %+v, %v", stored, err)
	}
	if _, err := b.UpdateRelationship(ctx, two.TrustDomain, nil, func(r *embedded.Relationship) error {
		r.EndpointURL, r.EndpointID = "https://new.org", spiffeid.ID{}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if got, err := b.Relationship(two.TrustDomain); err != nil || got.EndpointURL != "https://new.org" || got.Row != two.Row {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestRelationshipRefusals(t *testing.T) {
	a := start(t, testConfig(t))
	ctx := t.Context()
	if _, err := a.CreateRelationship(ctx, relationship("one.org"), nil); err != nil {
		t.Fatal(err)
	}
	own := relationship("x.org")
	own.TrustDomain = td
	bad := relationship("bad.org")
	long := relationship("long.org")
	long.EndpointURL += "/" + strings.Repeat("x", 3000)
	foreign := &embedded.Bundle{TrustDomain: other}
	hint := &embedded.Bundle{TrustDomain: bad.TrustDomain, RefreshHint: -time.Second}
	for name, tc := range map[string]struct {
		do   func() error
		kind error
		text string
	}{
		"twice": {func() error { _, err := a.CreateRelationship(ctx, relationship("one.org"), nil); return err }, embedded.ErrExists, "UNIQUE constraint failed"},
		"own":   {func() error { _, err := a.CreateRelationship(ctx, own, nil); return err }, embedded.ErrInvalid, "server trust domain"},
		"zero":  {func() error { _, err := a.CreateRelationship(ctx, embedded.Relationship{}, nil); return err }, embedded.ErrInvalid, "is missing"},
		"http":  {func() error { bad.EndpointURL = "http://x"; _, err := a.CreateRelationship(ctx, bad, nil); return err }, embedded.ErrInvalid, "https scheme"},
		"user": {func() error {
			bad.EndpointURL = "https://u:p@x"
			_, err := a.CreateRelationship(ctx, bad, nil)
			return err
		}, embedded.ErrInvalid, "user info"},
		"long": {func() error { _, err := a.CreateRelationship(ctx, long, nil); return err }, embedded.ErrInvalid, "longer than"},
		"other's bundle": {func() error {
			bad.EndpointURL = "https://x"
			_, err := a.CreateRelationship(ctx, bad, foreign)
			return err
		}, embedded.ErrInvalid, "must match"},
		"refresh hint": {func() error {
			bad.EndpointURL = "https://x"
			_, err := a.CreateRelationship(ctx, bad, hint)
			return err
		}, embedded.ErrInvalid, "refresh hint"},
		"update unknown": {func() error {
			_, err := a.UpdateRelationship(ctx, other, nil, func(*embedded.Relationship) error { return nil })
			return err
		}, embedded.ErrNotFound, "record not found"},
		"declare over one by hand": {func() error { return a.DeclareRelationship(ctx, relationship("one.org")) }, embedded.ErrPrecondition, "made by hand"},
		"delete unknown":           {func() error { return a.DeleteRelationship(ctx, other) }, embedded.ErrNotFound, "not found"},
		"get unknown":              {func() error { _, err := a.Relationship(other); return err }, embedded.ErrNotFound, "does not exist"},
	} {
		if err := tc.do(); !errors.Is(err, tc.kind) || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := len(a.Relationships()); n != 1 {
		t.Errorf("%d relationships", n)
	}
	if _, err := a.FederatedBundle(bad.TrustDomain); !errors.Is(err, embedded.ErrNotFound) {
		t.Error("a refused relationship left its bundle")
	}
}

// What cannot be written changes nothing.
func TestRelationshipsOnAFullDisk(t *testing.T) {
	s := embedded.NewMemoryStore()
	a := inMemory(t, s, embedded.Config{})
	s.Fail(errDisk)
	bundle := &embedded.Bundle{TrustDomain: other}
	if _, err := a.CreateRelationship(t.Context(), relationship("other.org"), bundle); !errors.Is(err, errDisk) {
		t.Errorf("got %v", err)
	}
	if _, err := a.FederatedBundle(other); err == nil || len(a.Relationships()) != 0 {
		t.Error("half of it is visible")
	}
}

// A state file of a program that knew no relationships opens, and gets its
// bucket with the first.
func TestOlderStateFileWithoutRelationships(t *testing.T) {
	cfg := testConfig(t)
	a := start(t, cfg)
	want := a.OwnBundle().Sequence
	if _, err := a.CreateRelationship(t.Context(), relationship("gone.org"), nil); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(cfg.StatePath, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte("relationships")) }), db.Close()); err != nil {
		t.Fatal(err)
	}
	b := start(t, cfg)
	if b.OwnBundle().Sequence != want || len(b.Relationships()) != 0 {
		t.Errorf("opened with sequence %d and %d relationships", b.OwnBundle().Sequence, len(b.Relationships()))
	}
	if _, err := b.CreateRelationship(t.Context(), relationship("one.org"), nil); err != nil {
		t.Error(err)
	}
}

// A bundle from elsewhere gives the same stored form each time, and cannot
// make a state file that does not open again.
func TestBundleOf(t *testing.T) {
	cfg := testConfig(t)
	a := start(t, cfg)
	in := spiffebundle.New(other)
	for _, r := range a.OwnBundle().X509 {
		in.AddX509Authority(r.Certificate)
	}
	for _, name := range []string{"c", "a", "b"} {
		if err := in.AddJWTAuthority(name, newKey(t).Public()); err != nil {
			t.Fatal(err)
		}
	}
	in.SetSequenceNumber(1 << 63)
	in.SetRefreshHint(-5 * time.Second)
	for range 20 {
		b, err := embedded.BundleOf(in)
		if err != nil || b.JWT[0].ID != "a" || b.JWT[2].ID != "c" || b.RefreshHint != 0 {
			t.Fatalf("%+v, %v", b, err)
		}
		if err := a.SetFederatedBundle(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	start(t, cfg)
}
