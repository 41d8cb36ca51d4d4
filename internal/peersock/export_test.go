package peersock

import (
	"time"

	"golang.org/x/sys/unix"
)

// Kernel are answers of the kernel that a test forges; nil: the kernel's own.
type Kernel struct {
	Peercred func(fd int) (*unix.Ucred, error)
	Peerpid  func(fd int) (int, error)
	Open     func(pid int) (int, error)
}

// WithKernel is c on a forged kernel.
func WithKernel(c Config, k Kernel) Config {
	c.sys = sys{peercred: k.Peercred, peerpid: k.Peerpid, open: k.Open}
	return c
}

// Gate is the limit on log messages.
type Gate struct{ g gate }

// Open says whether a message may be logged.
func (g *Gate) Open(key string, now time.Time) (int, bool) { return g.g.open(key, now) }

// Keys is how many keys are remembered.
func (g *Gate) Keys() int { return len(g.g.keys) }

// Related says whether two groups belong together.
var Related = related

// Counts are the numbers of connections, users and keys being counted.
func (l *Listener) Counts() (conns, users, keys int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.conns), len(l.perUID), len(l.perKey)
}
