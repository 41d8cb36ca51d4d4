package spireserver_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/durable"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
)

// attestor is one that may attest again.
type attestor struct{}

func (attestor) Type() string { return "k8s_psat" }

func (attestor) Prove(context.Context) (spireserver.Proof, error) {
	return spireserver.Proof{Payload: []byte("proof")}, nil
}

func (f *fake) record(path string) *record {
	return f.agents[spiffeid.RequireFromPath(td, path)]
}

const tokenAgent = "/spire/agent/join_token/token-1"

func TestRenewAgent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries, f.agentTTL = wireEntries(1), 10*time.Minute
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Hour)
		// Each at half of its life, give or take a tenth of that.
		if n := f.count("RenewAgent"); n < 10 || n > 14 {
			t.Errorf("renewed %d times in an hour", n)
		}
		if f.count("AttestAgent") != 1 || c.Ready() != nil {
			t.Errorf("attested %d times: %v", f.count("AttestAgent"), c.Ready())
		}
	})
}

func TestReattest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries, f.agentTTL, f.reattestable = wireEntries(1), 10*time.Minute, true
		f.up(t)
		cfg := f.config(t)
		cfg.Attestor = attestor{}
		c := run(t, cfg)
		for range 60 {
			pass(time.Minute)
			if _, err := c.SignX509(t.Context(), request("e000")); err != nil {
				t.Fatal(err)
			}
		}
		if n := f.count("AttestAgent"); n < 10 || n > 14 {
			t.Errorf("attested %d times in an hour", n)
		}
		for name, lose := range map[string]func(*record){
			"evicted":    func(*record) { clear(f.agents) },
			"superseded": func(r *record) { r.serial = "0" },
		} {
			before := f.count("AttestAgent")
			f.edit(func() { lose(f.record("/spire/agent/join_token/k8s_psat")) })
			pass(10 * time.Second)
			if n := f.count("AttestAgent") - before; n != 1 || c.Ready() != nil {
				t.Errorf("%s: attested %d times, then %v", name, n, c.Ready())
			}
		}
	})
}

func TestBanned(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries, f.reattestable = wireEntries(2), true
		f.up(t)
		cfg := f.config(t)
		cfg.Attestor = attestor{}
		c := run(t, cfg)
		pass(time.Second)
		agent := f.record("/spire/agent/join_token/k8s_psat")
		// An entry that is missing when the ban comes is meant.
		f.edit(func() { f.entries = f.entries[:1] })
		pass(5500 * time.Millisecond)
		f.edit(func() { agent.banned = true })
		pass(10 * time.Second)
		if s := c.Status(); !s.Banned || c.Ready() == nil {
			t.Errorf("status %+v", s)
		}
		if got := now(t, c); got != "e000" {
			t.Errorf("entries %q", got)
		}
		calls := f.count("SyncAuthorizedEntries")
		for range 30 {
			pass(time.Minute)
			if _, err := c.SignX509(t.Context(), request("e000")); !errors.Is(err, authority.ErrNotReady) {
				t.Fatalf("sign: %v", err)
			}
		}
		if n := f.count("SyncAuthorizedEntries") - calls; n != 0 {
			t.Errorf("%d calls while banned", n)
		}
		if n := f.count("AttestAgent"); n > 9 {
			t.Errorf("knocked %d times while banned", n)
		}
		f.edit(func() { clear(f.agents) }) // the ban is lifted
		pass(6 * time.Minute)
		if err := c.Ready(); err != nil || c.Status().Banned {
			t.Errorf("after the ban: %v", err)
		}
	})
}

func TestJoinTokenIsUsedOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		path := filepath.Join(t.TempDir(), "token")
		must(os.WriteFile(path, []byte("token-1\n"), 0o600))
		f.entries = wireEntries(1)
		f.up(t)
		cfg := f.config(t)
		cfg.Attestor = spireserver.JoinToken{Path: path}
		c := run(t, cfg)
		pass(time.Second)
		f.edit(func() { clear(f.agents) }) // evicted
		pass(time.Minute)
		if err := c.Ready(); !errors.Is(c.Status().Err, spireserver.ErrNothingNew) || err == nil {
			t.Errorf("ready: %v; status: %v", err, c.Status().Err)
		}
		if n := f.count("AttestAgent"); n != 1 {
			t.Errorf("the used token was shown %d times", n)
		}
		f.edit(func() { f.tokens["token-2"] = true })
		must(os.WriteFile(path, []byte("token-2\n"), 0o600))
		pass(30 * time.Second)
		if err := c.Ready(); err != nil || !strings.HasSuffix(c.Status().AgentID.Path(), "token-2") {
			t.Errorf("with a new token: %v as %s", err, c.Status().AgentID)
		}
	})
}

// The server is away for longer than the agent's SVID lives.
func TestAwayPastTheAgentsLife(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries, f.agentTTL, f.reattestable = wireEntries(1), 10*time.Minute, true
		f.up(t)
		cfg := f.config(t)
		cfg.Attestor = attestor{}
		c := run(t, cfg)
		pass(time.Second)
		set := waitEntries(t, c, heard)
		f.down()
		pass(time.Hour)
		if got := waitEntries(t, c, heard); got != set {
			t.Errorf("entries %q", ids(got))
		}
		if c.Status().Attested || c.Ready() == nil {
			t.Error("ready while the server is away")
		}
		if _, err := c.SignX509(t.Context(), request("e000")); !errors.Is(err, authority.ErrTryLater) {
			t.Errorf("sign: %v", err)
		}
		f.up(t)
		wantReadyWithin(t, c, 3*time.Second)
	})
}

func wantReadyWithin(t *testing.T, c *spireserver.Client, limit time.Duration) {
	t.Helper()
	start := time.Now()
	for c.Ready() != nil {
		if time.Since(start) > limit {
			t.Fatalf("not ready %s after the server's return: %v", limit, c.Ready())
		}
		pass(10 * time.Millisecond)
	}
	t.Logf("ready after %s", time.Since(start))
}

func TestServerComesBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = wireEntries(1)
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		for _, away := range []time.Duration{6 * time.Second, time.Minute, 10 * time.Minute} {
			f.down()
			pass(away)
			if c.Ready() == nil {
				t.Error("ready while the server is away")
			}
			f.up(t)
			wantReadyWithin(t, c, 1300*time.Millisecond)
			pass(time.Minute)
		}
	})
}

// Nodes that waited for a server do not all come in one moment.
func TestServerComesBackToMany(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries, f.reattestable, f.agentTTL = wireEntries(1), true, 24*time.Hour
		f.up(t)
		const nodes = 20
		var clients []*spireserver.Client
		for i := range nodes {
			cfg := f.config(t)
			token := fmt.Sprint("node-", i)
			f.edit(func() { f.tokens[token] = true })
			cfg.Attestor = spireserver.JoinToken{Token: token}
			clients = append(clients, run(t, cfg))
		}
		pass(10 * time.Second)
		f.down()
		pass(5 * time.Minute)
		f.up(t)
		start := time.Now()
		var back []time.Duration
		ready := map[*spireserver.Client]bool{}
		for len(back) < nodes && time.Since(start) < time.Minute {
			for _, c := range clients {
				if !ready[c] && c.Ready() == nil {
					ready[c] = true
					back = append(back, time.Since(start))
				}
			}
			pass(10 * time.Millisecond)
		}
		if len(back) < nodes || back[nodes-1] > 1300*time.Millisecond {
			t.Fatalf("back after %v", back)
		}
		if spread := back[nodes-1] - back[0]; spread < 300*time.Millisecond {
			t.Errorf("all %d came within %s", nodes, spread)
		}
	})
}

