package adminapi_test

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// newEntry is a valid entry of its own SPIFFE ID.
func newEntry(path string, edit ...func(*typespb.Entry)) *typespb.Entry {
	e := &typespb.Entry{ParentId: id("td", "/spire/agent/x"), SpiffeId: id("td", path), Selectors: selectors("unix:uid:1")}
	for _, f := range edit {
		f(e)
	}
	return e
}

// create stores entries and removes them when the test ends.
func create(t *testing.T, c entrypb.EntryClient, entries ...*typespb.Entry) []*entrypb.BatchCreateEntryResponse_Result {
	t.Helper()
	resp, err := c.BatchCreateEntry(t.Context(), &entrypb.BatchCreateEntryRequest{Entries: entries})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.GetResults()) != len(entries) {
		t.Fatalf("%d results for %d entries", len(resp.GetResults()), len(entries))
	}
	var ids []string
	for _, r := range resp.GetResults() {
		if r.GetStatus().GetCode() == 0 {
			ids = append(ids, r.GetEntry().GetId())
		}
	}
	if onRealServer() {
		t.Cleanup(func() { _, _ = c.BatchDeleteEntry(ctx(), &entrypb.BatchDeleteEntryRequest{Ids: ids}) })
	}
	return resp.GetResults()
}

func TestCreateEntryValidation(t *testing.T) {
	c := entrypb.NewEntryClient(wire(t))
	conv := func(text string) want { return want{3, "failed to convert entry: " + text} }
	store := func(text string) want { return want{3, "failed to create entry: datastore-validation: " + text} }
	set := func(f func(e *typespb.Entry)) func(e *typespb.Entry) { return f }
	parent := func(p *typespb.SPIFFEID) func(*typespb.Entry) {
		return set(func(e *typespb.Entry) { e.ParentId = p })
	}
	spiffe := func(p *typespb.SPIFFEID) func(*typespb.Entry) {
		return set(func(e *typespb.Entry) { e.SpiffeId = p })
	}
	dns := func(names ...string) func(*typespb.Entry) {
		return set(func(e *typespb.Entry) { e.DnsNames = names })
	}
	federates := func(names ...string) func(*typespb.Entry) {
		return set(func(e *typespb.Entry) { e.FederatesWith = names })
	}
	sel := func(s ...*typespb.Selector) func(*typespb.Entry) {
		return set(func(e *typespb.Entry) { e.Selectors = s })
	}
	const badPathChar = "path segment characters are limited to letters, numbers, dots, dashes, and underscores"
	const badTDChar = "trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores"

	for name, tc := range map[string]struct {
		edit func(*typespb.Entry)
		want want
	}{
		"no parent":              {parent(nil), conv("invalid parent ID: request must specify SPIFFE ID")},
		"empty parent":           {parent(id("", "")), conv("invalid parent ID: trust domain is missing")},
		"parent without path":    {parent(id("td", "")), conv(`invalid parent ID: "spiffe://td" is not a member of trust domain "td"; path is empty`)},
		"parent upper case":      {parent(id("TD", "/x")), conv("invalid parent ID: " + badTDChar)},
		"parent full ID":         {parent(id("spiffe://td/foo", "/x")), ok},
		"parent wrong scheme":    {parent(id("http://td/foo", "/x")), conv("invalid parent ID: scheme is missing or invalid")},
		"parent foreign":         {parent(id("other", "/x")), conv(`invalid parent ID: "spiffe://other/x" is not a member of trust domain "td"`)},
		"parent foreign, bare":   {parent(id("other", "")), conv(`invalid parent ID: "spiffe://other" is not a member of trust domain "td"`)},
		"parent no slash":        {parent(id("td", "x")), conv("invalid parent ID: path must have a leading slash")},
		"parent trailing slash":  {parent(id("td", "/x/")), conv("invalid parent ID: path cannot have a trailing slash")},
		"parent empty segment":   {parent(id("td", "/x//y")), conv("invalid parent ID: path cannot contain empty segments")},
		"parent dots":            {parent(id("td", "/x/../y")), conv("invalid parent ID: path cannot contain dot segments")},
		"parent percent":         {parent(id("td", "/x%20")), conv("invalid parent ID: " + badPathChar)},
		"parent server":          {parent(id("td", "/spire/server")), ok},
		"no SPIFFE ID":           {spiffe(nil), conv("invalid spiffe ID: request must specify SPIFFE ID")},
		"SPIFFE ID foreign":      {spiffe(id("other", "/x")), conv(`invalid spiffe ID: "spiffe://other/x" is not a member of trust domain "td"`)},
		"SPIFFE ID without path": {spiffe(id("td", "")), conv(`invalid spiffe ID: "spiffe://td" is not a workload in trust domain "td"; path is empty`)},
		"SPIFFE ID reserved":     {spiffe(id("td", "/spire/x")), conv(`invalid spiffe ID: "spiffe://td/spire/x" is not a workload in trust domain "td"; path is in the reserved namespace`)},
		"SPIFFE ID reserved top": {spiffe(id("td", "/spire")), conv(`invalid spiffe ID: "spiffe://td/spire" is not a workload in trust domain "td"; path is in the reserved namespace`)},
		"SPIFFE ID like it":      {spiffe(id("td", "/spirex")), ok},

		"DNS empty":           {dns(""), conv("invalid DNS name: empty or only whitespace")},
		"DNS blank":           {dns(" "), conv("invalid DNS name: empty or only whitespace")},
		"DNS umlaut":          {dns("ü.example"), conv("invalid DNS name: name must be ascii")},
		"DNS two wildcards":   {dns("*.*.x"), conv("invalid DNS name: too many wildcards")},
		"DNS inner wildcard":  {dns("a.*.x"), conv("invalid DNS name: wildcard must be first label")},
		"DNS part wildcard":   {dns("*x.y"), conv("invalid DNS name: wildcard must be first label")},
		"DNS only wildcard":   {dns("*"), conv("invalid DNS name: wildcard must be first label")},
		"DNS wildcard":        {dns("*.x"), ok},
		"DNS dot at end":      {dns("x."), conv("invalid DNS name: domain ends with dot")},
		"DNS underscore":      {dns("_x.Y"), ok},
		"DNS hyphen":          {dns("-a.b"), conv("invalid DNS name: idna error\nidna: invalid label \"-a\"")},
		"DNS empty label":     {dns("a..b"), conv("invalid DNS name: idna error\nidna: invalid label \"a..b\"")},
		"DNS long label":      {dns(strings.Repeat("a", 64) + ".b"), conv("invalid DNS name: idna error\nidna: invalid label*")},
		"DNS twice":           {dns("a", "a"), want{6, "failed to create entry: datastore-sql: UNIQUE constraint failed: dns_names.registered_entry_id, dns_names.value"}},
		"DNS upper and lower": {dns("a", "A"), ok},

		"federates empty": {federates(""), conv("invalid federated trust domain: trust domain is missing")},
		"federates upper": {federates("X"), conv("invalid federated trust domain: " + badTDChar)},
		"federates none":  {federates("x"), want{13, `failed to create entry: unable to find federated bundle "spiffe://x"`}},
		"federates ID":    {federates("spiffe://x/y"), want{13, `failed to create entry: unable to find federated bundle "spiffe://x"`}},
		"federates own":   {federates("td"), ok},

		"no selectors":    {sel(), conv("selector list is empty")},
		"nil selector":    {sel(nil), conv("missing selector type")},
		"no type":         {sel(&typespb.Selector{Value: "v"}), conv("missing selector type")},
		"colon in type":   {sel(&typespb.Selector{Type: "a:b", Value: "v"}), conv("selector type contains ':'")},
		"no value":        {sel(&typespb.Selector{Type: "a"}), conv("missing selector value")},
		"selector twice":  {sel(selectors("a:b", "a:b")...), want{6, "failed to create entry: datastore-sql: UNIQUE constraint failed: selectors.registered_entry_id, selectors.type, selectors.value"}},
		"hint too long":   {func(e *typespb.Entry) { e.Hint = strings.Repeat("x", 1025) }, conv("hint is too long, max length is 1024 characters")},
		"hint just fits":  {func(e *typespb.Entry) { e.Hint = strings.Repeat("x", 1024) }, ok},
		"first mistake":   {func(e *typespb.Entry) { e.ParentId, e.Selectors, e.X509SvidTtl = nil, nil, -1 }, conv("invalid parent ID: request must specify SPIFFE ID")},
		"store, prefetch": {func(e *typespb.Entry) { e.StoreSvid = true; e.AdditionalAttributes = noPrefetch() }, store("specifying cache behaviour is incompatible with storable SVIDs")},
		"store, mixed":    {func(e *typespb.Entry) { e.StoreSvid = true; e.Selectors = selectors("a:b", "b:b") }, store("invalid registration entry: selector types must be the same when store SVID is enabled")},
		"long entry ID":   {func(e *typespb.Entry) { e.Id = strings.Repeat("x", 256) }, store("invalid registration entry: entry ID too long")},
		"bad entry ID":    {func(e *typespb.Entry) { e.Id = "a b" }, store("invalid registration entry: entry ID contains invalid characters")},
		"X.509 TTL below": {func(e *typespb.Entry) { e.X509SvidTtl = -1 }, store("invalid registration entry: X509SvidTtl is not set")},
		"JWT TTL below":   {func(e *typespb.Entry) { e.JwtSvidTtl = -1 }, store("invalid registration entry: JwtSvidTtl is not set")},
		"expired":         {func(e *typespb.Entry) { e.ExpiresAt = 1 }, ok},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEntry("/validation", tc.edit)
			r := create(t, c, e)[0]
			tc.want.checkStatus(t, r.GetStatus())
			if (r.GetEntry() != nil) != (tc.want == ok) {
				t.Errorf("entry in the result: %v", r.GetEntry())
			}
			if r.GetEntry() != nil {
				_, _ = c.BatchDeleteEntry(t.Context(), &entrypb.BatchDeleteEntryRequest{Ids: []string{r.GetEntry().GetId()}})
			}
		})
	}
}

