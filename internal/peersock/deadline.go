package peersock

import (
	"context"
	"sync"
	"time"
)

// deadline ends what one binder does for a connection. Binders use it again
// and again: a stopped timer may stay in the runtime's heap until it would have
// gone off, and one per connection would keep that much of each connection.
type deadline struct {
	l     *Listener
	timer *time.Timer

	mu     sync.Mutex
	conn   *Conn // nil = nothing to end
	cancel context.CancelFunc
	at     time.Time
}

func (d *deadline) start(c *Conn, cancel context.CancelFunc) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conn, d.cancel, d.at = c, cancel, time.Now().Add(d.l.cfg.BindTimeout)
	if d.timer == nil {
		d.timer = time.AfterFunc(d.l.cfg.BindTimeout, d.ring)
	} else {
		d.timer.Reset(d.l.cfg.BindTimeout)
	}
}

func (d *deadline) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.timer.Stop()
	d.conn, d.cancel = nil, nil
}

// ring may still be on its way when the next connection's turn has come, hence
// the look at the time.
func (d *deadline) ring() {
	d.mu.Lock()
	c, cancel := d.conn, d.cancel
	early := time.Now().Before(d.at)
	d.mu.Unlock()
	if c == nil || early {
		return
	}
	cancel()
	d.l.expire(c)
}
