package peersock

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// settleTimeout is how long Settle may go on after its caller has been told to
// try again: a large executable is worth hashing to the end.
const settleTimeout = time.Minute

// settler is a subject with work left that can take long.
type settler interface {
	Settled() bool
	Settle(ctx context.Context) error
}

// settle is a subject waiting for its turn, or its own turn.
type settle struct {
	c       *Conn
	subject attest.Subject
	s       settler
	key     string
}

// enqueue has the connection bound by one of at most BindParallel goroutines,
// which end when nothing is left to bind.
func (l *Listener) enqueue(c *Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return // Close closes it
	}
	l.queue = append(l.queue, c)
	if l.binders < l.cfg.BindParallel {
		l.binders++
		go l.binder()
	}
}

func (l *Listener) binder() {
	late := l.deadline()
	for {
		l.mu.Lock()
		if len(l.queue) == 0 {
			l.binders--
			l.queue = nil
			l.deadlines = append(l.deadlines, late)
			l.mu.Unlock()
			return
		}
		c := l.queue[0]
		l.queue[0] = nil
		l.queue = l.queue[1:]
		l.mu.Unlock()
		l.bind(c, late)
	}
}

// deadline is one that no binder uses.
func (l *Listener) deadline() *deadline {
	l.mu.Lock()
	defer l.mu.Unlock()
	if last := len(l.deadlines) - 1; last >= 0 {
		d := l.deadlines[last]
		l.deadlines = l.deadlines[:last]
		return d
	}
	return &deadline{l: l}
}

// bind binds one caller, checks its key's limit and settles it. The answer is
// delivered after BindTimeout at the latest, whatever Bind does.
func (l *Listener) bind(c *Conn, late *deadline) {
	ctx, cancel := context.WithCancel(l.ctx)
	defer cancel()
	late.start(c, cancel)
	defer late.stop()
	subject, err := l.callBind(ctx, c.peer.Caller())
	if err != nil {
		if ctx.Err() != nil && !errors.Is(err, attest.ErrDenied) {
			err = fmt.Errorf("%w: %w", ErrBindTimeout, err)
		}
		if _, ok := l.count(c, nil); ok {
			l.deliver(c, nil, err)
		}
		return
	}
	key, ok := l.count(c, subject)
	if !ok {
		closeSubject(subject)
		return
	}
	s, ok := subject.(settler)
	if !ok || s.Settled() {
		l.deliver(c, subject, nil)
		return
	}
	time.AfterFunc(l.cfg.BindTimeout, func() { l.expire(c) })
	l.enqueueSettle(settle{c: c, subject: subject, s: s, key: key})
}

func (l *Listener) callBind(ctx context.Context, c attest.Caller) (subject attest.Subject, err error) {
	defer func() { err = l.recovered(recover(), c.PID, err) }()
	subject, err = l.cfg.Bind(ctx, c)
	if err == nil && subject == nil {
		err = ErrNoSubject
	}
	return subject, err
}

// count counts the connection under its subject's key, or closes it if that
// has as many as it may. Callers without a subject are counted by their user,
// so that a failing Bind opens no way around the limit; those outside pods
// have been, at accept.
func (l *Listener) count(c *Conn, subject attest.Subject) (key string, ok bool) {
	p := &c.peer
	limit := l.cfg.MaxConnsPerKey
	if subject == nil {
		key = "unbound:" + strconv.FormatUint(uint64(p.uid), 10)
	} else {
		key = subject.LimitKey()
		if s, ok := subject.(interface{ InPod() bool }); ok && !s.InPod() {
			limit = l.cfg.MaxConnsPerUID
		}
	}
	p.mu.Lock()
	if p.state != stateOpen {
		p.mu.Unlock()
		return key, false
	}
	l.mu.Lock()
	over := false
	if p.key != key {
		l.uncountLocked(p.key)
		p.key = ""
		if over = l.perKey[key] >= limit; !over {
			l.perKey[key]++
			p.key = key
		}
	}
	l.mu.Unlock()
	p.mu.Unlock()
	if over {
		l.metrics.refused.WithLabelValues(reasonKey).Inc()
		l.warnRefused("key:"+key, "too many connections of one pod",
			slog.String("key", key), slog.Int("pid", int(p.pid)), slog.Int("limit", limit))
		c.Close()
	}
	return key, !over
}

