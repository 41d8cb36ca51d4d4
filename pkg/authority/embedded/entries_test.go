package embedded_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

func TestCreateEntry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := inMemory(t, embedded.NewMemoryStore(), embedded.Config{})
		time.Sleep(1600 * time.Millisecond)
		in := newEntry("/w")
		in.Revision, in.CreatedAt = 9, time.Unix(1, 0)
		got := mustCreate(t, a, in)
		if got.ID == "" || in.ID != "" {
			t.Errorf("ID %q, input's %q", got.ID, in.ID)
		}
		if got.Revision != 0 {
			t.Errorf("revision %d", got.Revision)
		}
		// 1.6 s past the whole second: rounded, not cut.
		if want := time.Date(2000, 1, 1, 0, 0, 2, 0, time.UTC); !got.CreatedAt.Equal(want) {
			t.Errorf("created at %s, want %s", got.CreatedAt, want)
		}
		if stored, ok := a.Set().Get(got.ID); !ok || stored != got {
			t.Error("the set holds something else")
		}
	})
}

// TestCreateRefused names the texts that clients compare.
func TestCreateRefused(t *testing.T) {
	a := start(t, testConfig(t))
	stored := newEntry("/w", "unix:uid:1", "unix:gid:1")
	stored.ID = "taken"
	stored = mustCreate(t, a, stored)
	with := func(edit func(*entry.Entry)) *entry.Entry {
		e := newEntry("/x")
		edit(e)
		return e
	}
	var (
		similar  *embedded.SimilarError
		noBundle *embedded.NoBundleError
		convert  *entry.ConversionError
		store    *entry.StoreError
		repeat   *entry.RepeatError
	)
	for name, tt := range map[string]struct {
		in   *entry.Entry
		kind error
		as   any
		text string
	}{
		"similar": {
			newEntry("/w", "unix:gid:1", "unix:uid:1"), embedded.ErrExists, &similar, "similar entry already exists",
		},
		"taken ID": {
			with(func(e *entry.Entry) { e.ID = "taken" }), embedded.ErrExists, nil,
			"datastore-sql: UNIQUE constraint failed: registered_entries.entry_id",
		},
		"no bundle": {
			with(func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{other} }), nil, &noBundle,
			`unable to find federated bundle "spiffe://other.org"`,
		},
		"repeated DNS name": {
			with(func(e *entry.Entry) { e.DNSNames = []string{"a", "b", "a"} }), embedded.ErrExists, &repeat,
			"datastore-sql: UNIQUE constraint failed: dns_names.registered_entry_id, dns_names.value",
		},
		"no selectors": {
			with(func(e *entry.Entry) { e.Selectors = attest.Selectors{} }), embedded.ErrInvalid, &convert, "selector list is empty",
		},
		"foreign": {
			with(func(e *entry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(other, "/w") }), embedded.ErrInvalid, &convert,
			`invalid spiffe ID: "spiffe://other.org/w" is not a member of trust domain "example.org"`,
		},
		"bad ID": {
			with(func(e *entry.Entry) { e.ID = "a/b" }), embedded.ErrInvalid, &store,
			"datastore-validation: invalid registration entry: entry ID contains invalid characters",
		},
	} {
		got, err := a.CreateEntry(t.Context(), tt.in)
		if got != nil || err == nil {
			t.Errorf("%s: created %v", name, got)
			continue
		}
		if tt.kind != nil && !errors.Is(err, tt.kind) {
			t.Errorf("%s: %v is not %v", name, err, tt.kind)
		}
		for _, kind := range []error{embedded.ErrExists, embedded.ErrInvalid, embedded.ErrNotFound} {
			if !errors.Is(kind, tt.kind) && errors.Is(err, kind) {
				t.Errorf("%s: %v is %v", name, err, kind)
			}
		}
		if tt.as != nil && !errors.As(err, tt.as) {
			t.Errorf("%s: %T", name, err)
		}
		if err.Error() != tt.text {
			t.Errorf("%s: text %q, want %q", name, err, tt.text)
		}
	}
	if similar == nil || similar.Stored != stored {
		t.Error("the similar entry is not in the error")
	}
	if a.Set().Len() != 1 {
		t.Errorf("%d entries", a.Set().Len())
	}
}