func noPrefetch() *typespb.Entry_AdditionalAttributes {
	return &typespb.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true}
}

func TestCreateEntryStoresEveryField(t *testing.T) {
	c := entrypb.NewEntryClient(wire(t))
	in := newEntry("/all", func(e *typespb.Entry) {
		e.Id, e.Hint, e.X509SvidTtl, e.JwtSvidTtl, e.ExpiresAt = "all-1", "h", 60, 61, 4102444800
		e.Admin, e.Downstream, e.DnsNames = true, true, []string{"b.example", "a.example"}
		e.RevisionNumber, e.CreatedAt = 7, 7
		e.AdditionalAttributes = &typespb.Entry_AdditionalAttributes{JwtSvidIncludeJti: true, DisableX509SvidPrefetch: true}
	})
	created := create(t, c, in)[0].GetEntry()
	got, err := c.GetEntry(t.Context(), &entrypb.GetEntryRequest{Id: "all-1"})
	if err != nil {
		t.Fatal(err)
	}
	if got.GetCreatedAt() < 1e9 {
		t.Errorf("created_at = %d, want unix seconds of now", got.GetCreatedAt())
	}
	in.RevisionNumber, in.CreatedAt = 0, created.GetCreatedAt()
	if diff := cmp.Diff(in, got, protocmp.Transform()); diff != "" {
		t.Errorf("stored entry (-sent +got):\n%s", diff)
	}

	t.Run("attributes that say nothing are absent", func(t *testing.T) {
		r := create(t, c, newEntry("/attributes", func(e *typespb.Entry) { e.AdditionalAttributes = &typespb.Entry_AdditionalAttributes{} }))[0]
		if r.GetEntry().AdditionalAttributes != nil {
			t.Errorf("got %v", r.GetEntry().GetAdditionalAttributes())
		}
	})
	t.Run("masks keep the ID", func(t *testing.T) {
		got, err := c.GetEntry(t.Context(), &entrypb.GetEntryRequest{Id: "all-1", OutputMask: &typespb.EntryMask{Hint: true}})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(&typespb.Entry{Id: "all-1", Hint: "h"}, got, protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
	})
}

func TestCreateEntryDuplicates(t *testing.T) {
	c := entrypb.NewEntryClient(wire(t))
	similar := want{6, "similar entry already exists"}
	results := create(t, c,
		newEntry("/dup", func(e *typespb.Entry) { e.Id, e.Selectors = "dup-1", selectors("a:1", "a:2") }),
		newEntry("/other", func(e *typespb.Entry) { e.Id = "dup-1" }),
		newEntry("/dup", func(e *typespb.Entry) { e.Id, e.Selectors, e.Hint = "dup-2", selectors("a:2", "a:1"), "another" }),
		newEntry("/dup", func(e *typespb.Entry) { e.Selectors = selectors("a:1", "a:1", "a:2") }),
		nil,
	)
	ok.checkStatus(t, results[0].GetStatus())
	want{6, "failed to create entry: datastore-sql: UNIQUE constraint failed: registered_entries.entry_id"}.checkStatus(t, results[1].GetStatus())
	similar.checkStatus(t, results[2].GetStatus())
	similar.checkStatus(t, results[3].GetStatus())
	want{3, "failed to convert entry: invalid parent ID: request must specify SPIFFE ID"}.checkStatus(t, results[4].GetStatus())
	if results[1].GetEntry() != nil {
		t.Error("a taken ID must not answer with the entry that has it")
	}
	for _, i := range []int{2, 3} {
		if got := results[i].GetEntry().GetId(); got != "dup-1" {
			t.Errorf("result %d carries entry %q, want the stored one", i, got)
		}
	}
}

func TestUpdateEntry(t *testing.T) {
	c := entrypb.NewEntryClient(wire(t))
	stored := create(t, c, newEntry("/update", func(e *typespb.Entry) {
		e.Id, e.Hint, e.DnsNames, e.X509SvidTtl = "upd-1", "old", []string{"a"}, 60
	}))[0].GetEntry()
	update := func(t *testing.T, e *typespb.Entry, mask *typespb.EntryMask) *entrypb.BatchUpdateEntryResponse_Result {
		t.Helper()
		resp, err := c.BatchUpdateEntry(t.Context(), &entrypb.BatchUpdateEntryRequest{Entries: []*typespb.Entry{e}, InputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.GetResults()) != 1 {
			t.Fatalf("%d results", len(resp.GetResults()))
		}
		return resp.GetResults()[0]
	}
	revision := int64(0)
	for _, tc := range []struct {
		name string
		edit *typespb.Entry
		mask *typespb.EntryMask
		want want
		got  *typespb.Entry // what changed
	}{
		{"empty mask", &typespb.Entry{Hint: "x"}, &typespb.EntryMask{}, ok, &typespb.Entry{Hint: "old", DnsNames: []string{"a"}, X509SvidTtl: 60}},
		{"hint", &typespb.Entry{Hint: "new", DnsNames: []string{"z"}}, &typespb.EntryMask{Hint: true}, ok, &typespb.Entry{Hint: "new", DnsNames: []string{"a"}, X509SvidTtl: 60}},
		{"clear lists", &typespb.Entry{}, &typespb.EntryMask{DnsNames: true}, ok, &typespb.Entry{Hint: "new", X509SvidTtl: 60}},
		{"selectors", &typespb.Entry{}, &typespb.EntryMask{Selectors: true}, want{3, "failed to convert entry: selector list is empty"}, nil},
		{"parent", &typespb.Entry{}, &typespb.EntryMask{ParentId: true}, want{3, "failed to convert entry: invalid parent ID: request must specify SPIFFE ID"}, nil},
		{"SPIFFE ID", &typespb.Entry{}, &typespb.EntryMask{SpiffeId: true}, want{3, "failed to convert entry: invalid spiffe ID: request must specify SPIFFE ID"}, nil},
		{"mixed types", &typespb.Entry{StoreSvid: true, Selectors: selectors("a:b", "b:b")}, &typespb.EntryMask{StoreSvid: true, Selectors: true}, want{3, "failed to update entry: datastore-validation: invalid registration entry: selector types must be the same when store SVID is enabled"}, nil},
		{"TTL", &typespb.Entry{X509SvidTtl: -1}, &typespb.EntryMask{X509SvidTtl: true}, want{3, "failed to update entry: datastore-validation: invalid registration entry: X509SvidTtl is not set"}, nil},
		{"no bundle", &typespb.Entry{FederatesWith: []string{"x"}}, &typespb.EntryMask{FederatesWith: true}, want{13, `failed to update entry: unable to find federated bundle "spiffe://x"`}, nil},
		{"selector twice", &typespb.Entry{Selectors: selectors("a:b", "a:b")}, &typespb.EntryMask{Selectors: true}, want{6, "failed to update entry: datastore-sql: UNIQUE constraint failed: selectors.registered_entry_id, selectors.type, selectors.value"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.edit.Id = "upd-1"
			r := update(t, tc.edit, tc.mask)
			tc.want.checkStatus(t, r.GetStatus())
			if tc.want != ok {
				return
			}
			revision++
			tc.got.Id, tc.got.SpiffeId, tc.got.ParentId, tc.got.Selectors = "upd-1", stored.GetSpiffeId(), stored.GetParentId(), stored.GetSelectors()
			tc.got.CreatedAt, tc.got.RevisionNumber = stored.GetCreatedAt(), revision
			if diff := cmp.Diff(tc.got, r.GetEntry(), protocmp.Transform()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	t.Run("without mask everything is replaced", func(t *testing.T) {
		r := update(t, newEntry("/update2", func(e *typespb.Entry) { e.Id = "upd-1" }), nil)
		ok.checkStatus(t, r.GetStatus())
		if e := r.GetEntry(); e.GetHint() != "" || e.GetX509SvidTtl() != 0 || e.GetSpiffeId().GetPath() != "/update2" {
			t.Errorf("got %v", e)
		}
	})
	t.Run("unknown", func(t *testing.T) {
		want{5, "failed to update entry"}.checkStatus(t, update(t, newEntry("/x", func(e *typespb.Entry) { e.Id = "none" }), nil).GetStatus())
		want{5, "failed to update entry"}.checkStatus(t, update(t, newEntry("/x"), nil).GetStatus())
		want{3, "failed to convert entry: invalid parent ID: request must specify SPIFFE ID"}.checkStatus(t, update(t, nil, nil).GetStatus())
	})
}

func TestDeleteAndGetEntry(t *testing.T) {
	c := entrypb.NewEntryClient(wire(t))
	create(t, c, newEntry("/delete", func(e *typespb.Entry) { e.Id = "del-1" }))
	resp, err := c.BatchDeleteEntry(t.Context(), &entrypb.BatchDeleteEntryRequest{Ids: []string{"", "none", "del-1", "del-1"}})
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range []want{{3, "missing entry ID"}, {5, "entry not found"}, ok, {5, "entry not found"}} {
		w.checkStatus(t, resp.GetResults()[i].GetStatus())
	}
	if got := resp.GetResults()[1].GetId(); got != "none" {
		t.Errorf("result names %q, want what the request named", got)
	}
	_, err = c.GetEntry(t.Context(), &entrypb.GetEntryRequest{})
	want{3, "missing ID"}.checkError(t, err)
	_, err = c.GetEntry(t.Context(), &entrypb.GetEntryRequest{Id: "del-1"})
	want{5, "entry not found"}.checkError(t, err)
}

func TestListEntriesFilters(t *testing.T) {
	c := entrypb.NewEntryClient(wire(t))
	create(t, c,
		newEntry("/f/1", func(e *typespb.Entry) { e.Id, e.Selectors, e.Hint = "f1", selectors("f:a"), "h1" }),
		newEntry("/f/2", func(e *typespb.Entry) { e.Id, e.Selectors = "f2", selectors("f:a", "f:b") }),
		newEntry("/f/3", func(e *typespb.Entry) { e.Id, e.Selectors, e.Downstream = "f3", selectors("f:c"), true }),
		newEntry("/f/1", func(e *typespb.Entry) { e.Id, e.Selectors, e.ParentId = "f4", selectors("f:a"), id("td", "/f/parent") }),
		newEntry("/f/5", func(e *typespb.Entry) { e.Id, e.Selectors, e.FederatesWith = "f5", selectors("f:d"), []string{"td"} }),
	)
	type filter = entrypb.ListEntriesRequest_Filter
	match := func(how typespb.SelectorMatch_MatchBehavior, s ...string) *filter {
		return &filter{BySelectors: &typespb.SelectorMatch{Selectors: selectors(s...), Match: how}}
	}
	for name, tc := range map[string]struct {
		filter *filter
		ids    string
	}{
		"SPIFFE ID":            {&filter{BySpiffeId: id("td", "/f/1")}, "f1 f4"},
		"parent":               {&filter{ByParentId: id("td", "/f/parent")}, "f4"},
		"both":                 {&filter{BySpiffeId: id("td", "/f/1"), ByParentId: id("td", "/spire/agent/x")}, "f1"},
		"exact":                {match(typespb.SelectorMatch_MATCH_EXACT, "f:a"), "f1 f4"},
		"exact, repeated":      {match(typespb.SelectorMatch_MATCH_EXACT, "f:a", "f:a"), "f1 f4"},
		"subset":               {match(typespb.SelectorMatch_MATCH_SUBSET, "f:a", "f:b"), "f1 f2 f4"},
		"superset":             {match(typespb.SelectorMatch_MATCH_SUPERSET, "f:a"), "f1 f2 f4"},
		"superset of two":      {match(typespb.SelectorMatch_MATCH_SUPERSET, "f:a", "f:b"), "f2"},
		"any":                  {match(typespb.SelectorMatch_MATCH_ANY, "f:b", "f:c"), "f2 f3"},
		"hint":                 {&filter{ByHint: wrapperspb.String("h1")}, "f1"},
		"downstream":           {&filter{ByDownstream: wrapperspb.Bool(true), BySelectors: match(3, "f:a", "f:c").BySelectors}, "f3"},
		"not downstream = any": {&filter{ByDownstream: wrapperspb.Bool(false), BySelectors: match(3, "f:a", "f:c").BySelectors}, "f1 f2 f3 f4"},
		"empty hint = any":     {&filter{ByHint: wrapperspb.String(""), BySpiffeId: id("td", "/f/1")}, "f1 f4"},
		"federates, exact":     {&filter{ByFederatesWith: &typespb.FederatesWithMatch{TrustDomains: []string{"spiffe://td"}}}, "f5"},
		"federates, any":       {&filter{ByFederatesWith: &typespb.FederatesWithMatch{TrustDomains: []string{"td", "x"}, Match: 3}}, "f5"},
		"federates, superset":  {&filter{ByFederatesWith: &typespb.FederatesWithMatch{TrustDomains: []string{"td", "x"}, Match: 2}}, ""},
		"federates, subset":    {&filter{ByFederatesWith: &typespb.FederatesWithMatch{TrustDomains: []string{"td", "x"}, Match: 1}}, "f5"},
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := c.ListEntries(t.Context(), &entrypb.ListEntriesRequest{Filter: tc.filter, OutputMask: &typespb.EntryMask{}})
			if err != nil {
				t.Fatal(err)
			}
			var ids []string
			for _, e := range resp.GetEntries() {
				ids = append(ids, e.GetId())
			}
			if got := strings.Join(ids, " "); got != tc.ids {
				t.Errorf("got %q, want %q", got, tc.ids)
			}
			counted, err := c.CountEntries(t.Context(), &entrypb.CountEntriesRequest{Filter: &entrypb.CountEntriesRequest_Filter{
				BySpiffeId: tc.filter.GetBySpiffeId(), ByParentId: tc.filter.GetByParentId(), BySelectors: tc.filter.GetBySelectors(),
				ByFederatesWith: tc.filter.GetByFederatesWith(), ByHint: tc.filter.GetByHint(), ByDownstream: tc.filter.GetByDownstream(),
			}})
			if err != nil || int(counted.GetCount()) != len(ids) {
				t.Errorf("count %d (%v), list %d", counted.GetCount(), err, len(ids))
			}
		})
	}
	bad := want{3, ""}
	for text, f := range map[string]*filter{
		"malformed parent ID filter: trust domain is missing":                                                                               {ByParentId: id("", "")},
		`malformed parent ID filter: "spiffe://o/x" is not a member of trust domain "td"`:                                                   {ByParentId: id("o", "/x")},
		`malformed SPIFFE ID filter: "spiffe://td/spire/x" is not a workload in trust domain "td"; path is in the reserved namespace`:       {BySpiffeId: id("td", "/spire/x")},
		"malformed selectors filter: empty selector set":                                                                                    {BySelectors: &typespb.SelectorMatch{}},
		"malformed selectors filter: missing selector type":                                                                                 {BySelectors: &typespb.SelectorMatch{Selectors: []*typespb.Selector{nil}}},
		"malformed federates with filter: empty trust domain set":                                                                           {ByFederatesWith: &typespb.FederatesWithMatch{}},
		"malformed federates with filter: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores": {ByFederatesWith: &typespb.FederatesWithMatch{TrustDomains: []string{"X"}}},
	} {
		bad.text = text
		_, err := c.ListEntries(t.Context(), &entrypb.ListEntriesRequest{Filter: f})
		bad.checkError(t, err)
	}
	_, err := c.ListEntries(t.Context(), &entrypb.ListEntriesRequest{Filter: match(9, "a:b")})
	want{13, `failed to list entries: datastore-sql: unhandled selectors match behavior '\t'`}.checkError(t, err)
}

func TestListEntriesPages(t *testing.T) {
	c := entrypb.NewEntryClient(wire(t))
	var in []*typespb.Entry
	for i := range 5 {
		in = append(in, newEntry("/page", func(e *typespb.Entry) {
			e.Id, e.Selectors = fmt.Sprintf("page-%d", i), selectors(fmt.Sprintf("p:%d", i))
		}))
	}
	create(t, c, in...)
	page := func(size int32, token string) *entrypb.ListEntriesResponse {
		t.Helper()
		resp, err := c.ListEntries(t.Context(), &entrypb.ListEntriesRequest{
			Filter: &entrypb.ListEntriesRequest_Filter{BySpiffeId: id("td", "/page")}, PageSize: size, PageToken: token, OutputMask: &typespb.EntryMask{},
		})
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	var got []string
	sizes := ""
	for token, first := "", true; first || token != ""; first = false {
		resp := page(2, token)
		sizes += fmt.Sprint(len(resp.GetEntries()))
		for _, e := range resp.GetEntries() {
			got = append(got, e.GetId())
		}
		token = resp.GetNextPageToken()
		if first {
			// A change between two pages neither repeats nor hides another entry.
			_, _ = c.BatchDeleteEntry(t.Context(), &entrypb.BatchDeleteEntryRequest{Ids: []string{"page-1"}})
		}
	}
	if sizes != "2210" || strings.Join(got, " ") != "page-0 page-1 page-2 page-3 page-4" {
		t.Errorf("pages of %s with %q", sizes, got)
	}
	for _, size := range []int32{0, -1} {
		if resp := page(size, "not a token"); len(resp.GetEntries()) != 4 || resp.GetNextPageToken() != "" {
			t.Errorf("size %d: %d entries, token %q", size, len(resp.GetEntries()), resp.GetNextPageToken())
		}
	}
	_, err := c.ListEntries(t.Context(), &entrypb.ListEntriesRequest{PageSize: 1, PageToken: "x"})
	want{13, "failed to list entries: datastore-sql: rpc error: code = InvalidArgument desc = could not parse token 'x'"}.checkError(t, err)
}

// The SPIRE controller manager asks with such an entry which fields a server
// knows, and dereferences what it gets.
func TestControllerManagerProbe(t *testing.T) {
	c := entrypb.NewEntryClient(wire(t))
	const path = "/spire-controller-manager/unsupported-fields-test"
	probe := func() *typespb.Entry {
		return &typespb.Entry{
			SpiffeId: id("td", path), ParentId: id("td", path), Selectors: selectors("a:1"),
			X509SvidTtl: 60, JwtSvidTtl: 60, StoreSvid: true, Hint: "hint",
		}
	}
	for i, r := range create(t, c, probe(), probe()) {
		[]want{ok, {6, "similar entry already exists"}}[i].checkStatus(t, r.GetStatus())
		if e := r.GetEntry(); e.GetJwtSvidTtl() != 60 || e.GetHint() != "hint" || !e.GetStoreSvid() || e.GetId() == "" {
			t.Errorf("result %d: %v", i, e)
		}
	}
}

func BenchmarkListEntriesPage(b *testing.B) {
	a := openAuthority(b)
	var in []*entry.Entry
	for i := range 100_000 {
		in = append(in, &entry.Entry{
			ParentID: localID, SPIFFEID: spiffeid.RequireFromPathf(td, "/w/%d", i),
			Selectors: attest.MustSelectors("k8s:ns:x", fmt.Sprintf("k8s:sa:%d", i)),
		})
	}
	for _, r := range a.CreateEntries(b.Context(), in...) {
		if r.Err != nil {
			b.Fatal(r.Err)
		}
	}
	c := entrypb.NewEntryClient(dial(b, start(b, adminapi.Config{Authority: a, Logger: slog.New(slog.DiscardHandler)})))
	for name, token := range map[string]string{"first": "", "last": "99500"} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				resp, err := c.ListEntries(b.Context(), &entrypb.ListEntriesRequest{PageSize: 500, PageToken: token})
				if err != nil || len(resp.GetEntries()) != 500 {
					b.Fatal(len(resp.GetEntries()), err)
				}
			}
		})
	}
}
