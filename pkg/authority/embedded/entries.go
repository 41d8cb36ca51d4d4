package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Set is the newest snapshot of all registration entries.
func (a *Authority) Set() *entry.Set { return a.entries.Get() }

// Entries waits until the set is newer than after, or ctx ends.
func (a *Authority) Entries(ctx context.Context, after uint64) (*entry.Set, error) {
	if err := a.ready(ctx); err != nil {
		return nil, err
	}
	return wait(ctx, a, a.entries, func(s *entry.Set) bool { return s.Version() > after })
}

// Result is the outcome for one item of a batch: the stored entry, or why not.
type Result struct {
	Entry *entry.Entry
	Err   error
}

// CreateEntry is CreateEntries for one.
func (a *Authority) CreateEntry(ctx context.Context, e *entry.Entry) (*entry.Entry, error) {
	r := a.CreateEntries(ctx, e)[0]
	return r.Entry, r.Err
}

// CreateEntries stores new entries in one durable step. Each succeeds or fails
// for itself, except that a fault of the disk fails all that were not refused
// before. An entry without ID gets one; revision and time of creation are set.
//
// Errors: ErrInvalid (wrapping *entry.ConversionError or *entry.StoreError),
// *SimilarError, ErrExists (also for *entry.RepeatError), *NoBundleError.
func (a *Authority) CreateEntries(ctx context.Context, in ...*entry.Entry) []Result {
	out := make([]Result, len(in))
	if err := ctx.Err(); err != nil {
		return failAll(out, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	batch := newBatch(a.Set())
	now := time.Now().UTC().Round(time.Second)
	for i, e := range in {
		if out[i].Err = a.admit(batch, e); out[i].Err != nil {
			continue
		}
		e = e.Clone()
		if e.ID == "" {
			id, err := uuid.NewRandom()
			if err != nil {
				out[i].Err = fmt.Errorf("make an entry ID: %w", err)
				continue
			}
			e.ID = id.String()
		}
		e.Revision, e.CreatedAt = 0, now
		batch.add(e)
		out[i].Entry = e
	}
	if err := a.storeEntries(batch.added, nil); err != nil {
		return failAll(out, fmt.Errorf("failed to create entry: %w", err))
	}
	return out
}

// failAll fails what has not failed yet.
func failAll(out []Result, err error) []Result {
	for i := range out {
		if out[i].Err == nil {
			out[i] = Result{Err: err}
		}
	}
	return out
}

// batch is the set and what is about to be added to it.
type batch struct {
	set     *entry.Set
	added   []*entry.Entry
	ids     map[string]bool
	similar map[string]*entry.Entry
}

func newBatch(set *entry.Set) *batch {
	return &batch{set: set, ids: make(map[string]bool), similar: make(map[string]*entry.Entry)}
}

func similarityKey(e *entry.Entry) string {
	return e.SPIFFEID.String() + "\x00" + e.ParentID.String() + "\x00" + e.Selectors.Key()
}

func (b *batch) add(e *entry.Entry) {
	b.added = append(b.added, e)
	b.ids[e.ID] = true
	b.similar[similarityKey(e)] = e
}

// admit says whether a new entry may be stored, in the order of SPIRE Server's
// checks.
func (a *Authority) admit(b *batch, e *entry.Entry) error {
	if err := e.Validate(a.cfg.TrustDomain); err != nil {
		return &kindError{kind: ErrInvalid, cause: err}
	}
	if same, ok := b.set.Similar(e); ok {
		return &SimilarError{same}
	}
	if same, ok := b.similar[similarityKey(e)]; ok {
		return &SimilarError{same}
	}
	if _, taken := b.set.Get(e.ID); e.ID != "" && (taken || b.ids[e.ID]) {
		return exists("datastore-sql: UNIQUE constraint failed: registered_entries.entry_id")
	}
	return a.checkReferences(e)
}

// checkReferences checks what an entry's store would: that the bundles exist
// and that no DNS name is given twice.
func (a *Authority) checkReferences(e *entry.Entry) error {
	federated := a.bundles.Get().federated
	for _, td := range e.FederatesWith {
		if _, ok := federated[td]; !ok && td != a.cfg.TrustDomain {
			return &NoBundleError{td}
		}
	}
	in := entry.Input{DNSNames: e.DNSNames}
	if err := in.CheckRepeated(entry.FieldDNSNames); err != nil {
		return &kindError{kind: ErrExists, cause: err}
	}
	return nil
}

// EntryUpdate changes one entry.
type EntryUpdate struct {
	ID string
	// Edit changes a copy of the stored entry. ID, revision and time of
	// creation are not its business and are put back. An error ends the update
	// and is returned as it is.
	Edit func(*entry.Entry) error
}

// UpdateEntry is UpdateEntries for one.
func (a *Authority) UpdateEntry(ctx context.Context, id string, edit func(*entry.Entry) error) (*entry.Entry, error) {
	r := a.UpdateEntries(ctx, EntryUpdate{id, edit})[0]
	return r.Entry, r.Err
}

// UpdateEntries changes entries in one durable step, each for itself as
// CreateEntries. A success is a new revision even if nothing changed. An update
// may make two entries similar, as with SPIRE Server.
//
// Errors: those of Edit, ErrNotFound, ErrInvalid, ErrExists (*entry.RepeatError),
// *NoBundleError.
func (a *Authority) UpdateEntries(ctx context.Context, updates ...EntryUpdate) []Result {
	out := make([]Result, len(updates))
	if err := ctx.Err(); err != nil {
		return failAll(out, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	batch := newBatch(a.Set())
	latest := make(map[string]*entry.Entry)
	for i, u := range updates {
		e, ok := latest[u.ID]
		if !ok {
			e, ok = batch.set.Get(u.ID)
		}
		if !ok {
			out[i].Err = notFound("entry not found")
			continue
		}
		if e, out[i].Err = a.edited(e, u.Edit); out[i].Err != nil {
			continue
		}
		latest[u.ID], out[i].Entry = e, e
	}
	var changed []*entry.Entry
	for _, e := range latest {
		changed = append(changed, e)
	}
	if err := a.storeEntries(changed, nil); err != nil {
		return failAll(out, fmt.Errorf("failed to update entry: %w", err))
	}
	return out
}

func (a *Authority) edited(old *entry.Entry, edit func(*entry.Entry) error) (*entry.Entry, error) {
	e := old.Clone()
	if err := edit(e); err != nil {
		return nil, err
	}
	e.ID, e.Revision, e.CreatedAt = old.ID, old.Revision+1, old.CreatedAt
	if err := e.ValidateUpdate(a.cfg.TrustDomain); err != nil {
		return nil, &kindError{kind: ErrInvalid, cause: err}
	}
	if err := a.checkReferences(e); err != nil {
		return nil, err
	}
	return e, nil
}

// DeleteEntry is DeleteEntries for one.
func (a *Authority) DeleteEntry(ctx context.Context, id string) error {
	return a.DeleteEntries(ctx, id)[0]
}

// DeleteEntries deletes entries in one durable step, each for itself as
// CreateEntries. Errors: ErrInvalid (empty ID), ErrNotFound.
func (a *Authority) DeleteEntries(ctx context.Context, ids ...string) []error {
	out := make([]error, len(ids))
	fail := func(err error) []error {
		for i := range out {
			if out[i] == nil {
				out[i] = err
			}
		}
		return out
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	set := a.Set()
	var removed []string
	seen := make(map[string]bool)
	for i, id := range ids {
		_, ok := set.Get(id)
		switch {
		case id == "":
			out[i] = invalid("missing entry ID", nil)
		case !ok || seen[id]:
			out[i] = notFound("entry not found")
		default:
			seen[id] = true
			removed = append(removed, id)
		}
	}
	if err := a.storeEntries(nil, removed); err != nil {
		return fail(fmt.Errorf("failed to delete entry: %w", err))
	}
	return out
}

// pruneEntries deletes expired entries.
func (a *Authority) pruneEntries(now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var removed []string
	for e := range a.Set().All() {
		if e.Expired(now) {
			removed = append(removed, e.ID)
		}
	}
	if len(removed) == 0 {
		return nil
	}
	if err := a.storeEntries(nil, removed); err != nil {
		return err
	}
	a.log.Info("expired entries deleted", slog.Int("count", len(removed)))
	return nil
}

var errNoRow = errors.New("entry has no row")

// storeEntries makes a change of the entries, and whatever else belongs to it,
// durable and shows it to readers. The caller holds mu.
func (a *Authority) storeEntries(changed []*entry.Entry, removed []string, more ...change) error {
	if len(changed)+len(removed)+len(more) == 0 {
		return nil
	}
	old := a.Set()
	// The next set decides on rows; it is thrown away if the commit fails.
	next := old.With(changed, removed)
	changes := more
	for _, id := range removed {
		row, ok := old.Row(id)
		if !ok {
			return fmt.Errorf("entry %s: %w", id, errNoRow)
		}
		changes = append(changes, remove(bucketEntries, rowKey(row)))
	}
	for _, e := range changed {
		row, ok := next.Row(e.ID)
		if !ok {
			return fmt.Errorf("entry %s: %w", e.ID, errNoRow)
		}
		content, err := e.MarshalBinary()
		if err != nil {
			return err
		}
		changes = append(changes, put(bucketEntries, rowKey(row), content))
	}
	if err := a.commit(changes...); err != nil {
		return err
	}
	if next != old {
		a.entries.Set(next)
		a.metrics.entries.Set(float64(next.Len()))
	}
	return nil
}
