package sds

import (
	"errors"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// machine is a stream's protocol: stream or delta.
type machine interface {
	kind() string
	// read makes a request the event it is. It keeps nothing of b.
	read(b []byte) (event func(*svid.Update) action, err error)
	update(u *svid.Update) action
	state(out *StreamStatus)
	waiting() []string
	trusts() *trust
}

// call is one open stream. It is quiet for nearly all of its life, and then
// the stack of its handler is most of what it costs: one that has ever been
// deep stays twice as large. So the handler does nothing but wait for the
// client; what there is to do is done by a worker, a goroutine that lives as
// long as there are duties, never more than one at a time. A client that does
// not read blocks these two and nobody else.
type call struct {
	server  *Server
	stream  grpc.ServerStream
	machine machine
	id      uint64
	peer    uint64
	opened  int64 // this and other times are Unix nanoseconds, 0 = never

	duties atomic.Uint32
	sub    Subscription // the worker's; nil = not subscribed

	// in and err are the handler's until it calls the worker, and again from
	// the answer on.
	direct   direct // nil = read with RecvMsg
	header   [5]byte
	in       raw
	err      error
	answered sync.WaitGroup

	// mu guards the rest and is never held while sending.
	mu      sync.Mutex
	ended   chan struct{} // closed with end, if that is what the handler waits for
	end     error         // why we ended the stream
	lateAt  int64         // when it was parked; 0 = it is not
	sentAt  int64
	ackedAt int64
	acked   string
	nack    *rejection // the last one

	gotCert     bool
	gotRoots    bool
	toldUnknown bool
	toldLate    bool
}

// rejection is a client's NACK.
type rejection struct {
	at    int64
	nonce string
	text  string
}

const (
	working   uint32 = 1 << iota // there is a worker
	dutyOpen                     // subscribe
	dutyAsk                      // a request came
	dutyLook                     // the picture may have changed
	dutyClose                    // the client has gone, or will have to
)

// waiting are the names the client waits for.
func (c *core) waiting() []string { return c.late() }

func handleStream(srv any, ss grpc.ServerStream) error { return srv.(*Server).serve(ss, newStream) }

func handleDelta(srv any, ss grpc.ServerStream) error { return srv.(*Server).serve(ss, newDelta) }

func (s *Server) serve(ss grpc.ServerStream, protocol func(*resolver) machine) (err error) {
	c, err := s.begin(ss, protocol)
	if c == nil {
		return err
	}
	defer c.rescue(&err)
	for c.take(c.receive()) {
	}
	return c.finish()
}

// begin opens a stream; without a call, it is over already.
//
//go:noinline
func (s *Server) begin(ss grpc.ServerStream, protocol func(*resolver) machine) (_ *call, err error) {
	defer s.contain(ss.Context(), &err)
	m := protocol(s.resolve)
	c := &call{server: s, stream: ss, id: s.ids.Add(1), opened: time.Now().UnixNano(), machine: m}
	s.metrics.streams.WithLabelValues(m.kind()).Inc()
	transport, single := transportOf(ss)
	if !single {
		return nil, c.serveApart()
	}
	c.direct = directly(transport)
	if !c.call(dutyOpen) {
		return nil, c.finish()
	}
	return c, nil
}

// statusWriter is gRPC's own stream, which can be ended while its handler
// waits in RecvMsg. It is no part of gRPC's interface, so without it a second
// goroutine does the waiting.
type statusWriter interface {
	WriteStatus(st *status.Status) error
}

func transportOf(ss grpc.ServerStream) (statusWriter, bool) {
	w, ok := grpc.ServerTransportStreamFromContext(ss.Context()).(statusWriter)
	return w, ok
}

func (c *call) serveApart() error {
	c.ended = make(chan struct{})
	quit := make(chan struct{})
	if !c.call(dutyOpen) {
		return c.finish()
	}
	defer close(quit)
	got, next := make(chan error), make(chan struct{})
	go func() {
		for {
			err := c.contained(c.receive)
			select {
			case got <- err:
			case <-quit:
				return
			}
			select {
			case <-next:
			case <-quit:
				return
			}
		}
	}()
	for {
		select {
		case err := <-got:
			if !c.take(err) {
				return c.finish()
			}
			next <- struct{}{}
		case <-c.ended:
			return c.finish()
		}
	}
}

// take has a received request acted on. It is false at the end.
//
//go:noinline
func (c *call) take(err error) bool {
	if err != nil {
		c.err = err
		return false
	}
	return c.call(dutyAsk)
}

// call has the worker do something and waits for its answer.
func (c *call) call(duty uint32) bool {
	c.err = nil
	c.answered.Add(1)
	c.due(duty)
	c.answered.Wait()
	return c.err == nil
}

// rescue is finish for a handler that panics, which it can only in gRPC.
func (c *call) rescue(err *error) {
	if v := recover(); v != nil {
		c.err = c.server.panicked(c.stream.Context(), v)
		*err = c.finish()
	}
}

// finish closes the call and says how it ended.
//
//go:noinline
func (c *call) finish() (answer error) {
	s, ctx, err := c.server, c.stream.Context(), c.err
	c.call(dutyClose)
	c.mu.Lock()
	if c.end != nil {
		err = c.end
	}
	c.mu.Unlock()
	s.metrics.streams.WithLabelValues(c.machine.kind()).Dec()
	reason := reasonClient
	if err != nil && !errors.Is(err, io.EOF) {
		reason, answer = refusal(err)
	}
	s.metrics.ends.WithLabelValues(c.machine.kind(), reason).Inc()
	if reason != reasonClient {
		s.log.LogAttrs(ctx, slog.LevelInfo, "secret stream ended", s.attrs(ctx,
			slog.Uint64("stream", c.id), slog.String("reason", reason), slog.Any("error", err))...)
	}
	return answer
}

// kick has the picture looked at again. It does not block.
func (c *call) kick() { c.due(dutyLook) }

// due leaves a duty to the worker.
func (c *call) due(duty uint32) {
	if c.duties.Or(duty|working)&working == 0 {
		go c.work()
	}
}

func (c *call) work() {
	for {
		due := c.duties.And(working)
		if due&dutyOpen != 0 {
			c.answer(c.open)
		}
		if due&dutyAsk != 0 {
			c.answer(c.ask)
		}
		if due&dutyLook != 0 {
			if err := c.contained(c.look); err != nil {
				c.fail(err)
			}
		}
		if due&dutyClose != 0 {
			c.answer(c.close)
		}
		if c.duties.CompareAndSwap(working, 0) {
			return
		}
	}
}

func (c *call) answer(f func() error) {
	c.err = c.contained(f)
	c.answered.Done()
}

func (c *call) contained(f func() error) (err error) {
	defer c.server.contain(c.stream.Context(), &err)
	return f()
}

func (c *call) open() error {
	s, ctx := c.server, c.stream.Context()
	if s.config.PeerID != nil {
		c.peer = s.config.PeerID(ctx)
	}
	sub, err := s.config.Subscribe(ctx, c.kick)
	if err != nil {
		return inner{err}
	}
	c.sub = sub
	s.mu.Lock()
	s.open[c] = struct{}{}
	s.mu.Unlock()
	return nil
}

func (c *call) ask() error {
	if err := c.readBody(); err != nil {
		return err
	}
	buf := c.in.data.MaterializeToBuffer(mem.DefaultBufferPool())
	c.in.data.Free()
	c.in.data = nil
	event, err := c.machine.read(buf.ReadOnlyData())
	buf.Free()
	if err != nil {
		return err
	}
	return c.step(event)
}

func (c *call) look() error { return c.step(c.machine.update) }

// close ends the subscription; nothing is sent afterwards.
func (c *call) close() error {
	sub := c.sub
	if sub == nil {
		return nil
	}
	c.sub = nil
	s := c.server
	s.mu.Lock()
	delete(s.open, c)
	s.mu.Unlock()
	if c.parked() {
		c.park(0)
		s.metrics.parked.Dec()
		sub.Unpark()
	}
	sub.Close()
	return nil
}

// fail ends the stream from outside its handler.
func (c *call) fail(err error) {
	c.mu.Lock()
	first := c.end == nil
	if first {
		c.end = err
	}
	c.mu.Unlock()
	switch {
	case !first:
	case c.ended != nil:
		close(c.ended)
	default:
		if transport, ok := transportOf(c.stream); ok {
			_, answer := refusal(err)
			_ = transport.WriteStatus(status.Convert(answer)) // fails only if the stream is over
		}
	}
}

func (c *call) over() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.end
}

