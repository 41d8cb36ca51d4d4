package spireserver

import (
	"context"
	"fmt"
	"log/slog"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// listing is one complete answer of the server.
type listing struct {
	listed map[string]bool // IDs of all entries this agent is authorized for
	full   []*entry.Entry  // those that are new or changed
}

// known is the entry the client holds for an ID, nil if none.
type known func(id string) *entry.Entry

// fetchEntries asks for everything this agent is authorized for.
func (c *Client) fetchEntries(ctx context.Context, have known) (*listing, error) {
	if !c.follow.noSync {
		var out *listing
		err := c.call(ctx, "SyncAuthorizedEntries", func(ctx context.Context, cc grpc.ClientConnInterface) (err error) {
			out, err = c.syncEntries(ctx, cc, have)
			return err
		})
		if status.Code(err) != codes.Unimplemented {
			return out, err
		}
		c.follow.noSync = true
		c.log.Info("the server has no SyncAuthorizedEntries; everything is listed each time")
	}
	var res *entrypb.GetAuthorizedEntriesResponse
	err := c.call(ctx, "GetAuthorizedEntries", func(ctx context.Context, cc grpc.ClientConnInterface) (err error) {
		res, err = entrypb.NewEntryClient(cc).GetAuthorizedEntries(ctx, &entrypb.GetAuthorizedEntriesRequest{})
		return err
	})
	if err != nil {
		return nil, err
	}
	out := &listing{listed: make(map[string]bool, len(res.GetEntries()))}
	return out, c.addEntries(out, res.GetEntries(), nil)
}

// syncEntries is the agent's part of SyncAuthorizedEntries: a small set comes
// whole; of a large one come the revisions first, and what is new or changed is
// asked for page by page.
func (c *Client) syncEntries(ctx context.Context, cc grpc.ClientConnInterface, have known) (*listing, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := entrypb.NewEntryClient(cc).SyncAuthorizedEntries(ctx)
	if err != nil {
		return nil, err
	}
	// Without a mask everything comes, also what later servers add.
	if err := stream.Send(&entrypb.SyncAuthorizedEntriesRequest{}); err != nil && !isEOF(err) {
		return nil, err
	}
	res, err := stream.Recv()
	if err != nil {
		return nil, noEOF(err)
	}
	out := &listing{listed: make(map[string]bool, len(res.GetEntries())+len(res.GetEntryRevisions()))}
	if len(res.GetEntryRevisions()) == 0 {
		err = c.receiveEntries(stream, res, out, nil)
	} else {
		err = c.syncSparse(stream, res, out, have)
	}
	if err != nil {
		return nil, err
	}
	// The server's status counts only once the stream has ended.
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	switch _, err := stream.Recv(); {
	case err == nil:
		return nil, fmt.Errorf("%w: it sends entries nobody asked for", errProtocol)
	case !isEOF(err):
		return nil, err
	}
	return out, nil
}

type syncStream = grpc.BidiStreamingClient[entrypb.SyncAuthorizedEntriesRequest, entrypb.SyncAuthorizedEntriesResponse]

func (c *Client) syncSparse(stream syncStream, res *entrypb.SyncAuthorizedEntriesResponse, out *listing, have known) error {
	page := len(res.GetEntryRevisions())
	var stale []string
	for {
		if len(res.GetEntries()) > 0 {
			return fmt.Errorf("%w: entries among revisions", errProtocol)
		}
		for _, r := range res.GetEntryRevisions() {
			if r.GetId() == "" || r.GetRevisionNumber() < 0 {
				return fmt.Errorf("%w: malformed revision of entry %q", errProtocol, r.GetId())
			}
			if out.listed[r.GetId()] {
				continue
			}
			out.listed[r.GetId()] = true
			e := have(r.GetId())
			if e == nil || e.Revision != r.GetRevisionNumber() || r.GetCreatedAt() != 0 && r.GetCreatedAt() != spirewire.TimeToWire(e.CreatedAt) {
				stale = append(stale, r.GetId())
			}
		}
		if len(out.listed) > maxEntries {
			return fmt.Errorf("%w: more than %d entries", errProtocol, maxEntries)
		}
		if !res.GetMore() {
			break
		}
		var err error
		if res, err = stream.Recv(); err != nil {
			return noEOF(err)
		}
	}
	// What was listed but does not come, or makes no sense, is not listed.
	for _, id := range stale {
		delete(out.listed, id)
	}
	slices.Sort(stale)
	for ids := range slices.Chunk(stale, page) {
		if err := stream.Send(&entrypb.SyncAuthorizedEntriesRequest{Ids: ids}); err != nil && !isEOF(err) {
			return err
		}
		res, err := stream.Recv()
		if err != nil {
			return noEOF(err)
		}
		wanted := func(id string) bool {
			_, ok := slices.BinarySearch(ids, id)
			return ok
		}
		if err := c.receiveEntries(stream, res, out, wanted); err != nil {
			return err
		}
	}
	return nil
}

// receiveEntries takes pages of full entries, the first of which is res.
func (c *Client) receiveEntries(stream syncStream, res *entrypb.SyncAuthorizedEntriesResponse, out *listing, wanted func(id string) bool) error {
	for {
		if len(res.GetEntryRevisions()) > 0 {
			return fmt.Errorf("%w: revisions among entries", errProtocol)
		}
		if err := c.addEntries(out, res.GetEntries(), wanted); err != nil || !res.GetMore() {
			return err
		}
		var err error
		if res, err = stream.Recv(); err != nil {
			return noEOF(err)
		}
	}
}

// addEntries takes entries that make sense and were wanted (nil: all) into the
// listing.
func (c *Client) addEntries(out *listing, in []*typespb.Entry, wanted func(id string) bool) error {
	for _, w := range in {
		e, err := c.entryFromWire(w)
		if err != nil {
			c.log.Warn("entry left out", slog.Any("error", err))
			continue
		}
		if out.listed[e.ID] || wanted != nil && !wanted(e.ID) {
			continue
		}
		out.listed[e.ID] = true
		out.full = append(out.full, e)
	}
	if len(out.listed) > maxEntries {
		return fmt.Errorf("%w: more than %d entries", errProtocol, maxEntries)
	}
	return nil
}

func (c *Client) entryFromWire(in *typespb.Entry) (*entry.Entry, error) {
	e, err := spirewire.EntryFromWire(in)
	if err != nil {
		return nil, err
	}
	if !e.SPIFFEID.MemberOf(c.cfg.TrustDomain) {
		return nil, fmt.Errorf("entry %s: %s is not of trust domain %s", e.ID, e.SPIFFEID, c.cfg.TrustDomain)
	}
	return e, nil
}
