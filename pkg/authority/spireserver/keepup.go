package spireserver

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// pushWait is how long a change that the server knows may be on its way.
const pushWait = 2 * time.Second

// syncOutcome is what became of the syncs asked for up to a number.
type syncOutcome struct {
	asked uint64
	err   error
}

// follower is the state of the sync loop; only that loop touches it.
type follower struct {
	pace        pace
	id          *nodeSVID                     // with which the last step was made
	noSync      bool                          // the server has no SyncAuthorizedEntries
	posted      bool                          // PostStatus was sent
	noWatch     *nodeSVID                     // with this SVID there was no watch; tried again with the next
	resume      string                        // position in what the server pushes
	federatedAt time.Time                     // last round of federated bundles
	bundleAt    time.Time                     // last answer with the own bundle
	asked       map[spiffeid.TrustDomain]bool // for their bundles, since federatedAt
}

func (f *follower) init(c *Client) {
	f.pace = pace{interval: c.cfg.SyncInterval}
	f.asked = map[spiffeid.TrustDomain]bool{}
}

// keepUp follows entries and bundles until ctx ends: pushed if the server does
// that, else by polling.
func (c *Client) keepUp(ctx context.Context) {
	f := &c.follow
	for {
		id, err := c.identity.Wait(ctx, nil, func(id *nodeSVID) bool { return id != nil })
		if err != nil {
			return
		}
		f.id = id
		if !time.Now().Before(id.expires()) {
			// No server takes it; what was issued is served on.
			if _, err := c.identity.Wait(ctx, nil, func(now *nodeSVID) bool { return now != id }); err != nil {
				return
			}
			continue
		}
		var wait time.Duration
		if f.noWatch != id {
			wait, err = c.watchOnce(ctx, id)
		} else {
			wait, err = c.pollOnce(ctx)
		}
		if err == nil {
			c.refused.note(nil)
		}
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			c.rest(ctx, wait)
		case c.isRejected(id):
			// Nothing is asked with an SVID that was turned away.
			c.log.Warn("the server turned the agent's SVID away; entries stay as they are until there is another", slog.Any("error", err))
			if _, err := c.identity.Wait(ctx, nil, func(now *nodeSVID) bool { return now != id }); err != nil {
				return
			}
		case unreachable(err) && (certificateRefused(err) || c.sawServer()):
			c.certificateRefused(ctx, id)
			c.rest(ctx, min(wait, awaitMax))
		case unreachable(err):
			c.refused.note(nil)
			c.awaitServer(ctx, wait)
		default:
			c.rest(ctx, wait)
		}
	}
}

// pollOnce syncs; the result is when to do so again.
func (c *Client) pollOnce(ctx context.Context) (time.Duration, error) {
	asked := c.asked.Load()
	start := time.Now()
	err := c.syncOnce(ctx)
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	c.synced.Set(syncOutcome{asked, err})
	c.reportSync(err)
	if err == nil {
		c.postStatus(ctx)
	}
	return c.follow.pace.after(start, time.Now(), err, c.nextLook()), err
}

// watchOnce has changes pushed for as long as that lasts; the result is when to
// go on.
func (c *Client) watchOnce(ctx context.Context, id *nodeSVID) (time.Duration, error) {
	f := &c.follow
	start := time.Now()
	err := c.watch(ctx)
	watched := c.report.watching(false)
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case errors.Is(err, errNoWatch):
		f.noWatch, f.resume = id, ""
		c.log.Info("the server does not push changes; it is polled", slog.Duration("interval", c.cfg.SyncInterval))
		return 0, nil
	case errors.Is(err, errReplaced), watched && unreachable(err) && time.Since(start) > hurryMin:
		// A new SVID, or a server that closes old connections: no fault. Whether
		// the server is there shows at once.
		return 0, nil
	}
	err = fmt.Errorf("watch: %w", err)
	c.reportSync(err)
	return f.pace.after(start, time.Now(), err, time.Time{}), err
}

// sawServer says whether a server proved itself a moment ago. The alert with
// which it then turns a certificate down is often lost to a write that fails
// first.
func (c *Client) sawServer() bool {
	return time.Since(time.Unix(0, c.verified.Load())) < refusedFor
}

// certificateRefused is told that the server did not take the agent's
// certificate. One that has lost its keys, or was installed anew, does not know
// the authority it was signed by; then only attesting again helps, where that is
// possible.
func (c *Client) certificateRefused(ctx context.Context, id *nodeSVID) {
	if c.refused.note(errTurnedAway) < refusedFor {
		return
	}
	if !id.reattestable {
		proof, err := c.cfg.Attestor.Prove(ctx)
		if err != nil || c.isSpent(proof.Payload, sha256.Sum256(proof.Payload)) {
			return // another token may come
		}
	}
	c.log.Warn("the server does not take the agent's certificate; the node attests anew", slog.String("agent_id", id.ID.String()))
	c.refused.note(nil)
	c.reject(id, notAttested)
}

func (c *Client) isRejected(id *nodeSVID) bool {
	c.rejectedMu.Lock()
	defer c.rejectedMu.Unlock()
	return c.rejected != nil && c.rejected.svid == id
}

