package adminapi

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// syncPage is how many entries or revisions one message holds.
const syncPage = 500

// nodeEntries is the Entry service where agents are served.
type nodeEntries struct {
	entryService
	nodes *Nodes
}

// GetAuthorizedEntries is all entries of the calling agent at once.
func (s *nodeEntries) GetAuthorizedEntries(ctx context.Context, req *entrypb.GetAuthorizedEntriesRequest) (*entrypb.GetAuthorizedEntriesResponse, error) {
	set, err := s.set(ctx)
	if err != nil {
		return nil, err
	}
	mask := newMasker(req.GetOutputMask())
	resp := &entrypb.GetAuthorizedEntriesResponse{}
	for e := range set.All() {
		resp.Entries = append(resp.Entries, maskedEntry(e, mask))
	}
	return resp, nil
}

func (s *nodeEntries) set(ctx context.Context) (*entry.Set, error) {
	c := callerOf(ctx)
	if c.agent == nil {
		return nil, fail(codes.Internal, "caller is no agent", nil)
	}
	return s.nodes.view(c.agent).Set(), nil
}

func maskedEntry(e *entry.Entry, mask *masker) *typespb.Entry {
	out := spirewire.EntryToWire(e)
	mask.apply(out)
	return out
}

// SyncAuthorizedEntries is the entries of the calling agent in pages; a large
// set as revisions first, so that the agent asks only for what it lacks.
func (s *nodeEntries) SyncAuthorizedEntries(stream grpc.BidiStreamingServer[entrypb.SyncAuthorizedEntriesRequest, entrypb.SyncAuthorizedEntriesResponse]) error {
	set, err := s.set(stream.Context())
	if err != nil {
		return err
	}
	return syncEntries(stream, set, syncPage)
}

// syncStream is what syncing takes of a stream.
type syncStream interface {
	Recv() (*entrypb.SyncAuthorizedEntriesRequest, error)
	Send(*entrypb.SyncAuthorizedEntriesResponse) error
}

// syncEntries speaks the protocol over a set, which does not change meanwhile.
func syncEntries(stream syncStream, set *entry.Set, page int) error {
	req, err := stream.Recv()
	switch {
	case err != nil:
		return clientLeft(err)
	case len(req.GetIds()) > 0:
		return status.Error(codes.InvalidArgument, "specifying IDs on initial request is not supported")
	case req.GetOutputMask() != nil && !req.GetOutputMask().GetRevisionNumber():
		return status.Error(codes.InvalidArgument, "revision number cannot be masked")
	}
	mask := newMasker(req.GetOutputMask())
	if set.Len() <= page {
		resp := &entrypb.SyncAuthorizedEntriesResponse{}
		for e := range set.All() {
			resp.Entries = append(resp.Entries, maskedEntry(e, mask))
		}
		return stream.Send(resp)
	}
	if err := sendRevisions(stream, set, page); err != nil {
		return err
	}
	for {
		req, err := stream.Recv()
		if err != nil {
			return clientLeft(err)
		}
		if err := sendEntries(stream, set, req.GetIds(), mask, page); err != nil {
			return err
		}
	}
}

// clientLeft is nil for the two ways in which a client is done.
func clientLeft(err error) error {
	if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
		return nil
	}
	return err
}

func sendRevisions(stream syncStream, set *entry.Set, page int) error {
	left := set.Len()
	resp := &entrypb.SyncAuthorizedEntriesResponse{}
	for e := range set.All() {
		resp.EntryRevisions = append(resp.EntryRevisions, &entrypb.EntryRevision{
			Id: e.ID, RevisionNumber: e.Revision, CreatedAt: spirewire.TimeToWire(e.CreatedAt),
		})
		left--
		if len(resp.EntryRevisions) < page && left > 0 {
			continue
		}
		resp.More = left > 0
		if err := stream.Send(resp); err != nil {
			return err
		}
		resp = &entrypb.SyncAuthorizedEntriesResponse{}
	}
	return nil
}

// sendEntries sends those of the wanted entries that are in the set, in the
// order of their IDs; at least one message.
func sendEntries(stream syncStream, set *entry.Set, ids []string, mask *masker, page int) error {
	var found []*entry.Entry
	for _, id := range ids {
		if e, ok := set.Get(id); ok {
			found = append(found, e)
		}
	}
	slices.SortFunc(found, func(a, b *entry.Entry) int { return cmp.Compare(a.ID, b.ID) })
	found = slices.Compact(found) // an ID given twice is answered once
	for {
		n := min(page, len(found))
		resp := &entrypb.SyncAuthorizedEntriesResponse{More: n < len(found)}
		for _, e := range found[:n] {
			resp.Entries = append(resp.Entries, maskedEntry(e, mask))
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
		if found = found[n:]; len(found) == 0 {
			return nil
		}
	}
}
