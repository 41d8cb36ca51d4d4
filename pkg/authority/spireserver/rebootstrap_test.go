package spireserver_test

import (
	"crypto/tls"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
)

// anew makes the server one that was installed anew: other keys, no agents.
func (f *fake) anew() {
	f.edit(func() {
		f.root = newRoot()
		f.roots = []*typespb.X509Certificate{{Asn1: f.root.cert.Raw}}
		f.agents = map[spiffeid.ID]*record{}
	})
}

func TestRebootstrap(t *testing.T) {
	const delay = 3 * time.Minute
	for name, tc := range map[string]struct {
		mode    spireserver.Rebootstrap
		restart bool
		back    bool // the agent finds its way
	}{
		"never":                   {spireserver.RebootstrapNever, false, false},
		"never, restarted":        {spireserver.RebootstrapNever, true, false},
		"auto":                    {spireserver.RebootstrapAuto, false, true},
		"auto, restarted":         {spireserver.RebootstrapAuto, true, true},
		"always":                  {spireserver.RebootstrapAlways, false, true},
		"unspecified, like auto ": {"", false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				f.entries, f.reattestable, f.agentTTL = wireEntries(1), true, 24*time.Hour
				f.up(t)
				cfg := f.config(t)
				cfg.Attestor, cfg.StateDir = attestor{}, filepath.Join(t.TempDir(), "state")
				cfg.Rebootstrap, cfg.RebootstrapDelay = tc.mode, delay
				c, err := spireserver.New(cfg)
				must(err)
				stop := start(t, c)
				pass(10 * time.Second)
				if err := c.Ready(); err != nil {
					t.Fatal(err)
				}
				f.down()
				f.anew()
				if tc.restart {
					stop()
					c, err = spireserver.New(cfg)
					must(err)
					start(t, c)
				}
				f.up(t)
				if !tc.restart {
					pass(delay - time.Minute)
					if c.Ready() == nil || f.count("AttestAgent") != 1 {
						t.Errorf("trusted before its time: %v", c.Ready())
					}
					pass(2 * time.Minute)
				}
				pass(4 * time.Minute)
				if err := c.Ready(); (err == nil) != tc.back {
					t.Errorf("%v", err)
				}
				if tc.back && now(t, c) != "e000" {
					t.Error("the entries are gone")
				}
			})
		})
	}
}

// An agent that must be able to begin anew does not settle for an attestation
// that the server allows once.
func TestRebootstrapAlwaysNeedsReattestation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.up(t)
		cfg := f.config(t)
		cfg.Attestor, cfg.Rebootstrap = attestor{}, spireserver.RebootstrapAlways
		c := run(t, cfg)
		pass(10 * time.Second)
		if err := c.Ready(); err == nil || !strings.Contains(err.Error(), "attests this node once only") {
			t.Errorf("got %v", err)
		}
	})
}

func TestPostQuantum(t *testing.T) {
	for name, tc := range map[string]struct {
		server tls.CurveID
		need   bool
		ok     bool
	}{
		"hybrid":            {tls.X25519MLKEM768, true, true},
		"any":               {0, true, true},
		"classic":           {tls.X25519, true, false},
		"classic, if it is": {tls.X25519, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				f.entries, f.kex = wireEntries(1), tc.server
				f.up(t)
				cfg := f.config(t)
				cfg.RequirePQKEM = tc.need
				c := run(t, cfg)
				pass(10 * time.Second)
				if err := c.Ready(); (err == nil) != tc.ok {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}
