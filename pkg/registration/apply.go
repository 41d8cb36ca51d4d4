package registration

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// flush writes what the dirty groups need. What fails is tried again later; a
// plan that was overtaken by somebody else's change is made anew at once, a few
// times.
func (x *engine) flush(ctx context.Context) {
	defer func() {
		for g := range x.dirty {
			x.later(g)
		}
		clear(x.dirty)
	}()
	for range 4 {
		if len(x.dirty) == 0 || ctx.Err() != nil {
			return
		}
		start := time.Now()
		p := x.makePlan(x.Authority.Set())
		if p.empty() {
			continue
		}
		failed := x.createAll(ctx, p.create)
		failed = errors.Join(failed, x.updateAll(ctx, p.update), x.removeAll(ctx, p.remove))
		x.Metrics.flush(time.Since(start), len(p.create), len(p.update), len(p.remove), failed)
		if failed != nil && ctx.Err() == nil {
			x.Logger.Warn("cannot write some registration entries; trying again", slog.Int("retrying", len(x.retry)), slog.String("error", oneLine(failed)))
		}
	}
}

func (x *engine) createAll(ctx context.Context, changes []change) error {
	var failed error
	for batch := range slices.Chunk(changes, maxBatch) {
		entries := make([]*entry.Entry, len(batch))
		for i, c := range batch {
			entries[i] = c.entry
		}
		for i, r := range x.Authority.CreateEntries(ctx, entries...) {
			failed = firstError(failed, x.created(batch[i], r.Err))
		}
	}
	return failed
}

// created notes the outcome of one creation; nil if it is settled or is tried
// again at once.
func (x *engine) created(c change, err error) error {
	similar := (*embedded.SimilarError)(nil)
	switch {
	case err == nil:
		x.settled(c, nil)
		return nil
	case errors.As(err, &similar) && x.owns(similar.Stored.ID):
		// One of ours: take it over if nobody claims it. If somebody does, its
		// content was changed behind our back and is put right by this plan.
		x.release(c.group)
		if x.byEntry[similar.Stored.ID] == nil {
			delete(x.held, similar.Stored.ID)
			c.group.entryID = similar.Stored.ID
			x.byEntry[c.group.entryID] = c.group
		}
		x.dirty[c.group] = true
		return nil
	case similar != nil:
		err = fmt.Errorf("entry %s, which was written by somebody else, has the same SPIFFE ID, parent and selectors", similar.Stored.ID)
	}
	x.release(c.group)
	x.settled(c, err)
	return err
}

// release gives up the ID of an entry that does not exist.
func (x *engine) release(g *group) {
	if x.byEntry[g.entryID] == g {
		delete(x.byEntry, g.entryID)
	}
	g.entryID = ""
}

func (x *engine) updateAll(ctx context.Context, changes []change) error {
	var failed error
	for batch := range slices.Chunk(changes, maxBatch) {
		updates := make([]embedded.EntryUpdate, len(batch))
		for i, c := range batch {
			updates[i] = embedded.EntryUpdate{ID: c.id, Edit: func(e *entry.Entry) error {
				*e = *c.entry.Clone()
				return nil
			}}
		}
		for i, r := range x.Authority.UpdateEntries(ctx, updates...) {
			c := batch[i]
			if errors.Is(r.Err, embedded.ErrNotFound) {
				x.dirty[c.group] = true // somebody deleted it: create it again
				continue
			}
			x.settled(c, r.Err)
			failed = firstError(failed, r.Err)
		}
	}
	return failed
}

func (x *engine) removeAll(ctx context.Context, changes []change) error {
	var failed error
	for batch := range slices.Chunk(changes, maxBatch) {
		ids := make([]string, len(batch))
		for i, c := range batch {
			ids[i] = c.id
		}
		for i, err := range x.Authority.DeleteEntries(ctx, ids...) {
			g := batch[i].group
			if err != nil && !errors.Is(err, embedded.ErrNotFound) {
				failed = firstError(failed, err)
				x.later(g)
				continue
			}
			x.release(g)
			x.forgetGroup(g)
		}
	}
	return failed
}

func firstError(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// retryDue makes groups dirty whose time has come.
func (x *engine) retryDue(now time.Time) {
	for g, at := range x.retry {
		if !at.After(now) {
			delete(x.retry, g)
			x.dirty[g] = true
		}
	}
}

// nextRetry is the time of the earliest one; zero = none.
func (x *engine) nextRetry() time.Time {
	var next time.Time
	for _, at := range x.retry {
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	return next
}