func TestStateGoesOn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = wireEntries(2)
		f.up(t)
		cfg := f.config(t)
		cfg.StateDir = filepath.Join(t.TempDir(), "state")
		c, err := spireserver.New(cfg)
		must(err)
		stop := start(t, c)
		pass(time.Second)
		stop()
		if err := durable.CheckOwnerFile(filepath.Join(cfg.StateDir, "agent.state")); err != nil {
			t.Error(err)
		}
		// Restarted while the server is away, and an entry is gone meanwhile.
		f.down()
		c, err = spireserver.New(cfg)
		must(err)
		if c.Status().AgentID.Path() != tokenAgent {
			t.Errorf("agent %s", c.Status().AgentID)
		}
		start(t, c)
		pass(time.Minute)
		f.edit(func() { f.entries = f.entries[:1] })
		f.up(t)
		pass(2 * time.Second)
		if got := now(t, c); got != "e000 e001?" {
			t.Errorf("the first answer withdrew what the process before knew: %q", got)
		}
		pass(15 * time.Second)
		if got := now(t, c); got != "e000" {
			t.Errorf("entries %q", got)
		}
		if n := f.count("AttestAgent"); n != 1 {
			t.Errorf("attested %d times", n)
		}
	})
}

func TestStateThatIsNoUse(t *testing.T) {
	f := newFake()
	cfg := f.config(t)
	cfg.StateDir = filepath.Join(t.TempDir(), "state")
	f.up(t)
	c, err := spireserver.New(cfg)
	must(err)
	stop := start(t, c)
	waitEntries(t, c, heard)
	stop()
	path := filepath.Join(cfg.StateDir, "agent.state")
	good, err := os.ReadFile(path)
	must(err)
	for name, data := range map[string][]byte{
		"empty":      {},
		"cut":        good[:len(good)-1],
		"flipped":    append(bytes.Clone(good[:len(good)-3]), 'x', 'y', 'z'),
		"newer":      bytes.Replace(good, []byte("agent 1"), []byte("agent 2"), 1),
		"not ours":   []byte("hello\nworld"),
		"only a sum": []byte("spiffe-node agent 1 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n"),
	} {
		must(os.WriteFile(path, data, 0o600))
		c, err := spireserver.New(cfg)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !c.Status().AgentID.IsZero() {
			t.Errorf("%s: used", name)
		}
		if _, err := os.Stat(path + ".bad"); err != nil {
			t.Errorf("%s: not set aside: %v", name, err)
		}
		must(c.Close())
	}
	must(os.WriteFile(path, good, 0o600))
	cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org")
	if c, err = spireserver.New(cfg); err != nil || !c.Status().AgentID.IsZero() {
		t.Errorf("another trust domain: %v %s", err, c.Status().AgentID)
	}
	must(c.Close())
	// Others can read it.
	cfg.TrustDomain = td
	must(os.Chmod(path, 0o644))
	if c, err = spireserver.New(cfg); err != nil || !c.Status().AgentID.IsZero() {
		t.Errorf("open to others: %v %s", err, c.Status().AgentID)
	}
	must(c.Close())
}

func TestStateNotOnADisk(t *testing.T) {
	f := newFake()
	cfg := f.config(t)
	dir, err := os.MkdirTemp("/var/tmp", "spireserver-") //nolint:usetesting // not where TempDir is
	must(err)
	defer os.RemoveAll(dir)
	cfg.StateDir = dir
	cfg.OnDisk()
	if _, err := spireserver.New(cfg); !errors.Is(err, spireserver.ErrOnDisk) {
		t.Skipf("/var/tmp may be in memory here: %v", err)
	}
}