func TestCreateBatch(t *testing.T) {
	s := embedded.NewMemoryStore()
	a := inMemory(t, s, embedded.Config{})
	named := newEntry("/named")
	named.ID = "n"
	again := newEntry("/other")
	again.ID = "n"
	writes := s.Writes
	out := a.CreateEntries(t.Context(), newEntry("/a"), newEntry("/b"), newEntry("/a"), named, again, &entry.Entry{})
	if s.Writes != writes+1 {
		t.Errorf("%d transactions", s.Writes-writes)
	}
	var similar *embedded.SimilarError
	switch {
	case out[0].Err != nil || out[1].Err != nil || out[3].Err != nil:
		t.Errorf("good ones failed: %v %v %v", out[0].Err, out[1].Err, out[3].Err)
	case !errors.As(out[2].Err, &similar) || similar.Stored != out[0].Entry:
		t.Errorf("third: %v", out[2].Err)
	case !errors.Is(out[4].Err, embedded.ErrExists) || errors.As(out[4].Err, &similar):
		t.Errorf("fifth: %v", out[4].Err)
	case !errors.Is(out[5].Err, embedded.ErrInvalid):
		t.Errorf("sixth: %v", out[5].Err)
	}
	var order []string
	for e := range a.Set().All() {
		order = append(order, e.SPIFFEID.Path())
	}
	if !slices.Equal(order, []string{"/a", "/b", "/named"}) {
		t.Errorf("order %q", order)
	}
}

