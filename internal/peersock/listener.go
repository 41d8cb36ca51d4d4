package peersock

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/procfs"
)

// Listener is a net.Listener whose connections are *Conn. Its goroutines start
// with the first Accept: one accepts, one watches all callers, and up to
// BindParallel bind while there is something to bind. Safe for concurrent use.
type Listener struct {
	cfg     Config
	l       *net.UnixListener
	mode    string
	proc    *procfs.FS
	reaper  *reaper
	gate    gate
	log     *slog.Logger
	metrics *Metrics

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	start  sync.Once
	wait   sync.WaitGroup // the accept loop
	ready  chan *Conn

	mu        sync.Mutex
	closed    bool
	drained   bool  // closed, and nothing is added any more
	fatal     error // why the accept loop ended by itself
	lastID    uint64
	conns     map[uint64]*Conn
	perUID    map[uint32]int
	perKey    map[string]int
	queue     []*Conn // waiting for a binder
	binders   int
	deadlines []*deadline         // of binders that have ended
	settling  map[string]int      // Settle calls running, by key
	unsettle  map[string][]settle // waiting for one of those
}

var _ net.Listener = (*Listener)(nil)

// New makes a Listener of l, which it owns from then on. It fails if the
// kernel cannot tell how to identify peers.
func New(l *net.UnixListener, cfg Config) (*Listener, error) {
	cfg = cfg.withDefaults()
	mode, err := cfg.sys.probe()
	if err != nil {
		return nil, fmt.Errorf("peersock: %w", err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
		const others = 512 // files, sockets and /proc besides connections
		if fit := max(int(min(limit.Cur, 1<<30))-others, 64) / 2; fit < cfg.MaxConns {
			cfg.Logger.Warn("fewer connections than configured: the limit of open files is too low",
				slog.Int("configured", cfg.MaxConns), slog.Int("used", fit), slog.Uint64("rlimit_nofile", limit.Cur))
			cfg.MaxConns = fit
		}
	}
	r, err := newReaper()
	if err != nil {
		return nil, fmt.Errorf("peersock: %w", err)
	}
	p := &Listener{
		cfg:      cfg,
		l:        l,
		mode:     mode,
		proc:     procfs.New(cfg.Proc),
		reaper:   r,
		log:      cfg.Logger,
		metrics:  cfg.Metrics,
		ready:    make(chan *Conn, 64),
		conns:    make(map[uint64]*Conn),
		perUID:   make(map[uint32]int),
		perKey:   make(map[string]int),
		settling: make(map[string]int),
		unsettle: make(map[string][]settle),
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.metrics.mode.WithLabelValues(mode).Set(1)
	if mode == ModeFallback {
		p.log.Warn("this kernel has no SO_PEERPIDFD (Linux 6.5): callers are identified by process number, "+
			"which can be given to another process before their connection is accepted", slog.String("mode", mode))
	} else {
		p.log.Info("callers are identified by pidfd", slog.String("mode", mode))
	}
	return p, nil
}

// Listen listens on path and makes a Listener of that.
func Listen(path string, cfg Config) (*Listener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	p, err := New(l, cfg)
	if err != nil {
		l.Close()
		return nil, err
	}
	return p, nil
}

// Mode says how peers are identified: ModePidfd or ModeFallback.
func (l *Listener) Mode() string { return l.mode }

// Addr is the address of the socket.
func (l *Listener) Addr() net.Addr { return l.l.Addr() }

// Len is the number of open connections, those being bound included.
func (l *Listener) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.conns)
}

// Connections are the peers of all open connections, those being bound
// included, oldest first.
func (l *Listener) Connections() []*Peer {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]*Peer, 0, len(l.conns))
	for _, id := range slices.Sorted(maps.Keys(l.conns)) {
		out = append(out, &l.conns[id].peer)
	}
	return out
}

// Accept returns the next connection, a *Conn, that is identified, bound and
// within the limits. It returns net.ErrClosed after Close.
func (l *Listener) Accept() (net.Conn, error) {
	l.start.Do(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.closed {
			return
		}
		l.wait.Go(l.acceptLoop)
		go l.reaper.run(l.callerEnded)
	})
	for {
		select {
		case c := <-l.ready:
			l.mu.Lock()
			closed := l.closed
			l.mu.Unlock()
			c.peer.mu.Lock()
			open := c.peer.state == stateOpen && !closed
			c.peer.handed = open
			c.peer.mu.Unlock()
			if open {
				l.metrics.accepted.Inc()
				return c, nil
			}
			if closed {
				c.Close()
			}
		case <-l.ctx.Done():
			l.mu.Lock()
			err := l.fatal
			l.mu.Unlock()
			if err == nil {
				err = net.ErrClosed
			}
			return nil, &net.OpError{Op: "accept", Net: "unix", Addr: l.Addr(), Err: err}
		}
	}
}

