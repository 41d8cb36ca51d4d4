package adminapi_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// picture is what a client makes of the events.
type picture struct {
	t      *testing.T
	stream watchpb.Watch_WatchClient

	entries map[string]*typespb.Entry
	own     *typespb.Bundle
	foreign map[string]*typespb.Bundle
	version string
	// of the last change
	reset  bool
	pieces int
	news   int // entries, removals and bundles in it
}

func (s *server) watch(t *testing.T, as identity, resume *picture) *picture {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	req := &watchpb.WatchRequest{}
	p := &picture{t: t, entries: map[string]*typespb.Entry{}, foreign: map[string]*typespb.Bundle{}}
	if resume != nil {
		*p = *resume
		req.Resume = resume.version
	}
	stream, err := watchpb.NewWatchClient(s.dial(t, as)).Watch(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	p.stream = stream
	return p
}

// next takes in one whole change.
func (p *picture) next() {
	p.t.Helper()
	p.reset, p.pieces, p.news = false, 0, 0
	for {
		e, err := p.stream.Recv()
		if err != nil {
			p.t.Fatal(err)
		}
		p.pieces++
		if e.GetReset_() {
			p.reset = true
			clear(p.entries)
			clear(p.foreign)
		}
		for _, in := range e.GetEntries() {
			p.entries[in.GetId()] = in
		}
		for _, id := range e.GetRemovedEntries() {
			delete(p.entries, id)
		}
		for _, b := range e.GetFederatedBundles() {
			p.foreign[b.GetTrustDomain()] = b
		}
		for _, td := range e.GetRemovedBundles() {
			delete(p.foreign, td)
		}
		p.news += len(e.GetEntries()) + len(e.GetRemovedEntries()) + len(e.GetFederatedBundles()) + len(e.GetRemovedBundles())
		if e.GetBundle() != nil {
			p.own = e.GetBundle()
			p.news++
		}
		if !e.GetMore() {
			if e.GetVersion() == "" {
				p.t.Error("a change without a version")
			}
			p.version = e.GetVersion()
			return
		}
	}
}

func (p *picture) want(paths ...string) {
	p.t.Helper()
	var got []string
	for _, e := range p.entries {
		got = append(got, e.GetSpiffeId().GetPath())
	}
	slices.Sort(got)
	if diff := cmp.Diff(paths, got); diff != "" {
		p.t.Error(diff)
	}
}

func TestWatchPushesChanges(t *testing.T) {
	s := serve(t)
	agent, other := s.joined(t, "a"), s.joined(t, "b")
	first := s.entry(t, agent.id, "/w1", func(e *entry.Entry) { e.DNSNames = []string{"x.example"} })
	s.entry(t, other.id, "/not-ours")
	p := s.watch(t, agent, nil)
	p.next()
	p.want("/w1")
	if !p.reset || p.own.GetTrustDomain() != "td" || len(p.own.GetX509Authorities()) != 1 {
		t.Errorf("begins with reset %t and bundle %v", p.reset, p.own)
	}
	if e := p.entries[first.ID]; len(e.GetDnsNames()) != 1 || e.GetParentId() == nil {
		t.Errorf("entry %v lacks something", e)
	}

	if err := s.nodes.Serving(other.id); err == nil || !strings.Contains(err.Error(), "not connected") {
		t.Errorf("an agent without a stream: %v", err)
	}
	if err := s.nodes.Serving(spiffeid.RequireFromPath(td, "/spire/agent/nobody")); err == nil || !strings.Contains(err.Error(), "not attested") {
		t.Errorf("an agent that never came: %v", err)
	}
	s.entry(t, other.id, "/not-ours-either") // says nothing
	start := time.Now()
	second := s.entry(t, agent.id, "/w2")
	p.next()
	t.Logf("pushed within %s, the disk included", time.Since(start))
	p.want("/w1", "/w2")
	if p.reset || p.news != 1 {
		t.Errorf("reset %t, %d news", p.reset, p.news)
	}
	if err := s.nodes.Serving(agent.id); err != nil {
		t.Errorf("an agent with a stream: %v", err)
	}
	if _, err := s.UpdateEntry(t.Context(), first.ID, func(e *entry.Entry) error { e.Hint = "new"; return nil }); err != nil {
		t.Fatal(err)
	}
	p.next()
	if e := p.entries[first.ID]; e.GetHint() != "new" || e.GetRevisionNumber() != 1 || p.news != 1 {
		t.Errorf("updated %v, %d news", e, p.news)
	}
	if err := s.DeleteEntry(t.Context(), second.ID); err != nil {
		t.Fatal(err)
	}
	p.next()
	p.want("/w1")

	if _, err := s.PrepareX509(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.next()
	if len(p.own.GetX509Authorities()) != 2 || p.news != 1 {
		t.Errorf("bundle %v, %d news", p.own, p.news)
	}
	far := spiffeid.RequireTrustDomainFromString("far")
	if err := s.SetFederatedBundle(t.Context(), &embedded.Bundle{TrustDomain: far, X509: s.OwnBundle().X509}); err != nil {
		t.Fatal(err)
	}
	p.next()
	if len(p.foreign["far"].GetX509Authorities()) != 2 || p.news != 1 {
		t.Errorf("federated %v, %d news", p.foreign, p.news)
	}
	if err := s.DeleteFederatedBundle(t.Context(), far, embedded.Restrict); err != nil {
		t.Fatal(err)
	}
	p.next()
	if len(p.foreign) != 0 || p.news != 1 {
		t.Errorf("federated %v, %d news", p.foreign, p.news)
	}
}

func TestWatchResumes(t *testing.T) {
	s := serve(t)
	agent := s.joined(t, "a")
	first := s.entry(t, agent.id, "/w1")
	p := s.watch(t, agent, nil)
	p.next()
	_ = p.stream.CloseSend()
	s.entry(t, agent.id, "/w2")
	if err := s.DeleteEntry(t.Context(), first.ID); err != nil {
		t.Fatal(err)
	}
	q := s.watch(t, agent, p)
	q.next()
	q.want("/w2")
	if q.reset || q.news != 2 {
		t.Errorf("resumed with reset %t, %d news", q.reset, q.news)
	}
	s.entry(t, agent.id, "/w3")
	q.next()
	q.want("/w2", "/w3")
	// Nothing new is one event, so that the client knows where it stands.
	r := s.watch(t, agent, q)
	r.next()
	if r.reset || r.news != 0 {
		t.Errorf("up to date: reset %t, %d news", r.reset, r.news)
	}
	// With a bundle changed meanwhile, or any other word, it starts over.
	if _, err := s.PrepareX509(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{r.version, "x", "..", "a.1.2", r.version + "9", strings.Repeat("9", 1000), "%d.%d.%d"} {
		r.version = version
		q := s.watch(t, agent, r)
		q.next()
		q.want("/w2", "/w3")
		if !q.reset || len(q.own.GetX509Authorities()) != 2 {
			t.Errorf("resumed from %q: reset %t", version, q.reset)
		}
	}
	// Another agent's position is as good as none.
	b := s.joined(t, "b")
	q = s.watch(t, b, r)
	q.next()
	q.want()
	if !q.reset {
		t.Error("resumed from another agent's position")
	}
}

func TestWatchOfALargeSet(t *testing.T) {
	s := serve(t)
	agent := s.joined(t, "a")
	s.fill(t, agent.id, 1203)
	p := s.watch(t, agent, nil)
	p.next()
	if len(p.entries) != 1203 || p.pieces != 3 {
		t.Errorf("%d entries in %d pieces", len(p.entries), p.pieces)
	}
	// More than one message may hold, in bytes.
	var batch []*entry.Entry
	for i := range 400 {
		e := &entry.Entry{SPIFFEID: spiffeid.RequireFromPath(td, fmt.Sprintf("/long/%d", i)), ParentID: agent.id, Selectors: localSelectors}
		for n := range 100 {
			e.DNSNames = append(e.DNSNames, fmt.Sprintf("%d.%sexample", n, strings.Repeat(strings.Repeat("x", 50)+".", 3)))
		}
		batch = append(batch, e)
	}
	for _, r := range s.CreateEntries(t.Context(), batch...) {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	p.next()
	if len(p.entries) != 1603 || p.pieces < 4 || p.reset {
		t.Errorf("%d entries in %d pieces", len(p.entries), p.pieces)
	}
}

func TestWatchEnds(t *testing.T) {
	s := serve(t)
	const method = watchpb.Watch_Watch_FullMethodName
	begin := func(as identity) *picture {
		t.Helper()
		p := s.watch(t, as, nil)
		p.next()
		return p
	}
	wantEnd := func(p *picture, reason typespb.PermissionDeniedDetails_Reason) {
		t.Helper()
		_, err := p.stream.Recv()
		wantDenied(t, err, method, reason)
	}
	banned, evicted, again, renewed := s.joined(t, "a"), s.joined(t, "b"), s.joined(t, "c"), s.joined(t, "d")

	p := begin(banned)
	if _, err := s.BanAgent(t.Context(), banned.id); err != nil {
		t.Fatal(err)
	}
	wantEnd(p, typespb.PermissionDeniedDetails_AGENT_BANNED)

	p = begin(evicted)
	if err := s.DeleteAgent(t.Context(), evicted.id); err != nil {
		t.Fatal(err)
	}
	wantEnd(p, typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED)

	// A newer SVID of the same agent is no fault of it.
	p = begin(again)
	if _, err := s.UpdateAgent(t.Context(), again.id, func(a *embedded.Agent) error { a.Serial = "1"; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := p.stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("replaced: %v", err)
	}
	q := s.watch(t, again, nil)
	wantEnd(q, typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE)

	// A renewal that is under way ends nothing.
	p = begin(renewed)
	key, csr := keyAndCSR(t)
	resp, err := agentpb.NewAgentClient(s.dial(t, renewed)).RenewAgent(t.Context(), &agentpb.RenewAgentRequest{Params: &agentpb.AgentX509SVIDParams{Csr: csr}})
	if err != nil {
		t.Fatal(err)
	}
	s.entry(t, renewed.id, "/w")
	p.next()
	p.want("/w")
	next := identity{renewed.id, resp.GetSvid().GetCertChain(), key}
	if _, err := entrypb.NewEntryClient(s.dial(t, next)).GetAuthorizedEntries(t.Context(), &entrypb.GetAuthorizedEntriesRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("renewed: %v", err)
	}
	// The new SVID resumes where the old one was.
	r := s.watch(t, next, p)
	r.next()
	if r.reset || r.news != 0 {
		t.Errorf("resumed with reset %t, %d news", r.reset, r.news)
	}
}

func TestWatchEndsWithTheSVID(t *testing.T) {
	s := serve(t, func(s *settings) { s.embedded.DefaultX509SVIDTTL = 2 * time.Second })
	p := s.watch(t, s.joined(t, "a"), nil)
	p.next()
	_, err := p.stream.Recv()
	wantDenied(t, err, watchpb.Watch_Watch_FullMethodName, typespb.PermissionDeniedDetails_AGENT_EXPIRED)
}

// Many streams, many changes: every client ends with the same picture.
func TestWatchersAgree(t *testing.T) {
	s := serve(t)
	const agents, rounds = 20, 30
	var watchers []*picture
	var ids []identity
	for i := range agents {
		ids = append(ids, s.joined(t, fmt.Sprintf("n%d", i)))
		watchers = append(watchers, s.watch(t, ids[i], nil))
	}
	done := make(chan int, agents)
	for i, p := range watchers {
		go func() {
			defer func() { done <- i }()
			for p.next(); len(p.entries) < rounds; {
				p.next()
			}
		}()
	}
	for i := range rounds {
		var batch []*entry.Entry
		for _, as := range ids {
			batch = append(batch, &entry.Entry{SPIFFEID: spiffeid.RequireFromPath(td, fmt.Sprintf("%s/w%d", strings.TrimPrefix(as.id.Path(), "/spire/agent"), i)), ParentID: as.id, Selectors: localSelectors})
		}
		for _, r := range s.CreateEntries(t.Context(), batch...) {
			if r.Err != nil {
				t.Fatal(r.Err)
			}
		}
	}
	for range agents {
		<-done
	}
	for i, p := range watchers {
		for e := range maps.Values(p.entries) {
			if e.GetParentId().GetPath() != ids[i].id.Path() {
				t.Errorf("agent %d was given %v", i, e)
			}
		}
	}
}
