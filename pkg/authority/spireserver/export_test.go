package spireserver

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/latest"
	"github.com/spiffe-node/spiffe-node/internal/memstate"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// ForTests sets what only tests may: the dialer (nil = TCP), state on any
// filesystem, and polling of a server that would push.
func (c *Config) ForTests(dial func(ctx context.Context, address string) (net.Conn, error), noWatch bool) {
	c.dial, c.anyFilesystem, c.noWatch = dial, true, noWatch
}

// OnDisk takes back that state may be on any filesystem.
func (c *Config) OnDisk() { c.anyFilesystem = false }

// BundleFromWire is the bundle of a message.
func BundleFromWire(td spiffeid.TrustDomain, in *typespb.Bundle) (*spiffebundle.Bundle, error) {
	b, err := bundleFromWire(td, in)
	if err != nil {
		return nil, err
	}
	return b.Bundle, nil
}

func quiet(td spiffeid.TrustDomain) *Client {
	c := &Client{cfg: Config{TrustDomain: td}, log: slog.New(slog.DiscardHandler), met: NewMetrics(nil)}
	c.identity, c.set, c.bundles = latest.New[*nodeSVID](nil), latest.New[*entry.Set](nil), latest.New[*authority.BundleSet](nil)
	c.ledger = ledger{missing: map[string]absence{}, denied: map[string]bool{}}
	c.follow.posted = true
	return c
}

// Listed is the set after an answer, and after the same answer again.
func Listed(tb testing.TB, td spiffeid.TrustDomain, in []*typespb.Entry) (once, twice *entry.Set) {
	tb.Helper()
	c := quiet(td)
	for range 2 {
		answer := &listing{listed: map[string]bool{}}
		if err := c.addEntries(answer, in, nil); err != nil {
			tb.Fatal(err)
		}
		once = twice
		twice, _ = c.ledger.apply(answer, time.Now())
	}
	return once, twice
}

// Pushed takes an event as a change of its own.
func Pushed(tb testing.TB, td spiffeid.TrustDomain, ev *watchpb.WatchEvent) {
	tb.Helper()
	c := quiet(td)
	for range 2 {
		ch := &change{reset: ev.GetReset_(), ids: map[string]bool{}, foreign: map[spiffeid.TrustDomain]bool{}, version: ev.GetVersion()}
		if c.addEvent(ch, ev) == nil {
			_ = c.applyChange(ch)
		}
	}
}

// Summed is a state with the checksum that belongs to it.
func Summed(body []byte) []byte {
	return memstate.Seal(stateHeader, body)
}

// Pace drives the rhythm of syncs: the pause after each of n syncs of the given
// length, with a hurry before the first.
func Pace(interval, took time.Duration, n int, hurry bool, err error) []time.Duration {
	p := pace{interval: interval}
	now := time.Unix(0, 0)
	var out []time.Duration
	if hurry {
		p.hurry(now)
	}
	for range n {
		end := now.Add(took)
		d := p.after(now, end, err, time.Time{})
		out = append(out, d)
		now = end.Add(d)
	}
	return out
}

// BundleURLWith is BundleURL with other roots than the system's.
func BundleURLWith(transport http.RoundTripper, address, format string) Bootstrap {
	return bundleURL(transport, address, format)
}

// BundleConfigMapOf is BundleConfigMap in another pod than this.
func BundleConfigMapOf(from ConfigMap, format, account string, getenv func(string) string) Bootstrap {
	return bundleConfigMap(from, format, account, getenv)
}

// What outside input passes through, and what tests drive alone.
var (
	ConfigMapKey = configMapKey
	POPAnswer    = popAnswer
	FirstOf      = firstOf
	DialTCP      = dialTCP
)
