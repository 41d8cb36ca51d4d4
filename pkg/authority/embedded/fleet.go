package embedded

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

const (
	// liveFor is how long an agent counts after it was heard of. One that is
	// gone for longer holds nothing up.
	liveFor = 10 * time.Minute
	// settle is how long an agent has for its first report, and how long a
	// started authority waits for agents it knows from before.
	settle = 2 * time.Minute
	// maxLagging is how many agents are named.
	maxLagging = 20
)

// fleet is what this process has heard from its agents about the own trust
// bundle. It is not stored: agents tell again. Safe for concurrent use.
type fleet struct {
	started time.Time

	mu     sync.Mutex
	agents map[spiffeid.ID]*heard
}

// heard is one agent's word.
type heard struct {
	first, last time.Time
	report      *authority.TrustReport // nil = none yet; immutable
}

func newFleet() *fleet { return &fleet{started: time.Now(), agents: make(map[spiffeid.ID]*heard)} }

func (f *fleet) hear(id spiffeid.ID, report *authority.TrustReport) {
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.agents[id]
	if h == nil {
		h = &heard{first: now}
		f.agents[id] = h
	}
	h.last = now
	if report != nil {
		h.report = report
	}
}

// AgentSeen notes that an attested agent is there.
func (a *Authority) AgentSeen(id spiffeid.ID) { a.fleet.hear(id, nil) }

// ReportTrust takes an attested agent's word on how far the own trust bundle
// has got. Nothing but the time of a rotation depends on it, and that only up to
// the deadline; what is too long is cut.
func (a *Authority) ReportTrust(id spiffeid.ID, r authority.TrustReport) {
	r.X509, r.JWT = bounded(r.X509), bounded(r.JWT)
	r.Outdated = max(r.Outdated, 0)
	a.fleet.hear(id, &r)
}

func bounded(p authority.TrustProgress) authority.TrustProgress {
	out := authority.TrustProgress{Consumers: max(p.Consumers, 0), Lagging: min(max(p.Lagging, 0), max(p.Consumers, 0))}
	for _, ids := range []struct {
		from []string
		to   *[]string
	}{{p.Held, &out.Held}, {p.Acknowledged, &out.Acknowledged}} {
		for _, id := range ids.from[:min(len(ids.from), authority.MaxReportedIDs)] {
			if len(id) <= authority.MaxReportedText {
				*ids.to = append(*ids.to, strings.Clone(id))
			}
		}
	}
	for _, l := range p.Laggards[:min(len(p.Laggards), authority.MaxReportedLaggards)] {
		out.Laggards = append(out.Laggards, authority.Laggard{Name: cut(l.Name), API: cut(l.API), Rejected: cut(l.Rejected)})
	}
	return out
}

func cut(s string) string {
	return strings.Clone(strings.ToValidUTF8(s[:min(len(s), authority.MaxReportedText)], ""))
}

// LaggingAgent is an agent that does not hold an authority yet, or whose
// consumers have not all acknowledged it.
type LaggingAgent struct {
	ID spiffeid.ID
	// Why is one of the Lags.
	Why string
	// Consumers lag behind it; some are named.
	Consumers int
	Laggards  []authority.Laggard
}

// Why an agent lags.
const (
	LagAway      = "not heard of since the authority started"
	LagNoReport  = "has not reported yet"
	LagNotHeld   = "does not hold it yet"
	LagConsumers = "consumers have not acknowledged it"
)

// Progress is how far one authority has got among the agents.
type Progress struct {
	// Agents are those heard of lately, or awaited. Of them, Acknowledged have
	// the authority everywhere, and Silent have no way to say so, as SPIRE
	// Agents: nobody waits for those.
	Agents, Acknowledged, Silent int
	// Consumers are open streams with the bundle; LaggingConsumers, those that
	// have not acknowledged the authority.
	Consumers, LaggingConsumers int
	// Lagging counts agents; Laggards are some of them.
	Lagging  int
	Laggards []LaggingAgent
	// Outdated are SVIDs in use that hang on a tainted or revoked authority.
	Outdated int
}

// progress is that of an authority with an ID as in the bundle; an empty one is
// held by nobody and lacked by nobody.
func (a *Authority) progress(k kind, id string, now time.Time) (p Progress) {
	f := a.fleet
	f.mu.Lock()
	defer f.mu.Unlock()
	for agent := range a.Agents() {
		if agent.Banned || !agent.ExpiresAt.IsZero() && now.After(agent.ExpiresAt) {
			delete(f.agents, agent.ID)
			continue
		}
		h := f.agents[agent.ID]
		switch {
		case h == nil && now.Sub(f.started) < settle:
			p.lag(LaggingAgent{ID: agent.ID, Why: LagAway})
		case h == nil || now.Sub(h.last) > liveFor:
		case h.report == nil && now.Sub(h.first) < settle:
			p.lag(LaggingAgent{ID: agent.ID, Why: LagNoReport})
		case h.report == nil:
			p.Agents++
			p.Silent++
		default:
			p.add(agent.ID, h.report, k, id)
		}
	}
	if len(f.agents) > 2*a.AgentCount()+64 {
		for id := range f.agents {
			if _, err := a.Agent(id); err != nil {
				delete(f.agents, id)
			}
		}
	}
	slices.SortFunc(p.Laggards, func(x, y LaggingAgent) int {
		return cmp.Or(cmp.Compare(y.Consumers, x.Consumers), cmp.Compare(x.ID.String(), y.ID.String()))
	})
	return p
}

func (p *Progress) add(agent spiffeid.ID, r *authority.TrustReport, k kind, id string) {
	of := &r.X509
	if k == kindJWT {
		of = &r.JWT
	} else {
		p.Outdated += r.Outdated
	}
	p.Consumers += of.Consumers
	switch {
	case id == "":
		p.Agents++
	case !slices.Contains(of.Held, id):
		p.LaggingConsumers += of.Consumers
		p.lag(LaggingAgent{ID: agent, Why: LagNotHeld, Consumers: of.Consumers})
	case !slices.Contains(of.Acknowledged, id):
		p.LaggingConsumers += of.Lagging
		p.lag(LaggingAgent{ID: agent, Why: LagConsumers, Consumers: of.Lagging, Laggards: of.Laggards})
	default:
		p.Agents++
		p.Acknowledged++
	}
}

func (p *Progress) lag(l LaggingAgent) {
	p.Agents++
	p.Lagging++
	if len(p.Laggards) < maxLagging {
		p.Laggards = append(p.Laggards, l)
	}
}

// Names is who lags, in a line of bounded length: agents by their last path
// segment, with some of their consumers.
func (p *Progress) Names() string {
	const most = 4
	var b strings.Builder
	for i, l := range p.Laggards {
		if i == most {
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(l.ID.Path())
		b.WriteString(" (")
		b.WriteString(l.Why)
		for j, c := range l.Laggards[:min(len(l.Laggards), most)] {
			b.WriteString(map[bool]string{true: ": ", false: ", "}[j == 0])
			b.WriteString(c.Name)
			if c.Rejected != "" {
				b.WriteString(" rejected it")
			}
		}
		b.WriteString(")")
	}
	if p.Lagging > most {
		b.WriteString(", ...")
	}
	return b.String()
}
