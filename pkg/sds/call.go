package sds

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// machine is a stream's protocol: stream or delta.
type machine interface {
	update(u *svid.Update) action
	state(out *StreamStatus)
	waiting() []string
}

// call is one open stream. Its handler goroutine waits for the client;
// updates are sent by a goroutine that lives as long as there is something to
// look at, never more than one at a time. A client that does not read blocks
// these two and nobody else.
type call struct {
	server *Server
	ctx    context.Context //nolint:containedctx // the stream's own
	stream grpc.ServerStream
	kind   string
	id     uint64
	peer   uint64
	opened time.Time
	sub    Subscription // guarded by turn

	pushing atomic.Int32 // idle, running, again

	// turn is held from looking at the picture until the response is sent, so
	// that responses leave in the order they were decided.
	turn sync.Mutex

	// mu guards the rest and is never held while sending.
	mu       sync.Mutex
	machine  machine
	wake     func(error) // ends the handler's wait for the client; called once
	parked   bool
	lateAt   time.Time // when it was parked
	closed   bool
	end      error // why we ended the stream
	sentAt   time.Time
	ackedAt  time.Time
	acked    string
	nackedAt time.Time
	nacked   string
	nackText string
	gotCert  bool
	gotRoots bool

	toldUnknown bool
	toldLate    bool
}

const (
	idle int32 = iota
	running
	again
)

// waiting are the names the client waits for.
func (c *core) waiting() []string { return c.late }

// serve runs one stream: next waits for one request and answers it.
func (s *Server) serve(ss grpc.ServerStream, kind string, m machine, next func(*call) error) (err error) {
	ctx := ss.Context()
	defer s.contain(ctx, &err)
	c := &call{
		server: s, ctx: ctx, stream: ss, kind: kind,
		id: s.ids.Add(1), opened: time.Now(), machine: m,
	}
	if s.config.PeerID != nil {
		c.peer = s.config.PeerID(ctx)
	}
	gauge := s.metrics.streams.WithLabelValues(kind)
	gauge.Inc()
	defer gauge.Dec()
	err = c.run(next)
	reason := reasonClient
	var answer error
	if err != nil && !errors.Is(err, io.EOF) {
		reason, answer = refusal(err)
	}
	s.metrics.ends.WithLabelValues(kind, reason).Inc()
	if reason != reasonClient {
		s.log.LogAttrs(ctx, slog.LevelInfo, "secret stream ended", s.attrs(ctx,
			slog.Uint64("stream", c.id), slog.String("reason", reason), slog.Any("error", err))...)
	}
	return answer
}

