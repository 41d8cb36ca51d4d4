package adminapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// entryService is spire.api.server.entry.v1.Entry.
type entryService struct {
	entrypb.UnimplementedEntryServer
	td    spiffeid.TrustDomain
	store entryStore
}

func (s *entryService) CountEntries(_ context.Context, req *entrypb.CountEntriesRequest) (*entrypb.CountEntriesResponse, error) {
	in := req.GetFilter()
	// The two filter messages have the same fields; one reader serves both.
	f, err := readEntryFilter(s.td, &entrypb.ListEntriesRequest_Filter{
		BySpiffeId: in.GetBySpiffeId(), ByParentId: in.GetByParentId(), BySelectors: in.GetBySelectors(),
		ByFederatesWith: in.GetByFederatesWith(), ByHint: in.GetByHint(), ByDownstream: in.GetByDownstream(),
	})
	if err != nil {
		return nil, err
	}
	if err := checkModes(f); err != nil {
		return nil, fail(codes.Internal, "failed to count entries", err)
	}
	return &entrypb.CountEntriesResponse{Count: int32(s.store.Set().Count(f))}, nil // memory ends first
}

func (s *entryService) ListEntries(_ context.Context, req *entrypb.ListEntriesRequest) (*entrypb.ListEntriesResponse, error) {
	const message = "failed to list entries"
	f, err := readEntryFilter(s.td, req.GetFilter())
	if err != nil {
		return nil, err
	}
	p, err := readPage(req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, fail(codes.Internal, message, fmt.Errorf("datastore-sql: rpc error: code = InvalidArgument desc = %w", err))
	}
	if err := checkModes(f); err != nil {
		return nil, fail(codes.Internal, message, err)
	}
	entries, last := s.store.Set().List(f, p.after, p.size)
	mask := newMasker(req.GetOutputMask())
	resp := &entrypb.ListEntriesResponse{NextPageToken: p.next(len(entries), last)}
	for _, e := range entries {
		out := spirewire.EntryToWire(e)
		mask.apply(out)
		resp.Entries = append(resp.Entries, out)
	}
	return resp, nil
}

func (s *entryService) GetEntry(_ context.Context, req *entrypb.GetEntryRequest) (*typespb.Entry, error) {
	if req.GetId() == "" {
		return nil, invalid("missing ID", nil)
	}
	e, ok := s.store.Set().Get(req.GetId())
	if !ok {
		return nil, fail(codes.NotFound, "entry not found", nil)
	}
	out := spirewire.EntryToWire(e)
	newMasker(req.GetOutputMask()).apply(out)
	return out, nil
}

func (s *entryService) BatchCreateEntry(ctx context.Context, req *entrypb.BatchCreateEntryRequest) (*entrypb.BatchCreateEntryResponse, error) {
	const message = "failed to create entry"
	results := make([]embedded.Result, len(req.GetEntries()))
	repeats := make(map[int]*entry.Entry)
	var accepted []*entry.Entry
	var places []int // of the accepted ones among the results
	for i, in := range req.GetEntries() {
		e, err := s.readNew(in)
		_, repeat := errors.AsType[*entry.RepeatError](err)
		switch {
		case repeat:
			results[i].Err, repeats[i] = err, e
		case err != nil:
			results[i].Err = err
		default:
			accepted, places = append(accepted, e), append(places, i)
		}
	}
	placeOf := make(map[string]int)
	if len(accepted) > 0 {
		for i, r := range s.store.CreateEntries(ctx, accepted...) {
			results[places[i]] = r
			if r.Entry != nil {
				placeOf[r.Entry.ID] = places[i]
			}
		}
	}
	// The server sees a similar entry before it sees a selector given twice.
	for i, e := range repeats {
		if stored, ok := s.store.Set().Similar(e); ok {
			if place, made := placeOf[stored.ID]; !made || place < i {
				results[i].Err = &embedded.SimilarError{Stored: stored}
			}
		}
	}
	mask := newMasker(req.GetOutputMask())
	resp := &entrypb.BatchCreateEntryResponse{}
	for i, r := range results {
		err := entryFailure(message, r.Err)
		result := &entrypb.BatchCreateEntryResponse_Result{Status: resultFor(err)}
		if similar, ok := errors.AsType[*embedded.SimilarError](r.Err); ok {
			// Clients dereference the entry that is in the way.
			r.Entry = similar.Stored
		}
		if r.Entry != nil {
			result.Entry = spirewire.EntryToWire(r.Entry)
			mask.apply(result.Entry)
		}
		resp.Results = append(resp.Results, result)
		auditEntry(ctx, "create entry", err, req.GetEntries()[i], r.Entry)
	}
	return resp, nil
}