// signal leaves a note in a one-slot channel.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// rest waits until the next sync is due, somebody is in a hurry or the agent has
// another SVID.
func (c *Client) rest(ctx context.Context, wait time.Duration) {
	f := &c.follow
	id, replaced := c.identity.Look()
	if id != c.follow.id {
		f.pace.failures = 0
		return
	}
	for {
		timer := time.NewTimer(max(wait, 0))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
			return
		case <-replaced:
			timer.Stop()
			f.pace.failures = 0
			return
		case <-c.hurry:
			timer.Stop()
			wait = f.pace.hurry(time.Now())
		}
	}
}

// awaitServer waits until a connection is there again, and then for a moment
// that differs from node to node. A try now and then, which costs nothing
// without a connection, shows why there is none.
func (c *Client) awaitServer(ctx context.Context, wait time.Duration) {
	wctx, cancel := context.WithTimeout(ctx, awaitMax)
	c.reachable(wctx)
	cancel()
	c.rest(ctx, min(wait, jitter(returnSpread)))
}

// syncOnce asks for entries, and for bundles unless they were asked for a moment
// ago.
func (c *Client) syncOnce(ctx context.Context) error {
	f := &c.follow
	answer, err := c.fetchEntries(ctx, func(id string) *entry.Entry {
		e, _, _ := c.ledger.get(id)
		return e
	})
	if err != nil {
		return fmt.Errorf("sync entries: %w", err)
	}
	next, withdrawn := c.ledger.apply(answer, time.Now())
	c.publish(next, withdrawn)
	tds := c.federatesWith(next)
	c.store.keepFederated(tds)
	now := time.Now()
	if f.due(f.bundleAt, now) {
		if err := c.refreshOwn(ctx); err != nil {
			return err
		}
		f.bundleAt = now
	}
	ask := f.dueFederated(tds, c.store.unknownFederated(tds), now)
	// One that fails was said so and keeps nobody waiting.
	_ = c.refreshFederated(ctx, ask)
	return nil
}

// due says whether bundles last asked for at a time are to be asked for again,
// give or take what syncs vary.
func (f *follower) due(asked, now time.Time) bool { return now.Sub(asked) >= f.pace.interval*4/5 }

// nextLook is when the next sync must come, however long the pauses of a hurry
// have become: to confirm that an entry is missing, and for the bundles.
func (c *Client) nextLook() time.Time {
	at := c.follow.bundleAt.Add(c.cfg.SyncInterval * 11 / 10)
	if confirm := c.ledger.nextConfirm(); !confirm.IsZero() && confirm.Before(at) {
		return confirm
	}
	return at
}

// dueFederated are the trust domains whose bundles to ask for now: all of them
// once an interval, and those without one once more in between.
func (f *follower) dueFederated(all, unknown []spiffeid.TrustDomain, now time.Time) []spiffeid.TrustDomain {
	if f.due(f.federatedAt, now) {
		f.federatedAt = now
		clear(f.asked)
		for _, td := range all {
			f.asked[td] = true
		}
		return all
	}
	var due []spiffeid.TrustDomain
	for _, td := range unknown {
		if !f.asked[td] {
			f.asked[td] = true
			due = append(due, td)
		}
	}
	return due
}

func (c *Client) reportSync(err error) {
	now := time.Now()
	c.report.edit(func(r *report) {
		failing := r.syncErr != nil
		r.syncErr = err
		switch {
		case err == nil:
			r.s.LastSync = now
			c.met.synced.Set(float64(now.UnixNano()) / 1e9)
			if failing {
				c.log.Info("the server answers again")
			}
		case !failing:
			c.log.Warn("sync with the server failed; what is known is served on", slog.Any("error", err))
		default:
			c.log.Debug("sync with the server failed", slog.Any("error", err))
		}
	})
}

// postStatus tells the server this agent's version, once.
func (c *Client) postStatus(ctx context.Context) {
	if c.follow.posted || c.cfg.Version == "" {
		return
	}
	c.follow.posted = true
	err := c.call(ctx, "PostStatus", func(ctx context.Context, cc grpc.ClientConnInterface) error {
		_, err := agentpb.NewAgentClient(cc).PostStatus(ctx, &agentpb.PostStatusRequest{AgentVersion: c.cfg.Version})
		return err
	})
	if err != nil {
		c.log.Debug("the server did not take the agent's version", slog.Any("error", err))
	}
}

// resync waits for a sync that started after now, or, where changes are pushed,
// for the one that takes the entry away.
func (c *Client) resync(ctx context.Context, id string) error {
	if c.report.status().Watching {
		ctx, cancel := context.WithTimeout(ctx, pushWait)
		defer cancel()
		_, err := c.set.Wait(ctx, nil, func(s *entry.Set) bool {
			_, there := s.Get(id)
			return !there
		})
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RPCTimeout)
	defer cancel()
	want := c.asked.Add(1)
	c.Hurry()
	out, err := c.synced.Wait(ctx, nil, func(o syncOutcome) bool { return o.asked >= want })
	return errors.Join(err, out.err)
}