func (c *call) run(next func(*call) error) error {
	s := c.server
	ended := make(chan struct{})
	transport, single := grpc.ServerTransportStreamFromContext(c.ctx).(statusWriter)
	c.wake = func(error) { close(ended) }
	if single {
		c.wake = func(err error) {
			_, answer := refusal(err)
			_ = transport.WriteStatus(status.Convert(answer)) // fails only if the stream is over
		}
	}
	// The subscription may notify before Subscribe has returned.
	c.turn.Lock()
	sub, err := s.config.Subscribe(c.ctx, c.kick)
	if err == nil {
		c.sub = sub
	}
	c.turn.Unlock()
	if err != nil {
		return inner{err}
	}
	defer c.close()
	loop := func() error {
		for {
			if err := next(c); err != nil {
				return err
			}
		}
	}
	s.add(c)
	if single {
		err = loop()
	} else {
		done := make(chan error, 1)
		go func() {
			var err error
			defer func() { done <- err }()
			defer s.contain(c.ctx, &err)
			err = loop()
		}()
		select {
		case err = <-done:
		case <-ended:
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.end != nil {
		return c.end
	}
	return err
}

// statusWriter is gRPC's own stream, which can be ended while its handler
// waits in Recv. It is no part of gRPC's interface, so without it a second
// goroutine does the waiting.
type statusWriter interface {
	WriteStatus(st *status.Status) error
}

func (s *Server) add(c *call) {
	s.mu.Lock()
	s.open[c] = struct{}{}
	s.mu.Unlock()
}

// close waits for a push that is under way; nothing is sent afterwards.
func (c *call) close() {
	s := c.server
	s.mu.Lock()
	delete(s.open, c)
	s.mu.Unlock()
	c.turn.Lock()
	c.mu.Lock()
	c.closed = true
	parked := c.parked
	c.parked = false
	c.mu.Unlock()
	c.turn.Unlock()
	if parked {
		s.metrics.parked.Dec()
		c.sub.Unpark()
	}
	c.sub.Close()
}

// kick has the picture looked at again. It does not block.
func (c *call) kick() {
	for {
		switch c.pushing.Load() {
		case idle:
			if c.pushing.CompareAndSwap(idle, running) {
				go c.push()
				return
			}
		case running:
			if c.pushing.CompareAndSwap(running, again) {
				return
			}
		case again:
			return
		}
	}
}

func (c *call) push() {
	for {
		if err := c.pushOnce(); err != nil {
			c.fail(err)
		}
		if c.pushing.CompareAndSwap(running, idle) {
			return
		}
		c.pushing.Store(running)
	}
}

func (c *call) pushOnce() (err error) {
	defer c.server.contain(c.ctx, &err)
	return c.step(func(u *svid.Update) action { return c.machine.update(u) })
}

// fail ends the stream from outside its handler.
func (c *call) fail(err error) {
	c.mu.Lock()
	if c.end == nil {
		c.end = err
	}
	wake := c.wake
	c.wake = nil
	c.mu.Unlock()
	if wake != nil {
		wake(err)
	}
}

// step lets one event act on the newest picture and does what follows from it.
func (c *call) step(event func(*svid.Update) action) error {
	c.turn.Lock()
	defer c.turn.Unlock()
	c.mu.Lock()
	if over := c.closed || c.end != nil || c.sub == nil; over {
		defer c.mu.Unlock()
		return c.end
	}
	c.mu.Unlock()
	u := c.sub.Update()
	if u == nil {
		u = new(svid.Update)
	}
	a, wait, late := c.fold(event, u)
	c.report(a)
	if a.end != nil {
		return a.end
	}
	if a.send != nil {
		if err := c.stream.SendMsg(&message{a.send}); err != nil {
			if c.ctx.Err() != nil {
				err = c.ctx.Err() // the client has gone
			}
			return err
		}
		c.sent(a)
	}
	switch {
	case wait > 0:
		c.tellLate(late)
		if err := c.sub.Park(late); err != nil {
			return inner{err}
		}
		c.park(true)
		c.server.metrics.parked.Inc()
	case wait < 0:
		c.park(false)
		c.server.metrics.parked.Dec()
		c.sub.Unpark()
	}
	return nil
}

func (c *call) park(parked bool) {
	c.mu.Lock()
	if c.parked = parked; parked {
		c.lateAt = time.Now()
	} else {
		c.lateAt = time.Time{}
	}
	c.mu.Unlock()
}

// fold runs the event. wait is 1 if the stream begins to wait for something
// late, -1 if it no longer does, 0 if nothing changes.
func (c *call) fold(event func(*svid.Update) action, u *svid.Update) (a action, wait int, late string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a = event(u)
	now := time.Now()
	switch a.verdict {
	case acked:
		c.ackedAt, c.acked = now, a.about
	case nacked:
		c.nackedAt, c.nacked, c.nackText = now, a.about, a.rejects.message
	}
	if a.end != nil {
		return a, 0, ""
	}
	names := c.machine.waiting()
	switch waits := len(names) > 0; {
	case waits && !c.parked:
		wait, late = 1, strings.Join(names[:min(len(names), 4)], " ")
	case !waits && c.parked:
		wait = -1
	}
	return a, wait, clip(late, 512)
}

// sent records a response that has gone out.
func (c *call) sent(a action) {
	m := c.server.metrics
	m.responses.WithLabelValues(c.kind, a.cause).Inc()
	cert := slices.ContainsFunc(a.sent, func(r resource) bool { return r.identity() })
	roots := slices.ContainsFunc(a.sent, func(r resource) bool { return !r.identity() })
	c.mu.Lock()
	c.sentAt = time.Now()
	cert, roots = cert && !c.gotCert, roots && !c.gotRoots
	c.gotCert, c.gotRoots = c.gotCert || cert, c.gotRoots || roots
	c.mu.Unlock()
	if cert {
		m.observeFirst("identity", c.opened)
	}
	if roots {
		m.observeFirst("bundle", c.opened)
	}
}

// report logs and counts what an event brought to light.
func (c *call) report(a action) {
	s := c.server
	if a.verdict != noVerdict {
		s.metrics.verdicts.WithLabelValues(c.kind, a.verdict.String()).Inc()
	}
	if a.verdict == nacked {
		s.log.LogAttrs(c.ctx, slog.LevelWarn, "client rejected secrets", s.attrs(c.ctx,
			slog.Uint64("stream", c.id), slog.Int("code", int(a.rejects.code)), slog.String("text", a.rejects.message))...)
	}
	if len(a.unknown) > 0 {
		s.metrics.unknown.Add(float64(len(a.unknown)))
		c.mu.Lock()
		once := !c.toldUnknown
		c.toldUnknown = true
		c.mu.Unlock()
		if once {
			s.log.LogAttrs(c.ctx, slog.LevelInfo, "unknown secret names ignored", s.attrs(c.ctx,
				slog.Uint64("stream", c.id), slog.Int("count", len(a.unknown)), slog.Any("first", shorten(a.unknown)))...)
		}
	}
	if a.narrow {
		s.log.LogAttrs(c.ctx, slog.LevelWarn, "client without SPIFFE validator asked for all bundles: own bundle alone sent", s.attrs(c.ctx,
			slog.Uint64("stream", c.id))...)
	}
}

// tellLate says once per stream that the client waits.
func (c *call) tellLate(names string) {
	c.mu.Lock()
	once := !c.toldLate
	c.toldLate = true
	c.mu.Unlock()
	if once {
		c.server.log.LogAttrs(c.ctx, slog.LevelInfo, "secret is late, stream stays open", c.server.attrs(c.ctx,
			slog.Uint64("stream", c.id), slog.String("names", names))...)
	}
}

// shorten makes client-chosen names fit for a log line.
func shorten(names []string) []string {
	out := make([]string, 0, min(len(names), 8))
	for _, name := range names[:min(len(names), 8)] {
		out = append(out, clip(name, 128))
	}
	return out
}

func (c *call) status(out *StreamStatus) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.machine.state(out)
	out.ID, out.Peer, out.Kind, out.OpenedAt = c.id, c.peer, c.kind, c.opened
	out.SentAt, out.LateSince = c.sentAt, c.lateAt
	out.AckedAt, out.AckedNonce = c.ackedAt, c.acked
	out.NackedAt, out.NackedNonce, out.NackText = c.nackedAt, c.nacked, c.nackText
}