// Close stops accepting and closes the connections that Accept has not
// returned. The others stay open, and watched, until they are closed.
func (l *Listener) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return net.ErrClosed
	}
	l.closed = true
	l.mu.Unlock()
	l.cancel()
	err := l.l.Close()
	l.wait.Wait()
	l.mu.Lock()
	var left []*Conn
	for _, c := range l.conns {
		left = append(left, c)
	}
	l.queue = nil
	l.mu.Unlock()
	for _, c := range left {
		c.peer.mu.Lock()
		handed := c.peer.handed
		c.peer.mu.Unlock()
		if !handed {
			c.Close()
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drained = true
	l.finishLocked()
	return err
}

// finishLocked ends the watch on callers with the last connection.
func (l *Listener) finishLocked() {
	if l.drained && len(l.conns) == 0 {
		l.reaper.close()
	}
}

func (l *Listener) acceptLoop() {
	for {
		conn, err := l.l.AcceptUnix()
		if err == nil {
			l.admit(conn)
			continue
		}
		if l.ctx.Err() != nil {
			return
		}
		if !passing(err) {
			l.mu.Lock()
			l.fatal = err
			l.mu.Unlock()
			l.cancel()
			return
		}
		l.warnRefused("accept", "accept(2) fails, trying on", slog.Any("error", err))
		pause := time.NewTimer(20 * time.Millisecond)
		select {
		case <-pause.C:
		case <-l.ctx.Done():
			pause.Stop()
		}
	}
}

// passing says whether accept(2) may succeed later.
func passing(err error) bool {
	for _, e := range []error{unix.ECONNABORTED, unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EINTR, unix.EAGAIN} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// admit identifies a connection, counts it and has it bound.
func (l *Listener) admit(conn *net.UnixConn) {
	l.mu.Lock()
	full := len(l.conns) >= l.cfg.MaxConns
	l.mu.Unlock()
	if full {
		l.refuse(conn, reasonGlobal, reasonGlobal, "too many connections", slog.Int("limit", l.cfg.MaxConns))
		return
	}
	cred, pidfd, err := l.identify(conn)
	if err != nil {
		reason := reasonUnknown
		if r := (*refusal)(nil); errors.As(err, &r) {
			reason = r.reason
		}
		l.refuse(conn, reason, reason, "the caller cannot be identified",
			slog.Int("pid", int(cred.Pid)), slog.Uint64("uid", uint64(cred.Uid)), slog.Any("error", err))
		return
	}
	c := &Conn{Conn: conn}
	c.peer = Peer{
		l: l, conn: c, since: time.Now().UnixNano(),
		pid: cred.Pid, uid: cred.Uid, gid: cred.Gid, pidfd: int32(pidfd),
		pending: true, err: ErrBindTimeout,
	}
	l.mu.Lock()
	if l.perUID[cred.Uid] >= l.cfg.MaxConnsPerUID {
		l.mu.Unlock()
		unix.Close(pidfd)
		l.refuse(conn, reasonUID, reasonUID+strconv.FormatUint(uint64(cred.Uid), 10),
			"too many connections of one user", slog.Uint64("uid", uint64(cred.Uid)), slog.Int("limit", l.cfg.MaxConnsPerUID))
		return
	}
	l.perUID[cred.Uid]++
	l.lastID++
	c.peer.id = l.lastID
	l.conns[c.peer.id] = c
	l.mu.Unlock()
	l.metrics.open.Inc()
	if err := l.reaper.add(pidfd, c.peer.id); err != nil {
		l.metrics.refused.WithLabelValues(reasonUnknown).Inc()
		l.warnRefused("epoll", "the caller cannot be watched", slog.Any("error", err))
		c.Close()
		return
	}
	l.enqueue(c)
}

func (l *Listener) refuse(conn net.Conn, reason, key, why string, attrs ...slog.Attr) {
	l.metrics.refused.WithLabelValues(reason).Inc()
	conn.Close() // after it is counted: the caller may look
	l.warnRefused(key, why, append(attrs, slog.String("reason", reason))...)
}

// warnRefused logs at most once per second and key.
func (l *Listener) warnRefused(key, why string, attrs ...slog.Attr) {
	n, ok := l.gate.open(key, time.Now())
	if !ok {
		return
	}
	attrs = append(attrs, slog.String("why", why), slog.Int("suppressed", n))
	l.log.LogAttrs(l.ctx, slog.LevelWarn, "connection refused", attrs...)
}

// callerEnded closes the connection of a process that has ended.
func (l *Listener) callerEnded(id uint64) {
	l.mu.Lock()
	c := l.conns[id]
	l.mu.Unlock()
	if c == nil {
		return
	}
	if c.Close() == nil {
		l.metrics.died.Inc()
		l.log.Debug("connection closed: its caller has ended",
			slog.Int("pid", int(c.peer.pid)), slog.Uint64("uid", uint64(c.peer.uid)), slog.Uint64("connection", id))
	}
}

// forget takes a closed connection out of all counts.
func (l *Listener) forget(p *Peer) {
	p.mu.Lock()
	key := p.key
	p.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, p.id)
	if l.perUID[p.uid]--; l.perUID[p.uid] <= 0 {
		delete(l.perUID, p.uid)
	}
	l.uncountLocked(key)
	l.metrics.open.Dec()
	l.finishLocked()
}

func (l *Listener) uncountLocked(key string) {
	if key == "" {
		return
	}
	if l.perKey[key]--; l.perKey[key] <= 0 {
		delete(l.perKey, key)
	}
}