func TestUpdateEntry(t *testing.T) {
	a := start(t, testConfig(t))
	e := mustCreate(t, a, newEntry("/w"))
	got, err := a.UpdateEntry(t.Context(), e.ID, func(e *entry.Entry) error {
		e.ID, e.Revision, e.CreatedAt = "hijack", 77, time.Unix(1, 0)
		e.Hint = "h"
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != e.ID || got.Revision != 1 || !got.CreatedAt.Equal(e.CreatedAt) || got.Hint != "h" || e.Hint != "" {
		t.Errorf("%+v", got)
	}
	// No change is a revision too.
	if got, err = a.UpdateEntry(t.Context(), e.ID, func(*entry.Entry) error { return nil }); err != nil || got.Revision != 2 {
		t.Errorf("%+v %v", got, err)
	}
	mine := errors.New("mine")
	for name, tt := range map[string]struct {
		id   string
		edit func(*entry.Entry) error
		want error
	}{
		"unknown":      {"nobody", func(*entry.Entry) error { return nil }, embedded.ErrNotFound},
		"edit's error": {e.ID, func(*entry.Entry) error { return mine }, mine},
		"invalid":      {e.ID, func(e *entry.Entry) error { e.ParentID = spiffeid.ID{}; return nil }, embedded.ErrInvalid},
	} {
		if _, err := a.UpdateEntry(t.Context(), tt.id, tt.edit); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	var noBundle *embedded.NoBundleError
	if _, err := a.UpdateEntry(t.Context(), e.ID, func(e *entry.Entry) error {
		e.FederatesWith = []spiffeid.TrustDomain{other}
		return nil
	}); !errors.As(err, &noBundle) {
		t.Errorf("error %v", err)
	}
	if now, _ := a.Set().Get(e.ID); now.Revision != 2 {
		t.Errorf("a refused update left revision %d", now.Revision)
	}
	// Two updates of one entry in a batch build on each other.
	out := a.UpdateEntries(t.Context(),
		embedded.EntryUpdate{ID: e.ID, Edit: func(e *entry.Entry) error { e.Hint += "1"; return nil }},
		embedded.EntryUpdate{ID: e.ID, Edit: func(e *entry.Entry) error { e.Hint += "2"; return nil }})
	if now, _ := a.Set().Get(e.ID); out[1].Err != nil || now.Hint != "h12" || now.Revision != 4 {
		t.Errorf("%+v %v", now, out[1].Err)
	}
}

func TestDeleteEntry(t *testing.T) {
	a := start(t, testConfig(t))
	e := mustCreate(t, a, newEntry("/w"))
	errs := a.DeleteEntries(t.Context(), e.ID, "", "nobody", e.ID)
	if errs[0] != nil || !errors.Is(errs[1], embedded.ErrInvalid) || errs[1].Error() != "missing entry ID" ||
		!errors.Is(errs[2], embedded.ErrNotFound) || errs[2].Error() != "entry not found" || !errors.Is(errs[3], embedded.ErrNotFound) {
		t.Errorf("%v", errs)
	}
	if a.Set().Len() != 0 {
		t.Error("still there")
	}
}

// TestFailedWrite: what could not be stored did not happen.
func TestFailedWrite(t *testing.T) {
	s := embedded.NewMemoryStore()
	a := inMemory(t, s, embedded.Config{})
	e := mustCreate(t, a, newEntry("/w"))
	if _, err := a.UpsertAgent(t.Context(), &embedded.Agent{ID: node}); err != nil {
		t.Fatal(err)
	}
	before := takePicture(t, a)
	version := a.Set().Version()
	s.Fail(errDisk)
	ctx := t.Context()
	root := a.OwnBundle().X509[0].Certificate
	for name, err := range map[string]error{
		"create": func() error { _, err := a.CreateEntry(ctx, newEntry("/x")); return err }(),
		"update": func() error {
			_, err := a.UpdateEntry(ctx, e.ID, func(*entry.Entry) error { return nil })
			return err
		}(),
		"delete":  a.DeleteEntry(ctx, e.ID),
		"bundle":  a.SetFederatedBundle(ctx, &embedded.Bundle{TrustDomain: other, X509: []embedded.Root{{Certificate: root}}}),
		"append":  func() error { _, err := a.AppendBundle(ctx, nil, []embedded.JWTKey{someJWTKey(t, "k")}); return err }(),
		"agent":   func() error { _, err := a.BanAgent(ctx, node); return err }(),
		"forget":  a.DeleteAgent(ctx, node),
		"prepare": func() error { _, err := a.PrepareX509(ctx); return err }(),
		"rotate":  a.RotateNow(ctx),
	} {
		if !errors.Is(err, errDisk) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	comparePictures(t, takePicture(t, a), before)
	if a.Set().Version() != version {
		t.Error("a new version without a change")
	}
	sign(t, a, e)
	s.Fail(nil)
	mustCreate(t, a, newEntry("/x"))
}

// TestNodeEntries: an agent sees what it and its aliases are parents of, and is
// woken by nothing else.
func TestNodeEntries(t *testing.T) {
	a := start(t, testConfig(t))
	alias := &entry.Entry{SPIFFEID: id("/cluster"), ParentID: entry.ServerID(td), Selectors: attest.MustSelectors("local:zone:a")}
	mustCreate(t, a, alias)
	mustCreate(t, a, newEntry("/direct"))
	below := newEntry("/below")
	below.ParentID = id("/cluster")
	mustCreate(t, a, below)
	foreign := newEntry("/foreign")
	foreign.ParentID = id("/spire/agent/local/n2")
	mustCreate(t, a, foreign)

	source := a.NodeEntries(node, attest.Selectors{})
	get := func(after uint64) (*entry.Set, []string) {
		t.Helper()
		set, err := source.Entries(t.Context(), after)
		if err != nil {
			t.Fatal(err)
		}
		var paths []string
		for e := range set.All() {
			paths = append(paths, e.SPIFFEID.Path())
		}
		slices.Sort(paths)
		return set, paths
	}
	set, paths := get(0)
	if !slices.Equal(paths, []string{"/direct"}) {
		t.Errorf("without node selectors: %q", paths)
	}
	woken := make(chan struct{})
	go func() {
		defer close(woken)
		set, paths = get(set.Version())
	}()
	source.SetNode(attest.MustSelectors("local:zone:a", "local:x:y"))
	<-woken
	if !slices.Equal(paths, []string{"/below", "/direct"}) {
		t.Errorf("with node selectors: %q", paths)
	}

	// Changes elsewhere do not wake it; its own do.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	stranger := newEntry("/stranger")
	stranger.ParentID = id("/spire/agent/local/n3")
	mustCreate(t, a, stranger)
	if _, err := source.Entries(ctx, set.Version()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	mustCreate(t, a, newEntry("/new"))
	if _, paths = get(set.Version()); !slices.Equal(paths, []string{"/below", "/direct", "/new"}) {
		t.Errorf("after a change: %q", paths)
	}
}

// TestNodeEntriesBanned: a ban takes everything away at once and for good.
func TestNodeEntriesBanned(t *testing.T) {
	a := start(t, testConfig(t))
	e := mustCreate(t, a, newEntry("/w"))
	if _, err := a.UpsertAgent(t.Context(), &embedded.Agent{ID: node, Serial: "1"}); err != nil {
		t.Fatal(err)
	}
	source, neighbour := a.NodeEntries(node, attest.Selectors{}), a.NodeEntries(id("/spire/agent/local/n2"), attest.Selectors{})
	set, err := source.Entries(t.Context(), 0)
	if err != nil || set.Len() != 1 {
		t.Fatal(set.Len(), err)
	}
	before := set
	woken := make(chan struct{})
	go func() {
		defer close(woken)
		if set, err = source.Entries(t.Context(), set.Version()); err != nil {
			t.Error(err)
		}
	}()
	if _, err := a.BanAgent(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	<-woken
	delta, ok := set.Changes(before.Version())
	if set.Len() != 0 || !ok || len(delta.Removed) != 1 || delta.Removed[0].ID != e.ID {
		t.Errorf("%d entries, delta %+v %v", set.Len(), delta, ok)
	}
	mustCreate(t, a, newEntry("/new"))
	if set, err = source.Entries(t.Context(), 0); err != nil || set.Len() != 0 {
		t.Errorf("%d entries for a banned agent, %v", set.Len(), err)
	}
	stranger := newEntry("/n2")
	stranger.ParentID = id("/spire/agent/local/n2")
	mustCreate(t, a, stranger)
	if set, err = neighbour.Entries(t.Context(), 0); err != nil || set.Len() != 1 {
		t.Errorf("%d entries for another agent, %v", set.Len(), err)
	}
}

// TestConcurrentChanges: writers and waiting readers at once; every reader ends
// with the same set.
func TestConcurrentChanges(t *testing.T) {
	a := start(t, testConfig(t))
	const writers, each = 4, 15
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for r := range 4 {
		source := a.NodeEntries(node, attest.Selectors{})
		wg.Go(func() {
			var last uint64
			for {
				set, err := source.Entries(ctx, last)
				if err != nil {
					t.Errorf("reader %d: %v", r, err)
					return
				}
				if set.Version() <= last {
					t.Errorf("version %d after %d", set.Version(), last)
				}
				last = set.Version()
				if set.Len() == writers*each {
					return
				}
			}
		})
	}
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				mustCreate(t, a, newEntry(fmt.Sprintf("/w/%d/%d", w, i)))
			}
		})
	}
	wg.Wait()
}

func TestClosed(t *testing.T) {
	a := start(t, testConfig(t))
	waiting := make(chan error, 2)
	version := a.Set().Version()
	go func() { _, err := a.Entries(context.Background(), version); waiting <- err }()
	go func() { _, err := a.Bundles(context.Background(), 1000); waiting <- err }()
	time.Sleep(10 * time.Millisecond)
	for range 2 {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}
	for range 2 {
		if err := <-waiting; err == nil {
			t.Error("woken without an error")
		}
	}
	if _, err := a.CreateEntry(t.Context(), newEntry("/w")); err == nil {
		t.Error("created after Close")
	}
	if err := a.Run(t.Context()); err != nil {
		t.Error(err)
	}
}
