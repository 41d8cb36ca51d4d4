package adminapi_test

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// agentMask is what a SPIRE Agent asks for.
var agentMask = &typespb.EntryMask{
	SpiffeId: true, Selectors: true, FederatesWith: true, Admin: true, Downstream: true, RevisionNumber: true,
	StoreSvid: true, Hint: true, AdditionalAttributes: true, CreatedAt: true,
}

// fill stores n entries below a parent; their IDs sort against the order of
// their creation.
func (s *server) fill(t *testing.T, parent spiffeid.ID, n int) {
	t.Helper()
	var batch []*entry.Entry
	for i := range n {
		batch = append(batch, &entry.Entry{
			ID: fmt.Sprintf("e%05d", n-i), SPIFFEID: spiffeid.RequireFromPath(td, fmt.Sprintf("/w%d", i)),
			ParentID: parent, Selectors: localSelectors, Hint: "h", DNSNames: []string{"a.example"},
		})
	}
	for _, r := range s.CreateEntries(t.Context(), batch...) {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
}

// sync is a conversation with the real server.
type syncing struct {
	t *testing.T
	entrypb.Entry_SyncAuthorizedEntriesClient
}

func (s *server) sync(t *testing.T, as identity) *syncing {
	t.Helper()
	stream, err := entrypb.NewEntryClient(s.dial(t, as)).SyncAuthorizedEntries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &syncing{t, stream}
}

func (s *syncing) ask(req *entrypb.SyncAuthorizedEntriesRequest) {
	s.t.Helper()
	if err := s.Send(req); err != nil {
		s.t.Fatal(err)
	}
}

// pages receives until there is no more.
func (s *syncing) pages() (out []*entrypb.SyncAuthorizedEntriesResponse) {
	s.t.Helper()
	for {
		resp, err := s.Recv()
		if err != nil {
			s.t.Fatal(err)
		}
		if out = append(out, resp); !resp.GetMore() {
			return out
		}
	}
}

func (s *syncing) wantEnd(code codes.Code, text string) {
	s.t.Helper()
	_, err := s.Recv()
	if code == codes.OK {
		if err != io.EOF { //nolint:errorlint // this is how streams end
			s.t.Errorf("ended with %v", err)
		}
		return
	}
	want{int32(code), text}.checkError(s.t, err)
}

func TestSyncOfASmallSet(t *testing.T) {
	s := serve(t)
	agent := s.joined(t, "a")
	for _, n := range []int{0, 500} { // exactly a page is still sent whole
		s.fill(t, agent.id, n)
		c := s.sync(t, agent)
		c.ask(&entrypb.SyncAuthorizedEntriesRequest{OutputMask: agentMask})
		got := c.pages()
		if len(got) != 1 || len(got[0].GetEntries()) != n || len(got[0].GetEntryRevisions()) != 0 {
			t.Fatalf("%d entries: %d pages, the first with %d entries, %d revisions", n, len(got), len(got[0].GetEntries()), len(got[0].GetEntryRevisions()))
		}
		c.wantEnd(codes.OK, "")
		for _, e := range got[0].GetEntries() {
			if e.GetId() == "" || e.GetSpiffeId() == nil || e.GetHint() != "h" || e.GetCreatedAt() == 0 || len(e.GetSelectors()) != 1 {
				t.Fatalf("incomplete: %v", e)
			}
			if e.GetParentId() != nil || len(e.GetDnsNames()) != 0 {
				t.Fatalf("not masked: %v", e)
			}
		}
	}
}

func TestSyncOfALargeSet(t *testing.T) {
	s := serve(t)
	agent := s.joined(t, "a")
	s.fill(t, agent.id, 1203)
	if _, err := s.UpdateEntry(t.Context(), "e00007", func(*entry.Entry) error { return nil }); err != nil {
		t.Fatal(err)
	}
	c := s.sync(t, agent)
	c.ask(&entrypb.SyncAuthorizedEntriesRequest{OutputMask: agentMask})
	var sizes []int
	revisions := make(map[string]*entrypb.EntryRevision)
	for _, p := range c.pages() {
		sizes = append(sizes, len(p.GetEntryRevisions()))
		if len(p.GetEntries()) != 0 {
			t.Error("entries among the revisions")
		}
		for _, r := range p.GetEntryRevisions() {
			revisions[r.GetId()] = r
		}
	}
	if diff := cmp.Diff([]int{500, 500, 203}, sizes); diff != "" || len(revisions) != 1203 {
		t.Errorf("pages %v of %d", sizes, len(revisions))
	}
	// Unknown and repeated IDs are left out; answers come in the order of IDs.
	c.ask(&entrypb.SyncAuthorizedEntriesRequest{Ids: []string{"e00009", "no such", "e00007", "e00009", ""}, OutputMask: &typespb.EntryMask{}})
	got := c.pages()
	var ids []string
	for _, e := range got[0].GetEntries() {
		ids = append(ids, e.GetId())
		if r := revisions[e.GetId()]; r.GetRevisionNumber() != e.GetRevisionNumber() || r.GetCreatedAt() != e.GetCreatedAt() || r.GetCreatedAt() == 0 {
			t.Errorf("revision %v of entry %v", r, e)
		}
		if e.GetHint() != "h" {
			t.Error("the mask of a later request counts")
		}
	}
	if diff := cmp.Diff([]string{"e00007", "e00009"}, ids); diff != "" || len(got) != 1 {
		t.Errorf("%d pages: %s", len(got), diff)
	}
	if revisions["e00007"].GetRevisionNumber() != 1 {
		t.Errorf("revision %v", revisions["e00007"])
	}
	// No hit at all is one empty page.
	c.ask(&entrypb.SyncAuthorizedEntriesRequest{Ids: []string{"no such"}})
	if got := c.pages(); len(got) != 1 || len(got[0].GetEntries())+len(got[0].GetEntryRevisions()) != 0 {
		t.Errorf("no hit: %v", got)
	}
	// The set is that of the beginning, whatever happens meanwhile.
	if err := s.DeleteEntry(t.Context(), "e00001"); err != nil {
		t.Fatal(err)
	}
	var all []string
	for name := range revisions {
		all = append(all, name)
	}
	c.ask(&entrypb.SyncAuthorizedEntriesRequest{Ids: all})
	sizes, ids = nil, nil
	for _, p := range c.pages() {
		sizes = append(sizes, len(p.GetEntries()))
		for _, e := range p.GetEntries() {
			ids = append(ids, e.GetId())
		}
	}
	if diff := cmp.Diff([]int{500, 500, 203}, sizes); diff != "" || !slices.IsSorted(ids) {
		t.Errorf("pages %v, sorted %t", sizes, slices.IsSorted(ids))
	}
	if err := c.CloseSend(); err != nil {
		t.Fatal(err)
	}
	c.wantEnd(codes.OK, "")
}

func TestSyncRefusals(t *testing.T) {
	s := serve(t)
	agent := s.joined(t, "a")
	c := s.sync(t, agent)
	c.ask(&entrypb.SyncAuthorizedEntriesRequest{Ids: []string{"x"}})
	c.wantEnd(codes.InvalidArgument, "specifying IDs on initial request is not supported")
	c = s.sync(t, agent)
	c.ask(&entrypb.SyncAuthorizedEntriesRequest{OutputMask: &typespb.EntryMask{SpiffeId: true}})
	c.wantEnd(codes.InvalidArgument, "revision number cannot be masked")
	c = s.sync(t, agent)
	if err := c.CloseSend(); err != nil {
		t.Fatal(err)
	}
	c.wantEnd(codes.OK, "")
}

func TestAuthorizedThroughAnAlias(t *testing.T) {
	s := serve(t)
	agent, _, err := s.attestWith(t, "knock", "n1")
	if err != nil {
		t.Fatal(err)
	}
	server := spiffeid.RequireFromPath(td, "/spire/server")
	s.entry(t, server, "/cluster", func(e *entry.Entry) { e.Selectors = attest.MustSelectors("knock:node:n1") })
	s.entry(t, server, "/elsewhere", func(e *entry.Entry) { e.Selectors = attest.MustSelectors("knock:node:n2") })
	mine := s.entry(t, spiffeid.RequireFromPath(td, "/cluster"), "/w1")
	s.entry(t, spiffeid.RequireFromPath(td, "/elsewhere"), "/w2")
	got, err := entrypb.NewEntryClient(s.dial(t, agent)).GetAuthorizedEntries(t.Context(), &entrypb.GetAuthorizedEntriesRequest{OutputMask: &typespb.EntryMask{Hint: true}})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{mine.ID}, entryIDs(got.GetEntries())); diff != "" {
		t.Error(diff)
	}
	if e := got.GetEntries()[0]; !proto.Equal(e, &typespb.Entry{Id: mine.ID}) {
		t.Errorf("not masked: %v", e)
	}
}