func TestWhoTheServerMustBe(t *testing.T) {
	foreign := func(context.Context, spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
		return x509bundle.FromX509Authorities(td, []*x509.Certificate{newRoot().cert}), nil
	}
	for name, tc := range map[string]struct {
		edit func(f *fake, cfg *spireserver.Config)
		ok   bool
		want string
	}{
		"insecure": {ok: true, edit: func(_ *fake, cfg *spireserver.Config) { cfg.Bootstrap, cfg.InsecureBootstrap = nil, true }},
		"insecure, an agent": {want: "/spire/agent/x, not spiffe://example.org/spire/server", edit: func(f *fake, cfg *spireserver.Config) {
			cfg.Bootstrap, cfg.InsecureBootstrap = nil, true
			f.name = spiffeid.RequireFromPath(td, "/spire/agent/x")
		}},
		"insecure, another bundle": {want: "does not stand up to the trust bundle", edit: func(f *fake, cfg *spireserver.Config) {
			cfg.Bootstrap, cfg.InsecureBootstrap = nil, true
			f.roots = []*typespb.X509Certificate{{Asn1: newRoot().cert.Raw}}
		}},
		"another root": {want: "unknown authority", edit: func(_ *fake, cfg *spireserver.Config) { cfg.Bootstrap = foreign }},
		"a workload": {want: "is spiffe://example.org/spire/server2", edit: func(f *fake, _ *spireserver.Config) {
			f.name = spiffeid.RequireFromPath(td, "/spire/server2")
		}},
		"no bundle": {want: "no such file", edit: func(_ *fake, cfg *spireserver.Config) { cfg.Bootstrap = spireserver.BundleFile("/no/such", "pem") }},
		"empty bundle": {want: "no X.509 authority", edit: func(f *fake, _ *spireserver.Config) {
			f.roots = nil
		}},
		"second address": {ok: true, edit: func(_ *fake, cfg *spireserver.Config) { cfg.Addresses = []string{"dead:1", "fake:1"} }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				f.entries = wireEntries(1)
				cfg := f.config(t)
				tc.edit(f, &cfg)
				f.up(t)
				c := run(t, cfg)
				pass(10 * time.Second)
				err := c.Ready()
				if (err == nil) != tc.ok || err != nil && !strings.Contains(err.Error(), tc.want) {
					t.Errorf("%v, want %q", err, tc.want)
				}
				if !tc.ok && f.count("AttestAgent") != 0 {
					t.Error("the token was shown to a server that was not verified")
				}
			})
		})
	}
}

// A call that meets a renewal is answered all the same.
func TestCallsAcrossRenewals(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries, f.agentTTL, f.reattestable = wireEntries(1), time.Minute, true
		f.up(t)
		cfg := f.config(t)
		cfg.Attestor = attestor{}
		c := run(t, cfg)
		pass(time.Second)
		for range 600 {
			time.Sleep(700 * time.Millisecond)
			if _, err := c.SignX509(t.Context(), request("e000")); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if f.count("AttestAgent") < 10 {
			t.Error("never renewed")
		}
	})
}

// A server that was installed anew has other keys and knows nobody; the
// bootstrap bundle is the new one.
func TestServerInstalledAnew(t *testing.T) {
	for name, tc := range map[string]struct {
		running bool // the agent was running meanwhile
		within  time.Duration
	}{"agent with state": {false, 10 * time.Second}, "running agent": {true, 80 * time.Second}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				f.entries, f.reattestable = wireEntries(2), true
				f.up(t)
				cfg := f.config(t)
				cfg.Attestor, cfg.StateDir = attestor{}, filepath.Join(t.TempDir(), "state")
				c, err := spireserver.New(cfg)
				must(err)
				stop := start(t, c)
				pass(10 * time.Second)
				f.down()
				if !tc.running {
					stop()
					c, err = spireserver.New(cfg)
					must(err)
					start(t, c)
				}
				pass(6 * time.Second)
				f.edit(func() {
					f.root = newRoot()
					f.roots = []*typespb.X509Certificate{{Asn1: f.root.cert.Raw}}
					f.agents, f.entries = map[spiffeid.ID]*record{}, wireEntries(1)
				})
				f.up(t)
				wantReadyWithin(t, c, tc.within)
				pass(15 * time.Second)
				if got := now(t, c); got != "e000" {
					t.Errorf("entries %q", got)
				}
			})
		})
	}
}
