package peersock

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// Limits that Config's zero values stand for.
const (
	DefaultMaxConns       = 16384
	DefaultMaxConnsPerUID = 8192
	DefaultMaxConnsPerKey = 256
	DefaultBindTimeout    = 5 * time.Second
	DefaultBindParallel   = 16
	DefaultSettlePerKey   = 2
)

// Config is what New needs. The zero value works; its subjects are
// ErrNoSubject.
type Config struct {
	// Bind turns a caller into a subject before Accept returns its connection.
	// It runs outside the accept loop, up to BindParallel times at once. If the
	// subject has a Settle(context.Context) error method, that is called after
	// the limit of its key has been checked, for work that takes long; a
	// subject with a Close() method is closed with its connection; one with an
	// Err() error method can be denied later; one with InPod() bool that
	// answers false is limited by its user alone.
	Bind func(context.Context, attest.Caller) (attest.Subject, error)
	// BindTimeout is how long Bind and Settle may take, each, before the caller
	// is answered ErrBindTimeout. A Settle that succeeds later still counts.
	BindTimeout time.Duration
	// BindParallel is how many callers are bound at once.
	BindParallel int
	// MaxConns is the most connections at once; it is lowered to what the
	// process's limit of descriptors allows (two per connection).
	MaxConns int
	// MaxConnsPerUID is the most connections of one user, counted at accept.
	MaxConnsPerUID int
	// MaxConnsPerKey is the most connections of one Subject.LimitKey (pod),
	// counted right after Bind. Callers whose Bind failed are counted per user.
	MaxConnsPerKey int
	// Logger receives refusals, at most one per second and key; nil: nothing is
	// logged.
	Logger *slog.Logger
	// Metrics counts; nil: nothing is counted.
	Metrics *Metrics
	// Proc is the mount point of proc, for the fallback; "" is /proc.
	Proc string

	sys sys
}

// sys is the kernel, as far as tests must be able to change its answers.
type sys struct {
	peercred func(fd int) (*unix.Ucred, error)
	peerpid  func(fd int) (int, error) // SO_PEERPIDFD
	open     func(pid int) (int, error)
}

func (c Config) withDefaults() Config {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&c.BindParallel, DefaultBindParallel)
	def(&c.MaxConns, DefaultMaxConns)
	def(&c.MaxConnsPerUID, DefaultMaxConnsPerUID)
	def(&c.MaxConnsPerKey, DefaultMaxConnsPerKey)
	if c.BindTimeout <= 0 {
		c.BindTimeout = DefaultBindTimeout
	}
	if c.Bind == nil {
		c.Bind = func(context.Context, attest.Caller) (attest.Subject, error) { return nil, ErrNoSubject }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = NewMetrics(nil)
	}
	if c.sys.peercred == nil {
		c.sys.peercred = func(fd int) (*unix.Ucred, error) {
			return unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		}
	}
	if c.sys.peerpid == nil {
		c.sys.peerpid = func(fd int) (int, error) {
			return unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		}
	}
	if c.sys.open == nil {
		c.sys.open = func(pid int) (int, error) { return unix.PidfdOpen(pid, 0) }
	}
	return c
}

// Errors of Peer.Subject and Peer.Alive besides those of Config.Bind.
var (
	ErrNoSubject   = errors.New("callers are not bound on this socket")
	ErrBindTimeout = errors.New("caller could not be bound in time, try again")
)

// The two ways of identifying a peer, see Listener.Mode.
const (
	ModePidfd    = "pidfd"    // SO_PEERPIDFD: the process that called connect(2)
	ModeFallback = "fallback" // pidfd_open of the number in SO_PEERCRED
)
