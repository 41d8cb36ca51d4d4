package embedded_test

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	bolt "go.etcd.io/bbolt"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

func TestJoinTokenIsUsedOnce(t *testing.T) {
	a := start(t, testConfig(t))
	token, err := a.CreateJoinToken(t.Context(), "", time.Minute, spiffeid.ID{})
	if err != nil {
		t.Fatal(err)
	}
	var used atomic.Int32
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			switch _, err := a.UseJoinToken(context.Background(), token.Value); {
			case err == nil:
				used.Add(1)
			case !errors.Is(err, embedded.ErrNotFound):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := used.Load(); n != 1 {
		t.Errorf("used %d times", n)
	}
}

func TestJoinTokensSurvive(t *testing.T) {
	cfg := testConfig(t)
	a, err := embedded.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kept", "used"} {
		if _, err := a.CreateJoinToken(t.Context(), name, time.Minute, id("/"+name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.UseJoinToken(t.Context(), "used"); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	a = start(t, cfg)
	if _, err := a.UseJoinToken(t.Context(), "used"); !errors.Is(err, embedded.ErrNotFound) {
		t.Errorf("used token after restart: %v", err)
	}
	token, err := a.UseJoinToken(t.Context(), "kept")
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(token.ExpiresAt); left < 50*time.Second || left > time.Minute {
		t.Errorf("expires in %s", left)
	}
	if n := a.Set().Len(); n != 2 {
		t.Errorf("%d aliases", n)
	}
}

// A state file from before there were join tokens is opened and then gets them.
func TestJoinTokenBucketIsMadeLater(t *testing.T) {
	cfg := testConfig(t)
	a, err := embedded.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.CreateJoinToken(t.Context(), "before", time.Minute, spiffeid.ID{}); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(cfg.StatePath, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(db.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte("join_tokens")) }), db.Close())
	if err != nil {
		t.Fatal(err)
	}
	a = start(t, cfg)
	if _, err := a.CreateJoinToken(t.Context(), "t", time.Minute, spiffeid.ID{}); err != nil {
		t.Fatal(err)
	}
}

func TestJoinTokenRefusals(t *testing.T) {
	a := start(t, testConfig(t))
	if _, err := a.CreateJoinToken(t.Context(), "taken", time.Minute, spiffeid.ID{}); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		value string
		ttl   time.Duration
		alias spiffeid.ID
		want  error
	}{
		"no ttl":         {"x", 0, spiffeid.ID{}, embedded.ErrInvalid},
		"taken":          {"taken", time.Minute, spiffeid.ID{}, embedded.ErrExists},
		"no segment":     {"a/b", time.Minute, spiffeid.ID{}, embedded.ErrInvalid},
		"dots":           {"..", time.Minute, spiffeid.ID{}, embedded.ErrInvalid},
		"long":           {strings.Repeat("x", 4096), time.Minute, spiffeid.ID{}, embedded.ErrInvalid},
		"reserved alias": {"y", time.Minute, id("/spire/agent/x"), embedded.ErrInvalid},
		"foreign alias":  {"z", time.Minute, spiffeid.RequireFromPath(other, "/x"), embedded.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := a.CreateJoinToken(t.Context(), tc.value, tc.ttl, tc.alias); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			if _, err := a.UseJoinToken(t.Context(), tc.value); tc.value != "taken" && !errors.Is(err, embedded.ErrNotFound) {
				t.Errorf("the refused token is there: %v", err)
			}
		})
	}
}