func entryIDs(in []*typespb.Entry) (ids []string) {
	for _, e := range in {
		ids = append(ids, e.GetId())
	}
	slices.Sort(ids)
	return ids
}

// The views of agents that are gone are forgotten.
func TestViewsAreBounded(t *testing.T) {
	s := serve(t)
	for i := range 200 {
		agent, _, err := s.attestWith(t, "knock", fmt.Sprintf("n%d", i))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := entrypb.NewEntryClient(s.dial(t, agent)).GetAuthorizedEntries(t.Context(), &entrypb.GetAuthorizedEntriesRequest{}); err != nil {
			t.Fatal(err)
		}
		if err := s.DeleteAgent(t.Context(), agent.id); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.nodes.Views(); n > 70 {
		t.Errorf("%d views of no agent", n)
	}
}

// script is a stream that asks what it is told to and checks the answers.
type script struct {
	t        *testing.T
	requests []*entrypb.SyncAuthorizedEntriesRequest
	page     int
	more     bool
	sent     int
}

func (s *script) Recv() (*entrypb.SyncAuthorizedEntriesRequest, error) {
	if s.more {
		s.t.Error("stopped in the middle of pages")
	}
	if len(s.requests) == 0 {
		return nil, io.EOF
	}
	r := s.requests[0]
	s.requests = s.requests[1:]
	return r, nil
}

func (s *script) Send(r *entrypb.SyncAuthorizedEntriesResponse) error {
	s.sent++
	if n := len(r.GetEntries()) + len(r.GetEntryRevisions()); n > s.page || r.GetMore() && n == 0 {
		s.t.Errorf("a page of %d, more %t", n, r.GetMore())
	}
	s.more = r.GetMore()
	return nil
}

// FuzzSync asks for any IDs with any masks; requests are separated by lines,
// IDs by commas.
func FuzzSync(f *testing.F) {
	f.Add("\ne1,e2,e1\n\nx", uint8(3), uint8(10), true)
	f.Add("e1", uint8(1), uint8(1), false)
	f.Add("\n,,,", uint8(0), uint8(0), true)
	f.Fuzz(func(t *testing.T, lines string, n, page uint8, revision bool) {
		var entries []*entry.Entry
		for i := range n {
			entries = append(entries, &entry.Entry{ID: fmt.Sprintf("e%d", i), SPIFFEID: spiffeid.RequireFromPath(td, fmt.Sprintf("/w%d", i)), ParentID: localID, Selectors: localSelectors})
		}
		s := &script{t: t, page: int(page) + 1}
		for line := range strings.SplitSeq(lines, "\n") {
			r := &entrypb.SyncAuthorizedEntriesRequest{OutputMask: &typespb.EntryMask{RevisionNumber: revision}}
			if line != "" {
				r.Ids = strings.Split(line, ",")
			}
			s.requests = append(s.requests, r)
		}
		requests := len(s.requests)
		err := adminapi.SyncEntries(s, entry.NewSet(entries...), s.page)
		if code := status.Code(err); code != codes.OK && code != codes.InvalidArgument {
			t.Error(err)
		}
		if err == nil && s.sent < requests-len(s.requests) {
			t.Errorf("%d answers to %d requests", s.sent, requests-len(s.requests))
		}
	})
}