// enqueueSettle runs Settle on a goroutine of its own, at most
// DefaultSettlePerKey at once for one key: a file system that never answers
// holds up nobody but the pod that brought it.
func (l *Listener) enqueueSettle(w settle) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.settling[w.key] >= DefaultSettlePerKey {
		l.unsettle[w.key] = append(l.unsettle[w.key], w)
		return
	}
	l.settling[w.key]++
	go l.settle(w)
}

func (l *Listener) settle(w settle) {
	for {
		err := l.callSettle(w)
		if err != nil {
			closeSubject(w.subject)
			l.deliver(w.c, nil, err)
		} else {
			l.deliver(w.c, w.subject, nil)
		}
		l.mu.Lock()
		waiting := l.unsettle[w.key]
		if len(waiting) == 0 {
			if l.settling[w.key]--; l.settling[w.key] == 0 {
				delete(l.settling, w.key)
				delete(l.unsettle, w.key)
			}
			l.mu.Unlock()
			return
		}
		w, l.unsettle[w.key] = waiting[0], waiting[1:]
		l.mu.Unlock()
	}
}

func (l *Listener) callSettle(w settle) (err error) {
	ctx, cancel := context.WithTimeout(l.ctx, settleTimeout)
	defer cancel()
	defer func() { err = l.recovered(recover(), w.c.peer.pid, err) }()
	return w.s.Settle(ctx)
}

// recovered turns a panic into a denial.
func (l *Listener) recovered(r any, pid int32, err error) error {
	if r == nil {
		return err
	}
	l.log.Error("binding a caller panicked",
		slog.Int("pid", int(pid)), slog.String("panic", fmt.Sprint(r)), slog.String("stack", string(debug.Stack())))
	return fmt.Errorf("%w: binding the caller failed inside the agent, see its log", attest.ErrDenied)
}

// expire answers for a Bind or Settle that takes too long. Its own answer may
// still come, and counts then.
func (l *Listener) expire(c *Conn) { l.answer(c, nil, ErrBindTimeout, true) }

// deliver gives the connection its answer.
func (l *Listener) deliver(c *Conn, subject attest.Subject, err error) {
	l.answer(c, subject, err, false)
}

// answer gives the connection an answer, the first time to Accept too.
// pending says that another one will come.
func (l *Listener) answer(c *Conn, subject attest.Subject, err error, pending bool) {
	p := &c.peer
	p.mu.Lock()
	if p.state != stateOpen || p.subject != nil || pending && !p.pending {
		p.mu.Unlock()
		if subject != nil {
			closeSubject(subject)
		}
		return
	}
	first := p.failed == 0
	p.subject, p.err, p.pending = subject, err, pending
	if err != nil {
		p.failed = time.Now().UnixNano()
	}
	p.mu.Unlock()
	switch {
	case err == nil:
		l.metrics.bindTime.Observe(float64(time.Now().UnixNano()-p.since) / 1e9)
	case errors.Is(err, attest.ErrDenied):
		l.failed(c, reasonBindDenied, err)
	case errors.Is(err, ErrBindTimeout):
		l.failed(c, reasonBindLate, err)
	case !errors.Is(err, ErrNoSubject):
		l.failed(c, reasonBindError, err)
	}
	if !first {
		return
	}
	select {
	case l.ready <- c:
	case <-l.ctx.Done():
		c.Close()
	}
}

func (l *Listener) failed(c *Conn, reason string, err error) {
	l.metrics.binds.WithLabelValues(reason).Inc()
	if n, ok := l.gate.open("bind:"+reason+strconv.FormatUint(uint64(c.peer.uid), 10), time.Now()); ok {
		l.log.Warn("caller could not be bound", slog.String("reason", reason), slog.Int("pid", int(c.peer.pid)),
			slog.Uint64("uid", uint64(c.peer.uid)), slog.Any("error", err), slog.Int("suppressed", n))
	}
}