// step lets one event act on the newest picture and does what follows from it.
func (c *call) step(event func(*svid.Update) action) error {
	if err := c.over(); err != nil || c.sub == nil {
		return err
	}
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
			if gone := c.stream.Context().Err(); gone != nil {
				err = gone // the client has gone
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
		c.park(time.Now().UnixNano())
		c.server.metrics.parked.Inc()
	case wait < 0:
		c.park(0)
		c.server.metrics.parked.Dec()
		c.sub.Unpark()
	}
	return nil
}

func (c *call) park(at int64) {
	c.mu.Lock()
	c.lateAt = at
	c.mu.Unlock()
}

func (c *call) parked() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lateAt != 0
}

// fold runs the event. wait is 1 if the stream begins to wait for something
// late, -1 if it no longer does, 0 if nothing changes.
func (c *call) fold(event func(*svid.Update) action, u *svid.Update) (a action, wait int, late string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a = event(u)
	switch a.verdict {
	case acked:
		c.ackedAt, c.acked = time.Now().UnixNano(), a.about
	case nacked:
		c.nack = &rejection{at: time.Now().UnixNano(), nonce: a.about, text: a.rejects.message}
	}
	if a.end != nil {
		return a, 0, ""
	}
	names := c.machine.waiting()
	switch waits := len(names) > 0; {
	case waits && c.lateAt == 0:
		wait, late = 1, strings.Join(names[:min(len(names), 4)], " ")
	case !waits && c.lateAt != 0:
		wait = -1
	}
	return a, wait, clip(late, 512)
}

