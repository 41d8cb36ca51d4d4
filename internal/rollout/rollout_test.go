package rollout_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/spiffe-node/spiffe-node/internal/rollout"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bundle has roots with these names as subject key IDs, and one JWT key.
func bundle(roots ...string) *spiffebundle.Bundle {
	b := spiffebundle.New(spiffeid.RequireTrustDomainFromString("example.org"))
	for _, name := range roots {
		b.AddX509Authority(&x509.Certificate{Raw: []byte(name), SubjectKeyId: []byte(name)})
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	if err := b.AddJWTAuthority("k1", key.Public()); err != nil {
		panic(err)
	}
	return b
}

func hexOf(names ...string) (out []string) {
	for _, n := range names {
		out = append(out, fmt.Sprintf("%x", n))
	}
	return out
}

// node plays everything around a Reporter.
type node struct {
	mu        sync.Mutex
	trust     *svid.Trust
	changed   chan struct{}
	outdated  int
	consumers []rollout.Consumer
	names     map[uint64]string
	looks     int
	asked     int // for names
	reports   []authority.TrustReport
	at        []time.Time
}

func newNode(roots ...string) *node {
	n := &node{trust: new(svid.Trust), changed: make(chan struct{}, 1), names: map[uint64]string{}}
	if len(roots) > 0 {
		n.trust = n.trust.With(bundle(roots...))
	}
	return n
}

func (n *node) Trust() *svid.Trust            { n.mu.Lock(); defer n.mu.Unlock(); return n.trust }
func (n *node) TrustChanged() <-chan struct{} { return n.changed }
func (n *node) Outdated() int                 { n.mu.Lock(); defer n.mu.Unlock(); return n.outdated }

func (n *node) edit(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
}

// rotate gives the node another bundle.
func (n *node) rotate(roots ...string) {
	n.edit(func() { n.trust = n.trust.With(bundle(roots...)) })
	n.changed <- struct{}{}
}

func (n *node) roots() uint32 { return n.Trust().Roots().Number }

func (n *node) reporter() *rollout.Reporter {
	return rollout.New(rollout.Config{
		Holder: n,
		Consumers: func(visit func(rollout.Consumer)) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.looks++
			for i := range n.consumers { // no two looks in the same order, as with a map
				visit(n.consumers[(i+n.looks*7)%len(n.consumers)])
			}
		},
		Names: func(peers map[uint64]string) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.asked += len(peers)
			for p := range peers {
				if name, ok := n.names[p]; ok {
					peers[p] = name
				}
			}
		},
		Report: func(r authority.TrustReport) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.reports, n.at = append(n.reports, r), append(n.at, time.Now())
		},
	})
}

// run starts a Reporter in a bubble.
func (n *node) run(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	r := n.reporter()
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	synctest.Wait()
}

func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (n *node) count() (reports, looks int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.reports), n.looks
}

func (n *node) last() authority.TrustReport {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.reports[len(n.reports)-1]
}