// readNew checks a new entry up to what the store looks at. With an
// *entry.RepeatError it returns the entry as well.
func (s *entryService) readNew(in *typespb.Entry) (*entry.Entry, error) {
	given := readEntry(in)
	if given.StoreSVID && given.DisableX509SVIDPrefetch {
		// Not a mistake in the fields for themselves, so it comes after those.
		given.DisableX509SVIDPrefetch = false
		if _, err := given.Entry(s.td); isConversion(err) {
			return nil, err
		}
		return nil, errStorable
	}
	e, err := given.Entry(s.td)
	if err != nil {
		return nil, err
	}
	return e, given.CheckRepeated(entry.AllFields)
}

func isConversion(err error) bool {
	_, ok := errors.AsType[*entry.ConversionError](err)
	return ok
}

func (s *entryService) BatchUpdateEntry(ctx context.Context, req *entrypb.BatchUpdateEntryRequest) (*entrypb.BatchUpdateEntryResponse, error) {
	const message = "failed to update entry"
	fields := readFields(req.GetInputMask())
	results := make([]embedded.Result, len(req.GetEntries()))
	var updates []embedded.EntryUpdate
	var places []int
	for i, in := range req.GetEntries() {
		given := readEntry(in)
		// What the client wrote is judged before the entry is looked for.
		if _, err := given.Apply(&entry.Entry{}, fields, s.td); isConversion(err) {
			results[i].Err = err
			continue
		}
		places = append(places, i)
		updates = append(updates, embedded.EntryUpdate{ID: in.GetId(), Edit: func(e *entry.Entry) error {
			next, err := given.Apply(e, fields, s.td)
			if err != nil {
				return err
			}
			*e = *next
			return given.CheckRepeated(fields)
		}})
	}
	if len(updates) > 0 {
		for i, r := range s.store.UpdateEntries(ctx, updates...) {
			results[places[i]] = r
		}
	}
	mask := newMasker(req.GetOutputMask())
	resp := &entrypb.BatchUpdateEntryResponse{}
	for i, r := range results {
		err := entryFailure(message, r.Err)
		result := &entrypb.BatchUpdateEntryResponse_Result{Status: resultFor(err)}
		if r.Entry != nil {
			result.Entry = spirewire.EntryToWire(r.Entry)
			mask.apply(result.Entry)
		}
		resp.Results = append(resp.Results, result)
		auditEntry(ctx, "update entry", err, req.GetEntries()[i], r.Entry)
	}
	return resp, nil
}

func (s *entryService) BatchDeleteEntry(ctx context.Context, req *entrypb.BatchDeleteEntryRequest) (*entrypb.BatchDeleteEntryResponse, error) {
	resp := &entrypb.BatchDeleteEntryResponse{}
	if len(req.GetIds()) == 0 {
		return resp, nil
	}
	for i, err := range s.store.DeleteEntries(ctx, req.GetIds()...) {
		id := req.GetIds()[i]
		switch {
		case errors.Is(err, embedded.ErrInvalid):
			err = invalid("missing entry ID", nil)
		case errors.Is(err, embedded.ErrNotFound):
			err = fail(codes.NotFound, "entry not found", nil)
		case err != nil:
			err = fail(codes.Internal, "failed to delete entry", err)
		}
		resp.Results = append(resp.Results, &entrypb.BatchDeleteEntryResponse_Result{Status: resultFor(err), Id: id})
		auditEntry(ctx, "delete entry", err, &typespb.Entry{Id: id}, nil)
	}
	return resp, nil
}

func auditEntry(ctx context.Context, what string, err error, in *typespb.Entry, e *entry.Entry) {
	attrs := []slog.Attr{slog.String("entry_id", in.GetId())}
	if e != nil {
		attrs = []slog.Attr{
			slog.String("entry_id", e.ID), slog.String("spiffe_id", e.SPIFFEID.String()),
			slog.String("parent_id", e.ParentID.String()), slog.Int64("revision", e.Revision),
		}
	} else if id, err := spirewire.IDFromWire(in.GetSpiffeId()); err == nil {
		attrs = append(attrs, slog.String("spiffe_id", id.String()))
	}
	audit(ctx, what, err, attrs...)
}