// sent records a response that has gone out.
func (c *call) sent(a action) {
	m := c.server.metrics
	m.responses.WithLabelValues(c.machine.kind(), a.cause).Inc()
	cert := slices.ContainsFunc(a.sent, func(r resource) bool { return r.identity() })
	roots := slices.ContainsFunc(a.sent, func(r resource) bool { return !r.identity() })
	c.mu.Lock()
	c.sentAt = time.Now().UnixNano()
	cert, roots = cert && !c.gotCert, roots && !c.gotRoots
	c.gotCert, c.gotRoots = c.gotCert || cert, c.gotRoots || roots
	c.mu.Unlock()
	if cert {
		m.observeFirst("identity", moment(c.opened))
	}
	if roots {
		m.observeFirst("bundle", moment(c.opened))
	}
}

// report logs and counts what an event brought to light.
func (c *call) report(a action) {
	s := c.server
	if a.verdict != noVerdict {
		s.metrics.verdicts.WithLabelValues(c.machine.kind(), a.verdict.String()).Inc()
	}
	if a.verdict == nacked {
		s.log.LogAttrs(c.stream.Context(), slog.LevelWarn, "client rejected secrets", s.attrs(c.stream.Context(),
			slog.Uint64("stream", c.id), slog.Int("code", int(a.rejects.code)), slog.String("text", a.rejects.message))...)
	}
	if len(a.unknown) > 0 {
		s.metrics.unknown.Add(float64(len(a.unknown)))
		c.mu.Lock()
		once := !c.toldUnknown
		c.toldUnknown = true
		c.mu.Unlock()
		if once {
			s.log.LogAttrs(c.stream.Context(), slog.LevelInfo, "unknown secret names ignored", s.attrs(c.stream.Context(),
				slog.Uint64("stream", c.id), slog.Int("count", len(a.unknown)), slog.Any("first", shorten(a.unknown)))...)
		}
	}
	if a.narrow {
		s.log.LogAttrs(c.stream.Context(), slog.LevelWarn, "client without SPIFFE validator asked for all bundles: own bundle alone sent", s.attrs(c.stream.Context(),
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
		c.server.log.LogAttrs(c.stream.Context(), slog.LevelInfo, "secret is late, stream stays open", c.server.attrs(c.stream.Context(),
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
	out.ID, out.Peer, out.Kind = c.id, c.peer, c.machine.kind()
	out.OpenedAt, out.SentAt, out.LateSince = moment(c.opened), moment(c.sentAt), moment(c.lateAt)
	out.AckedAt, out.AckedNonce = moment(c.ackedAt), c.acked
	if n := c.nack; n != nil {
		out.NackedAt, out.NackedNonce, out.NackText = moment(n.at), n.nonce, n.text
	}
}

func moment(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}