func TestLook(t *testing.T) {
	t.Parallel()
	n := newNode("a")
	first := n.roots()
	n.trust = n.trust.With(bundle("a", "b"))
	second, keys := n.roots(), n.Trust().Keys().Number
	held := hexOf("a", "b")
	n.names = map[uint64]string{1: "ns/one", 2: "ns/two"}
	for name, tc := range map[string]struct {
		consumers []rollout.Consumer
		x509, jwt authority.TrustProgress
	}{
		"nobody consumes it": {
			nil,
			authority.TrustProgress{Held: held, Acknowledged: held},
			authority.TrustProgress{Held: []string{"k1"}, Acknowledged: []string{"k1"}},
		},
		"all have it": {
			[]rollout.Consumer{{Peer: 1, API: "sotw", Acknowledged: second}, {Peer: 2, API: "FetchJWTBundles", JWT: true, Acknowledged: keys}},
			authority.TrustProgress{Held: held, Acknowledged: held, Consumers: 1},
			authority.TrustProgress{Held: []string{"k1"}, Acknowledged: []string{"k1"}, Consumers: 1},
		},
		"one has the generation before": {
			[]rollout.Consumer{{Peer: 1, API: "sotw", Acknowledged: second}, {Peer: 2, API: "delta", Acknowledged: first}},
			authority.TrustProgress{
				Held: held, Acknowledged: hexOf("a"), Consumers: 2, Lagging: 1,
				Laggards: []authority.Laggard{{Name: "ns/two", API: "delta"}},
			},
			authority.TrustProgress{Held: []string{"k1"}, Acknowledged: []string{"k1"}},
		},
		"one never acknowledged, one turned it down, one has gone": {
			[]rollout.Consumer{
				{Peer: 2, API: "sotw"},
				{Peer: 1, API: "sotw", Acknowledged: first, Rejected: true, Text: "bad root"},
				{Peer: 3, API: "sotw", Acknowledged: first, Rejected: true},
			},
			authority.TrustProgress{
				Held: held, Acknowledged: []string{}, Consumers: 3, Lagging: 3,
				Laggards: []authority.Laggard{
					{Name: "ns/one", API: "sotw", Rejected: "bad root"},
					{Name: "ns/two", API: "sotw"},
					{Name: "unknown", API: "sotw", Rejected: "rejected"},
				},
			},
			authority.TrustProgress{Held: []string{"k1"}, Acknowledged: []string{"k1"}},
		},
		"a generation nobody remembers": {
			[]rollout.Consumer{{Peer: 1, API: "x", JWT: true, Acknowledged: 9999}},
			authority.TrustProgress{Held: held, Acknowledged: held},
			authority.TrustProgress{
				Held: []string{"k1"}, Acknowledged: []string{}, Consumers: 1, Lagging: 1,
				Laggards: []authority.Laggard{{Name: "ns/one", API: "x"}},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			n.consumers = tc.consumers
			got := n.reporter().Look()
			if d := cmp.Diff(authority.TrustReport{X509: tc.x509, JWT: tc.jwt}, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestBounded: a report has few lines of few bytes, those that say most, and the
// sums are of all.
func TestBounded(t *testing.T) {
	t.Parallel()
	var roots []string
	for i := range 2 * authority.MaxReportedIDs {
		roots = append(roots, fmt.Sprint("root-", i))
	}
	n := newNode(roots...)
	const many = 500
	for i := range uint64(many) {
		n.names[i] = strings.Repeat("é", authority.MaxReportedText)
		n.consumers = append(n.consumers, rollout.Consumer{Peer: i, API: "sotw"})
	}
	n.consumers[many-1].Rejected = true
	n.consumers[many-1].Text = "x" + strings.Repeat("é", authority.MaxReportedText) + "\xff"
	x := n.reporter().Look().X509
	if x.Consumers != many || x.Lagging != many || len(x.Laggards) != authority.MaxReportedLaggards || len(x.Held) != authority.MaxReportedIDs {
		t.Fatalf("%d consumers, %d lag, %d are named, %d IDs", x.Consumers, x.Lagging, len(x.Laggards), len(x.Held))
	}
	if n.asked > 2*authority.MaxReportedLaggards {
		t.Errorf("%d names were asked for", n.asked)
	}
	if !slices.ContainsFunc(x.Laggards, func(l authority.Laggard) bool { return l.Rejected != "" }) {
		t.Error("the one that turned it down is not among them")
	}
	for _, l := range x.Laggards {
		for _, s := range []string{l.Name, l.Rejected} {
			if len(s) > authority.MaxReportedText || !utf8.ValidString(s) {
				t.Errorf("%d bytes: %q", len(s), s)
			}
		}
	}
}

func TestReportsChangesOnly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode()
		n.run(t)
		pass(time.Hour)
		if reports, _ := n.count(); reports != 0 {
			t.Fatalf("%d reports without a bundle", reports)
		}
		n.rotate("a")
		synctest.Wait()
		if reports, _ := n.count(); reports != 1 {
			t.Fatalf("%d reports in the instant of the first bundle", reports)
		}
		n.edit(func() { n.consumers = []rollout.Consumer{{Peer: 1, API: "sotw", Acknowledged: n.trust.Roots().Number}} })
		pass(time.Hour)
		reports, before := n.count()
		if reports != 2 {
			t.Fatalf("%d reports after a stream came", reports)
		}
		pass(time.Hour)
		if again, looks := n.count(); again != reports || looks-before > 61 {
			t.Errorf("%d reports, %d looks in an hour in which nothing changed", again-reports, looks-before)
		}
		n.rotate("a", "b")
		synctest.Wait()
		if x := n.last().X509; x.Lagging != 1 || !slices.Equal(x.Acknowledged, hexOf("a")) {
			t.Errorf("in the instant of the change: %+v", x)
		}
		n.edit(func() { n.consumers[0].Acknowledged = n.trust.Roots().Number })
		pass(100 * time.Millisecond)
		if x := n.last().X509; x.Lagging != 0 || len(x.Acknowledged) != 2 {
			t.Errorf("100 ms after the acknowledgement: %+v", x)
		}
		n.edit(func() { n.outdated = 3 })
		pass(time.Minute)
		if got := n.last().Outdated; got != 3 {
			t.Errorf("%d outdated", got)
		}
	})
}

// TestLaggardsCostLittle: many that never acknowledge are looked at with growing
// pauses, and reported once.
func TestLaggardsCostLittle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := newNode("a")
		for i := range uint64(100) {
			n.consumers = append(n.consumers, rollout.Consumer{Peer: i, API: "sotw", Rejected: i%3 == 0, Text: fmt.Sprint("no ", i)})
		}
		n.run(t)
		pass(10 * time.Minute)
		reports, looks := n.count()
		if reports != 1 {
			t.Errorf("%d reports of the same laggards", reports)
		}
		if looks > 70 {
			t.Errorf("%d looks in 10 min", looks)
		}
		n.edit(func() { n.consumers = n.consumers[:1]; n.consumers[0].Acknowledged = n.trust.Roots().Number })
		pass(10 * time.Second)
		if x := n.last().X509; x.Lagging != 0 || x.Laggards != nil {
			t.Errorf("%+v", x)
		}
	})
}
