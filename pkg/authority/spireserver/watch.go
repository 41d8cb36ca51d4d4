package spireserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// watchSilence is how long a watch may be quiet: the server says something at
// least every 20 seconds.
const watchSilence = 45 * time.Second

var (
	errNoWatch  = errors.New("the server does not push changes")
	errReplaced = errors.New("the agent has a newer SVID")
	errSilent   = errors.New("the server has gone silent")
)

// change is one complete change the server pushed.
type change struct {
	version   string
	reset     bool
	entries   []*entry.Entry
	ids       map[string]bool // of all entries in it, also those left out
	removed   []string
	own       *ownBundle
	federated []*spiffebundle.Bundle
	foreign   map[spiffeid.TrustDomain]bool // whose bundles are in it, also those left out
	dropped   []spiffeid.TrustDomain
}

// watch has changes pushed until the stream ends. It returns errNoWatch if the
// server has no such service; any other error is that of the stream.
func (c *Client) watch(ctx context.Context) error {
	if c.cfg.noWatch {
		return errNoWatch
	}
	l := c.links.acquire()
	if l == nil {
		return errNotAttested
	}
	defer c.links.release(l)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.life, func() { cancel(errClosed) })() //nolint:contextcheck // the client ends calls, whoever makes them
	silence := time.AfterFunc(c.cfg.RPCTimeout, func() { cancel(errSilent) })
	defer silence.Stop()
	go func() {
		select {
		case <-l.retired:
			cancel(errReplaced)
		case <-ctx.Done():
		}
	}()
	err := c.receiveChanges(ctx, l, func() { silence.Reset(watchSilence) })
	switch cause := context.Cause(ctx); {
	case status.Code(err) == codes.Unimplemented:
		return errNoWatch
	case cause != nil:
		return cause
	case deniedReason(err) != none:
		if c.replaced(ctx, l, deniedReason(err)) {
			return errReplaced
		}
		c.reject(l.svid, deniedReason(err))
	}
	return err
}

func (c *Client) receiveChanges(ctx context.Context, l *link, alive func()) error {
	f := &c.follow
	stream, err := watchpb.NewWatchClient(l.cc).Watch(ctx, &watchpb.WatchRequest{Resume: f.resume})
	if err != nil {
		return err
	}
	var pending *change
	told := false
	for {
		ev, err := stream.Recv()
		if err != nil {
			return noEOF(err)
		}
		alive()
		if pending == nil {
			pending = &change{reset: ev.GetReset_(), ids: map[string]bool{}, foreign: map[spiffeid.TrustDomain]bool{}}
		}
		if err := c.addEvent(pending, ev); err != nil {
			f.resume = "" // from the start: this position cannot be passed
			return err
		}
		if ev.GetMore() {
			continue
		}
		pending.version = ev.GetVersion()
		if err := c.applyChange(pending); err != nil {
			f.resume = ""
			return err
		}
		if !told {
			// Who pushes may have started anew and know nothing of us.
			told = true
			signal(c.tell)
		}
		pending = nil
		c.follow.pace.failures = 0
		c.postStatus(ctx)
	}
}

// addEvent takes one piece into a change. What makes no sense is left out.
func (c *Client) addEvent(to *change, ev *watchpb.WatchEvent) error {
	for _, w := range ev.GetEntries() {
		to.ids[w.GetId()] = true
		e, err := c.entryFromWire(w)
		if err != nil {
			c.log.Warn("entry left out", slog.Any("error", err))
			to.removed = append(to.removed, w.GetId())
			continue
		}
		to.entries = append(to.entries, e)
	}
	to.removed = append(to.removed, ev.GetRemovedEntries()...)
	if len(to.ids)+len(to.removed) > maxEntries {
		return fmt.Errorf("%w: more than %d entries", errProtocol, maxEntries)
	}
	if ev.GetBundle() != nil {
		own, err := c.ownFromWire(ev.GetBundle())
		if err != nil {
			return err
		}
		to.own = own
	}
	for _, w := range ev.GetFederatedBundles() {
		td, err := spiffeid.TrustDomainFromString(w.GetTrustDomain())
		if err == nil && td == c.cfg.TrustDomain {
			err = fmt.Errorf("%w: the own bundle among federated ones", errProtocol)
		}
		var b *ownBundle
		if err == nil {
			to.foreign[td] = true
			b, err = bundleFromWire(td, w)
		}
		if err != nil {
			c.log.Warn("federated bundle not understood; the last one stays", slog.Any("error", err))
			continue
		}
		to.federated = append(to.federated, b.Bundle)
	}
	for _, name := range ev.GetRemovedBundles() {
		if td, err := spiffeid.TrustDomainFromString(name); err == nil {
			to.dropped = append(to.dropped, td)
		}
	}
	return nil
}

// applyChange takes a complete change into the books. What was pushed is meant:
// a removal needs no confirmation.
func (c *Client) applyChange(ch *change) error {
	if ch.version == "" && !ch.reset && len(ch.entries)+len(ch.removed)+len(ch.federated)+len(ch.dropped) == 0 && ch.own == nil {
		c.reportSync(nil) // the connection lives, nothing is new
		return nil
	}
	if _, _, heard := c.ledger.get(""); !heard && !ch.reset {
		return fmt.Errorf("%w: a change comes before the whole", errProtocol)
	}
	var next *entry.Set
	var withdrawn []*entry.Entry
	if ch.reset {
		next, withdrawn = c.ledger.replace(ch.entries)
	} else {
		next, withdrawn = c.ledger.edit(ch.entries, ch.removed)
	}
	// Bundles first: whoever gets an identity may need what goes with it.
	c.store.mu.Lock()
	if ch.reset {
		for td := range c.store.federated {
			if !ch.foreign[td] {
				c.store.dropFederated(td)
			}
		}
	}
	for _, b := range ch.federated {
		c.store.putFederated(b)
	}
	for _, td := range ch.dropped {
		c.store.dropFederated(td)
	}
	c.store.complete = true
	c.store.mu.Unlock()
	if ch.own != nil {
		c.takeOwn(ch.own)
	} else {
		c.publishBundles()
	}
	c.publish(next, withdrawn)
	if ch.version != "" {
		c.follow.resume = ch.version
	}
	c.reportSync(nil)
	c.report.edit(func(r *report) { r.s.Watching = true })
	return nil
}
