package workloadapi

import (
	"context"
	"sync"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// standing is what a caller has a right to at one moment.
type standing int

const (
	ready   standing = iota // there is something to give
	pending                 // it will come
	absent                  // nothing says that it will come
)

// view is what one call makes of a picture.
type view[R any] struct {
	response *R
	version  string // equal for equal content
	serials  []string
	standing standing
	synced   bool
	trust    uint32 // generation of the own bundle's authorities in it, 0 = none
}

// flow is one call that follows the picture.
type flow struct {
	server *Server
	ctx    context.Context //nolint:containedctx // the call's own
	method string
	id     uint64
	peer   uint64
	opened time.Time
	sub    Subscription
	wake   chan struct{}
	parked bool

	mu     sync.Mutex // guards the rest
	served bool
	sentAt time.Time
	count  uint64
	serial []string
	trust  uint32
}

// follow registers the caller. The flow must be closed.
func (s *Server) follow(ctx context.Context, method string) (*flow, error) {
	f := &flow{server: s, ctx: ctx, method: method, id: s.ids.Add(1), opened: time.Now(), wake: make(chan struct{}, 1)}
	if s.config.PeerID != nil {
		f.peer = s.config.PeerID(ctx)
	}
	sub, err := s.config.Subscribe(ctx, func() {
		select {
		case f.wake <- struct{}{}:
		default:
		}
	})
	if err != nil {
		return nil, inner{err}
	}
	f.sub = sub
	s.metrics.streams.WithLabelValues(method).Inc()
	s.mu.Lock()
	s.open[f] = struct{}{}
	s.mu.Unlock()
	return f, nil
}

func (f *flow) close() {
	f.server.mu.Lock()
	delete(f.server.open, f)
	f.server.mu.Unlock()
	f.server.metrics.streams.WithLabelValues(f.method).Dec()
	f.unpark()
	f.sub.Close()
}

func (f *flow) park(what string) error {
	if f.parked {
		return nil
	}
	if err := f.sub.Park(what); err != nil {
		return inner{err}
	}
	f.parked = true
	f.server.metrics.parked.Inc()
	return nil
}

func (f *flow) unpark() {
	if f.parked {
		f.parked = false
		f.server.metrics.parked.Dec()
		f.sub.Unpark()
	}
}

func (f *flow) update() *svid.Update {
	if u := f.sub.Update(); u != nil {
		return u
	}
	return new(svid.Update)
}

// late is the answer to a caller that was held long enough.
func late(synced bool) error {
	if !synced {
		return errNotSynced
	}
	return errNone
}

// stream sends what look makes of each picture, when its content is new.
func stream[R any](s *Server, ctx context.Context, method string, send func(*R) error, look func(*svid.Update) view[R]) error {
	f, err := s.follow(ctx, method)
	if err != nil {
		return err
	}
	defer f.close()
	hold := time.NewTimer(holdTime(ctx, s.config.fetchWait()))
	defer hold.Stop()
	expired := hold.C
	version := ""
	for {
		v := look(f.update())
		switch {
		case v.standing == ready:
			f.unpark()
			expired = nil
			if v.version != version {
				if err := send(v.response); err != nil {
					return sendError(ctx, err)
				}
				version = v.version
				f.sent(v.serials, v.trust)
			}
		case version == "":
			if err := f.park(method); err != nil {
				return err
			}
		case v.standing == absent:
			return errWithdrawn
		}
		select {
		case <-f.wake:
		case <-expired:
			return late(v.synced)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sendError tells a client that went away from other faults.
func sendError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func (f *flow) sent(serials []string, trust uint32) {
	m := f.server.metrics
	m.sent.WithLabelValues(f.method).Inc()
	f.mu.Lock()
	first := !f.served
	f.served, f.sentAt, f.serial, f.trust = true, time.Now(), serials, trust
	f.count++
	f.mu.Unlock()
	if first {
		m.first.WithLabelValues(f.method).Observe(time.Since(f.opened).Seconds())
	}
}

// await returns the first picture in which the caller is ready; held as long
// as a late caller may be.
func (s *Server) await(ctx context.Context, method string, look func(*svid.Update) standing) (*svid.Update, error) {
	if s.config.Snapshot != nil {
		u, err := s.config.Snapshot(ctx)
		if err != nil {
			return nil, inner{err}
		}
		if u != nil && look(u) == ready {
			return u, nil
		}
	}
	f, err := s.follow(ctx, method)
	if err != nil {
		return nil, err
	}
	defer f.close()
	hold := time.NewTimer(holdTime(ctx, s.config.fetchWait()))
	defer hold.Stop()
	for {
		u := f.update()
		if look(u) == ready {
			return u, nil
		}
		if err := f.park(method); err != nil {
			return nil, err
		}
		select {
		case <-f.wake:
		case <-hold.C:
			return nil, late(synced(u))
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// StreamStatus is what an operator may see of one open call. It holds no key
// material.
type StreamStatus struct {
	// ID is unique within the process; Peer is what Config.PeerID said.
	ID       uint64
	Peer     uint64
	Method   string
	OpenedAt time.Time
	// Late says that the caller has been given nothing yet.
	Late bool
	// Responses sent, the last of them at SentAt with these serials.
	Responses uint64
	SentAt    time.Time
	Serials   []string
}

// Streams is the status of all open calls, in no order. It never waits for a
// client.
func (s *Server) Streams() []StreamStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]StreamStatus, 0, len(s.open))
	for f := range s.open {
		f.mu.Lock()
		out = append(out, StreamStatus{
			ID: f.id, Peer: f.peer, Method: f.method, OpenedAt: f.opened,
			Late: !f.served, Responses: f.count, SentAt: f.sentAt, Serials: f.serial,
		})
		f.mu.Unlock()
	}
	return out
}
