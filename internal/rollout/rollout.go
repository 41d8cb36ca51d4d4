// Package rollout watches how the own trust bundle spreads on this node and
// tells the authority: which authorities the agent holds, which of them every
// open consumer has acknowledged, and who lags.
//
// Promise: a consumer costs the streams a few bytes and the reports nothing
// while nothing changes. While somebody lags the streams are looked at with
// growing pauses; otherwise once a minute. What is reported is bounded, however
// many lag.
//
// Threats: names and words in a report are a workload's or its pod's. They are
// cut to a length here and treated as text by whoever shows them. A consumer
// that never acknowledges is a line in a report and no more: what follows from
// it is the authority's decision, which has a deadline.
package rollout

import (
	"cmp"
	"context"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// Pauses between looks.
const (
	lookFirst = 50 * time.Millisecond
	lookMax   = 10 * time.Second
	// lookSettled is when pushes of a change are no longer on their way.
	lookSettled = time.Second
	lookIdle    = time.Minute
)

// Holder knows the own trust bundle; *svid.Manager is one.
type Holder interface {
	Trust() *svid.Trust
	TrustChanged() <-chan struct{}
	Outdated() int
}

// Consumer is one open stream that has been given the own bundle.
type Consumer struct {
	Peer uint64
	API  string
	JWT  bool // carries JWT authorities, not X.509 ones
	// Acknowledged is a generation, see svid.Trust; 0 = none yet.
	Acknowledged uint32
	Rejected     bool
	Text         string // what the client said when it did
}

// Config is what a Reporter is built from. All fields are required.
type Config struct {
	Holder Holder
	// Consumers visits the open consumers.
	Consumers func(visit func(Consumer))
	// Names says who the peers with these numbers are; one that has gone may be
	// left out.
	Names func(peers map[uint64]string)
	// Report is told what changed; it must not block.
	Report func(authority.TrustReport)
}

// Reporter watches and tells. Look may be called by anybody; Run once.
type Reporter struct{ cfg Config }

// New builds a Reporter.
func New(cfg Config) *Reporter { return &Reporter{cfg: cfg} }

// Run reports every change until ctx ends.
func (r *Reporter) Run(ctx context.Context) error {
	var told *authority.TrustReport
	timer := time.NewTimer(0)
	defer timer.Stop()
	pause := lookFirst
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.cfg.Holder.TrustChanged():
			pause = lookFirst
		case <-timer.C:
		}
		now := r.Look()
		if len(now.X509.Held) > 0 && (told == nil || !reflect.DeepEqual(now, *told)) {
			told = &now
			r.cfg.Report(now)
		}
		wait := pause
		pause = min(2*pause, lookMax)
		if now.X509.Lagging+now.JWT.Lagging+now.Outdated == 0 && wait > lookSettled {
			wait = lookIdle
		}
		timer.Reset(wait)
	}
}

// Look is the report at this moment.
func (r *Reporter) Look() authority.TrustReport {
	trust := r.cfg.Holder.Trust()
	x := newProgress(trust.Roots(), trust.RootsAt)
	j := newProgress(trust.Keys(), trust.KeysAt)
	r.cfg.Consumers(func(c Consumer) {
		if c.JWT {
			j.add(c)
		} else {
			x.add(c)
		}
	})
	names := make(map[uint64]string)
	for _, c := range slices.Concat(x.lagging, j.lagging) {
		names[c.Peer] = ""
	}
	if len(names) > 0 {
		r.cfg.Names(names)
	}
	return authority.TrustReport{X509: x.report(names), JWT: j.report(names), Outdated: r.cfg.Holder.Outdated()}
}

// progress collects one kind.
type progress struct {
	held    svid.Generation
	at      func(uint32) []string
	acked   []string        // by all so far
	seen    map[uint32]bool // generations taken into acked
	count   int
	behind  int
	lagging []Consumer // some of them, by weight
}

func newProgress(held svid.Generation, at func(uint32) []string) *progress {
	return &progress{held: held, at: at, acked: held.IDs, seen: map[uint32]bool{held.Number: true}}
}

func (p *progress) add(c Consumer) {
	p.count++
	if !p.seen[c.Acknowledged] {
		p.seen[c.Acknowledged] = true
		has := p.at(c.Acknowledged)
		p.acked = slices.DeleteFunc(slices.Clone(p.acked), func(id string) bool { return !slices.Contains(has, id) })
	}
	if c.Acknowledged == p.held.Number {
		return
	}
	p.behind++
	// Always the same ones, in whatever order they are visited: a report is
	// compared with the one before.
	if i, _ := slices.BinarySearchFunc(p.lagging, c, byWeight); i < authority.MaxReportedLaggards {
		p.lagging = slices.Insert(p.lagging, i, c)
		p.lagging = p.lagging[:min(len(p.lagging), authority.MaxReportedLaggards)]
	}
}

// byWeight has those that turned the bundle down first: it says more than
// silence.
func byWeight(a, b Consumer) int {
	if a.Rejected != b.Rejected {
		if a.Rejected {
			return -1
		}
		return 1
	}
	return cmp.Or(cmp.Compare(a.Peer, b.Peer), cmp.Compare(a.API, b.API), cmp.Compare(a.Text, b.Text))
}

func (p *progress) report(names map[uint64]string) authority.TrustProgress {
	out := authority.TrustProgress{Held: cutIDs(p.held.IDs), Acknowledged: cutIDs(p.acked), Consumers: p.count, Lagging: p.behind}
	for _, c := range p.lagging {
		l := authority.Laggard{Name: cut(cmp.Or(names[c.Peer], "unknown")), API: c.API}
		if c.Rejected {
			l.Rejected = cut(cmp.Or(c.Text, "rejected"))
		}
		out.Laggards = append(out.Laggards, l)
	}
	slices.SortFunc(out.Laggards, func(a, b authority.Laggard) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.API, b.API), cmp.Compare(a.Rejected, b.Rejected))
	})
	return out
}

func cutIDs(ids []string) []string { return ids[:min(len(ids), authority.MaxReportedIDs)] }

func cut(s string) string {
	if len(s) > authority.MaxReportedText {
		s = s[:authority.MaxReportedText]
	}
	return strings.ToValidUTF8(s, "")
}