func TestExpiredJoinTokensArePruned(t *testing.T) {
	a := start(t, testConfig(t))
	if _, err := a.CreateJoinToken(t.Context(), "t", time.Second, spiffeid.ID{}); err != nil {
		t.Fatal(err)
	}
	if err := a.PruneTokens(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := a.PruneTokens(time.Now().Add(2 * time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.UseJoinToken(t.Context(), "t"); !errors.Is(err, embedded.ErrNotFound) {
		t.Errorf("still there: %v", err)
	}
}

// Evicting an agent takes the alias of its join token along, and nothing else.
func TestEvictionTakesTheAlias(t *testing.T) {
	a := start(t, testConfig(t))
	if _, err := a.CreateJoinToken(t.Context(), "t", time.Minute, id("/alias")); err != nil {
		t.Fatal(err)
	}
	agent, err := embedded.JoinTokenAgentID(td, "t")
	if err != nil {
		t.Fatal(err)
	}
	e := newEntry("/workload")
	e.ParentID = agent
	mustCreate(t, a, e)
	if _, err := a.UpsertAgent(t.Context(), &embedded.Agent{ID: agent, AttestationType: "join_token", Serial: "1"}); err != nil {
		t.Fatal(err)
	}
	if err := a.DeleteAgent(t.Context(), agent); err != nil {
		t.Fatal(err)
	}
	var left []string
	for e := range a.Set().All() {
		left = append(left, e.SPIFFEID.Path())
	}
	if len(left) != 1 || left[0] != "/workload" {
		t.Errorf("left: %v", left)
	}
}

func TestAgentRecordKeepsARenewal(t *testing.T) {
	cfg := testConfig(t)
	a, err := embedded.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	expires := time.Now().Add(time.Hour).Truncate(time.Second).UTC()
	if _, err := a.UpsertAgent(t.Context(), &embedded.Agent{ID: node, Serial: "1", Selectors: attest.MustSelectors("a:b"), Version: "v1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.UpdateAgent(t.Context(), node, func(n *embedded.Agent) error {
		n.NewSerial, n.NewExpiresAt, n.Row = "2", expires, 99
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.UpdateAgent(t.Context(), node, func(n *embedded.Agent) error {
		n.Serial = "lost"
		return errDisk
	}); !errors.Is(err, errDisk) {
		t.Errorf("edit's error: %v", err)
	}
	if _, err := a.UpdateAgent(t.Context(), id("/spire/agent/local/n2"), func(*embedded.Agent) error { return nil }); !errors.Is(err, embedded.ErrNotFound) {
		t.Errorf("unknown agent: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	a = start(t, cfg)
	got, err := a.Agent(node)
	if err != nil {
		t.Fatal(err)
	}
	if got.Serial != "1" || got.NewSerial != "2" || !got.NewExpiresAt.Equal(expires) || got.Row != 1 {
		t.Errorf("read back %+v", got)
	}
	// Attesting anew ends the renewal; the version stays known.
	got, err = a.UpsertAgent(t.Context(), &embedded.Agent{ID: node, Serial: "3"})
	if err != nil || got.NewSerial != "" || got.Version != "v1" {
		t.Errorf("after attestation %+v, %v", got, err)
	}
	got, err = a.BanAgent(t.Context(), node)
	if err != nil || got.Serial != "" || got.NewSerial != "" || !got.Banned {
		t.Errorf("after the ban %+v, %v", got, err)
	}
}

func TestServerSVID(t *testing.T) {
	a := start(t, testConfig(t))
	key := newKey(t)
	issued, err := a.SignServer(t.Context(), newCSR(t, key, x509.CertificateRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(issued.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	set, err := a.Bundles(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := x509svid.Verify([]*x509.Certificate{cert}, set.Own)
	if err != nil || got != id("/spire/server") || len(cert.DNSNames) != 0 {
		t.Errorf("certificate of %s for %v: %v", got, cert.DNSNames, err)
	}
	if !a.Trusts(cert) {
		t.Error("its own root is not trusted")
	}
	local, err := a.X509Authorities()
	if err != nil {
		t.Fatal(err)
	}
	if err := a.RotateNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := a.TaintX509(t.Context(), local.Active.ID); err != nil {
		t.Fatal(err)
	}
	if a.Trusts(cert) {
		t.Error("a tainted root is trusted")
	}
	if _, err := a.SignServer(t.Context(), []byte("x")); !errors.Is(err, embedded.ErrInvalid) {
		t.Errorf("a bad CSR: %v", err)
	}
}

func TestChangesAreSignalled(t *testing.T) {
	a := start(t, testConfig(t))
	c := a.Changes()
	view := a.NodeEntries(node, attest.Selectors{})
	if view.Set().Len() != 0 {
		t.Fatal("entries from nowhere")
	}
	mustCreate(t, a, newEntry("/w"))
	select {
	case <-c.Entries:
	default:
		t.Error("no signal for an entry")
	}
	if view.Set().Len() != 1 {
		t.Error("the entry is not in view")
	}
	if _, err := a.UpsertAgent(t.Context(), &embedded.Agent{ID: node, Serial: "1"}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Agents:
	default:
		t.Error("no signal for an agent")
	}
	if _, err := a.PrepareX509(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Bundles:
	default:
		t.Error("no signal for a bundle")
	}
}
