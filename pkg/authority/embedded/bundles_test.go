package embedded_test

import (
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

func someJWTKey(tb testing.TB, id string) embedded.JWTKey {
	tb.Helper()
	der, err := x509.MarshalPKIXPublicKey(newKey(tb).Public())
	if err != nil {
		tb.Fatal(err)
	}
	return embedded.JWTKey{ID: id, PublicKey: der, ExpiresAt: time.Unix(4e9, 0).UTC()}
}

func someRoot(tb testing.TB) *x509.Certificate {
	tb.Helper()
	a := inMemory(tb, embedded.NewMemoryStore(), embedded.Config{})
	return a.OwnBundle().X509[0].Certificate
}

func getBundles(tb testing.TB, a *embedded.Authority) *authority.BundleSet {
	tb.Helper()
	set, err := a.Bundles(tb.Context(), 0)
	if err != nil {
		tb.Fatal(err)
	}
	return set
}

func TestAppendBundle(t *testing.T) {
	a := start(t, testConfig(t))
	before := getBundles(t, a)
	if seq, _ := before.Own.SequenceNumber(); seq != 1 {
		t.Errorf("sequence %d", seq)
	}
	root, key := someRoot(t), someJWTKey(t, "k1")
	key.Tainted = true
	b, err := a.AppendBundle(t.Context(), []*x509.Certificate{root}, []embedded.JWTKey{key})
	if err != nil {
		t.Fatal(err)
	}
	if len(b.X509) != 2 || len(b.JWT) != 2 || b.Sequence != 2 || b.JWT[1].Tainted {
		t.Errorf("%+v", b)
	}
	after := getBundles(t, a)
	if after.Version <= before.Version || !after.Own.HasX509Authority(root) || !after.Own.HasJWTAuthority("k1") {
		t.Error("not published")
	}
	// The same again is no change.
	if b, err = a.AppendBundle(t.Context(), []*x509.Certificate{root}, []embedded.JWTKey{key}); err != nil || b.Sequence != 2 {
		t.Errorf("%d %v", b.Sequence, err)
	}
	if getBundles(t, a) != after {
		t.Error("published without a change")
	}
	for name, tt := range map[string]struct {
		keys []embedded.JWTKey
		text string
	}{
		"nothing":   {nil, "no authorities to append"},
		"no key ID": {[]embedded.JWTKey{{PublicKey: key.PublicKey}}, "missing key ID"},
	} {
		if _, err := a.AppendBundle(t.Context(), nil, tt.keys); !errors.Is(err, embedded.ErrInvalid) || err.Error() != tt.text {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := a.AppendBundle(t.Context(), nil, []embedded.JWTKey{{ID: "x", PublicKey: []byte("no")}}); !errors.Is(err, embedded.ErrInvalid) {
		t.Errorf("bad key: %v", err)
	}
}

func TestFederatedBundles(t *testing.T) {
	a := start(t, testConfig(t))
	third := spiffeid.RequireTrustDomainFromString("third.org")
	ctx := t.Context()
	b := &embedded.Bundle{TrustDomain: other, X509: []embedded.Root{{Certificate: someRoot(t)}}, Sequence: 42, RefreshHint: time.Minute}
	if err := a.CreateFederatedBundle(ctx, b); err != nil {
		t.Fatal(err)
	}
	if err := a.SetFederatedBundle(ctx, &embedded.Bundle{TrustDomain: third}); err != nil {
		t.Fatal(err)
	}
	first := getBundles(t, a)
	if seq, _ := first.Federated[other].SequenceNumber(); seq != 42 {
		t.Errorf("sequence %d", seq)
	}
	if a.BundleCount() != 3 {
		t.Errorf("%d bundles", a.BundleCount())
	}
	list := a.FederatedBundles()
	if len(list) != 2 || list[0].Bundle.TrustDomain != other || list[0].Row >= list[1].Row {
		t.Errorf("list %+v", list)
	}

	// Equal content is no change; another bundle's change keeps the pointer.
	if err := a.SetFederatedBundle(ctx, b); err != nil || getBundles(t, a) != first {
		t.Errorf("setting an equal bundle was a change: %v", err)
	}
	if _, err := a.UpdateFederatedBundle(ctx, third, func(b *embedded.Bundle) { b.RefreshHint = time.Hour; b.TrustDomain = other }); err != nil {
		t.Fatal(err)
	}
	second := getBundles(t, a)
	if second.Federated[other] != first.Federated[other] || second.Own != first.Own {
		t.Error("unchanged bundles have new pointers")
	}
	if hint, _ := second.Federated[third].RefreshHint(); hint != time.Hour {
		t.Errorf("refresh hint %s", hint)
	}

	for name, tt := range map[string]struct {
		err  error
		kind error
		text string
	}{
		"create again": {a.CreateFederatedBundle(ctx, b), embedded.ErrExists, "bundle already exists"},
		"create own": {
			a.CreateFederatedBundle(ctx, &embedded.Bundle{TrustDomain: td}), embedded.ErrInvalid,
			"creating a federated bundle for the server's own trust domain is not allowed",
		},
		"set own": {
			a.SetFederatedBundle(ctx, &embedded.Bundle{TrustDomain: td}), embedded.ErrInvalid,
			"setting a federated bundle for the server's own trust domain is not allowed",
		},
		"get unknown": {
			func() error { _, err := a.FederatedBundle(spiffeid.RequireTrustDomainFromString("no.org")); return err }(),
			embedded.ErrNotFound, "bundle not found",
		},
		"delete own": {
			a.DeleteFederatedBundle(ctx, td, embedded.Restrict), embedded.ErrInvalid,
			"removing the bundle for the server trust domain is not allowed",
		},
		"delete unknown": {
			a.DeleteFederatedBundle(ctx, spiffeid.RequireTrustDomainFromString("no.org"), embedded.Restrict), embedded.ErrNotFound, "bundle not found",
		},
	} {
		if !errors.Is(tt.err, tt.kind) || tt.err.Error() != tt.text {
			t.Errorf("%s: %v", name, tt.err)
		}
	}
}

func TestDeleteFederatedBundle(t *testing.T) {
	for mode, check := range map[embedded.DeleteMode]func(t *testing.T, a *embedded.Authority, err error){
		embedded.Restrict: func(t *testing.T, a *embedded.Authority, err error) {
			t.Helper()
			var inUse *embedded.InUseError
			if !errors.As(err, &inUse) || !errors.Is(err, embedded.ErrPrecondition) || err.Error() != "cannot delete bundle; federated with 1 registration entries" {
				t.Errorf("error %v", err)
			}
			if a.Set().Len() != 2 || a.BundleCount() != 2 {
				t.Error("something was deleted")
			}
		},
		embedded.DeleteEntries: func(t *testing.T, a *embedded.Authority, err error) {
			t.Helper()
			if _, there := a.Set().Get("f"); err != nil || there || a.Set().Len() != 1 || a.BundleCount() != 1 {
				t.Errorf("error %v, %d entries", err, a.Set().Len())
			}
		},
		embedded.Dissociate: func(t *testing.T, a *embedded.Authority, err error) {
			t.Helper()
			e, _ := a.Set().Get("f")
			if err != nil || e == nil || len(e.FederatesWith) != 0 || e.Revision != 1 || a.BundleCount() != 1 {
				t.Errorf("error %v, entry %+v", err, e)
			}
		},
	} {
		cfg := testConfig(t)
		a := start(t, cfg)
		if err := a.SetFederatedBundle(t.Context(), &embedded.Bundle{TrustDomain: other}); err != nil {
			t.Fatal(err)
		}
		mustCreate(t, a, newEntry("/plain"))
		mustCreate(t, a, &entry.Entry{
			ID: "f", SPIFFEID: id("/f"), ParentID: node, Selectors: attest.MustSelectors("unix:uid:0"), FederatesWith: []spiffeid.TrustDomain{other},
		})
		err := a.DeleteFederatedBundle(t.Context(), other, mode)
		check(t, a, err)
		_, there := getBundles(t, a).Federated[other]
		if there != (mode == embedded.Restrict) {
			t.Errorf("mode %d: published: %v", mode, there)
		}
		want := takePicture(t, a)
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		comparePictures(t, takePicture(t, start(t, cfg)), want)
	}
}

func TestAgents(t *testing.T) {
	a := start(t, testConfig(t))
	ctx := t.Context()
	second := id("/spire/agent/local/n2")
	for _, agent := range []spiffeid.ID{node, second} {
		if _, err := a.UpsertAgent(ctx, &embedded.Agent{ID: agent, AttestationType: "local", Serial: "1", ExpiresAt: time.Unix(4e9, 0)}); err != nil {
			t.Fatal(err)
		}
	}
	again, err := a.UpsertAgent(ctx, &embedded.Agent{ID: node, AttestationType: "local", Serial: "2"})
	if err != nil || again.Row != 1 || a.AgentCount() != 2 {
		t.Errorf("%+v %v", again, err)
	}
	banned, err := a.BanAgent(ctx, node)
	if err != nil || !banned.Banned || banned.Serial != "" {
		t.Errorf("%+v %v", banned, err)
	}
	if _, err := a.UpsertAgent(ctx, &embedded.Agent{ID: node, Serial: "3"}); !errors.Is(err, embedded.ErrPrecondition) {
		t.Errorf("a banned agent attested: %v", err)
	}
	var listed []spiffeid.ID
	for agent := range a.Agents() {
		listed = append(listed, agent.ID)
	}
	if len(listed) != 2 || listed[0] != node || listed[1] != second {
		t.Errorf("listed %v", listed)
	}
	if err := a.DeleteAgent(ctx, node); err != nil {
		t.Error(err)
	}
	if _, err := a.UpsertAgent(ctx, &embedded.Agent{ID: node, Serial: "4"}); err != nil {
		t.Error(err)
	}
	nobody := id("/spire/agent/local/nobody")
	for name, err := range map[string]error{
		"get":    func() error { _, err := a.Agent(nobody); return err }(),
		"ban":    func() error { _, err := a.BanAgent(ctx, nobody); return err }(),
		"delete": a.DeleteAgent(ctx, nobody),
	} {
		if !errors.Is(err, embedded.ErrNotFound) || err.Error() != "agent not found" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := a.UpsertAgent(ctx, &embedded.Agent{ID: spiffeid.RequireFromPath(other, "/spire/agent/x")}); !errors.Is(err, embedded.ErrInvalid) {
		t.Errorf("foreign agent: %v", err)
	}
}
