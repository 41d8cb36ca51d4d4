package spireserver_test

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/pkg/authority/authoritytest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/jointoken"
	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

const patience = 20 * time.Second

func testLog(tb testing.TB) *slog.Logger {
	tb.Helper()
	return slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// ours is the embedded authority served over TLS, as cmd/authority does.
type ours struct {
	*embedded.Authority
	address string
	stop    func()
}

func newOurs(t *testing.T) *ours {
	t.Helper()
	a, err := embedded.Open(embedded.Config{TrustDomain: td, StatePath: filepath.Join(t.TempDir(), "state", "authority.db"), LockTimeout: 1})
	if err != nil {
		t.Fatal(err)
	}
	nodes, err := adminapi.NewNodes(adminapi.NodesConfig{
		TrustDomain: td, Authority: a, NoAttestationLimit: true, NoSigningLimit: true,
		Attestors: []adminapi.NodeAttestor{jointoken.New(td, a)},
	})
	if err != nil {
		t.Fatal(err)
	}
	identity, err := adminapi.ServerCertificate(a, nil)
	if err != nil {
		t.Fatal(err)
	}
	remote, err := adminapi.NewRemote(t.Context(), adminapi.RemoteConfig{Address: "127.0.0.1:0", TrustDomain: td, Authority: a, Certificate: identity, Nodes: nodes})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- remote.Run(ctx) }()
	o := &ours{Authority: a, address: remote.Addr().String()}
	stopped := false
	o.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(func() {
		o.stop()
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return o
}

// bootstrap trusts what the authority trusts now.
func (o *ours) bootstrap(context.Context, spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	out := x509bundle.New(td)
	for _, root := range o.OwnBundle().X509 {
		out.AddX509Authority(root.Certificate)
	}
	return out, nil
}

func (o *ours) token(t *testing.T) (token string, agent spiffeid.ID) {
	t.Helper()
	tok, err := o.CreateJoinToken(t.Context(), "", time.Hour, spiffeid.ID{})
	if err != nil {
		t.Fatal(err)
	}
	id, err := embedded.JoinTokenAgentID(td, tok.Value)
	if err != nil {
		t.Fatal(err)
	}
	return tok.Value, id
}

func (o *ours) config(t *testing.T, token string) spireserver.Config {
	t.Helper()
	return spireserver.Config{
		TrustDomain: td, Addresses: []string{o.address}, Bootstrap: o.bootstrap,
		Attestor: spireserver.JoinToken{Token: token}, Version: "test", Logger: testLog(t),
		SyncInterval: time.Second,
	}
}

// run starts a client that ends with the test.
func run(t *testing.T, cfg spireserver.Config) *spireserver.Client {
	t.Helper()
	c, err := spireserver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	start(t, c)
	return c
}

// start runs a client; the result ends it, and so does the end of the test.
func start(t *testing.T, c *spireserver.Client) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

// waitEntries waits for a set that ok takes.
func waitEntries(tb testing.TB, c *spireserver.Client, ok func(*entry.Set) bool) *entry.Set {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for after := uint64(0); ; {
		set, err := c.Entries(ctx, after)
		if err != nil {
			tb.Fatalf("entries: %v (%+v)", err, c.Status())
		}
		if ok(set) {
			return set
		}
		after = set.Version()
	}
}

func has(id string) func(*entry.Set) bool {
	return func(s *entry.Set) bool {
		_, ok := s.Get(id)
		return ok
	}
}

func heard(*entry.Set) bool { return true }

func TestContract(t *testing.T) {
	for name, poll := range map[string]bool{"pushed": false, "polled": true} {
		t.Run(name, func(t *testing.T) {
			authoritytest.Run(t, func(t *testing.T) authoritytest.Harness {
				t.Helper()
				o := newOurs(t)
				token, agent := o.token(t)
				cfg := o.config(t, token)
				cfg.ForTests(nil, poll)
				c := run(t, cfg)
				waitEntries(t, c, heard)
				return authoritytest.Harness{
					Authority: c, TrustDomain: td, Agent: agent,
					Register: func(tb testing.TB, e *entry.Entry) *entry.Entry {
						tb.Helper()
						stored, err := o.CreateEntry(context.Background(), e)
						if err != nil {
							tb.Fatal(err)
						}
						c.Hurry()
						waitEntries(tb, c, has(stored.ID))
						return stored
					},
					Unregister: func(tb testing.TB, e *entry.Entry) {
						tb.Helper()
						if err := o.DeleteEntry(context.Background(), e.ID); err != nil {
							tb.Error(err)
						}
					},
					ChangeBundle: func(tb testing.TB) {
						tb.Helper()
						if err := o.RotateNow(context.Background()); err != nil {
							tb.Error(err)
						}
					},
					Stop: func(testing.TB) { o.stop() },
				}
			})
		})
	}
}
