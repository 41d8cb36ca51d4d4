package workloadapi

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// Subscription is one caller's standing interest in what it may have. Safe for
// concurrent use; *svid.Subscription is one.
type Subscription interface {
	// Update is the newest picture; never modified.
	Update() *svid.Update
	// Park says that the caller now waits for something late. The error wraps
	// svid.ErrOverLimit if too many of its kind wait already.
	Park(what string) error
	// Unpark takes Park back.
	Unpark()
	// Close ends the subscription; notify may still be running.
	Close()
}

// DefaultFetchWait is how long a late caller is held.
const DefaultFetchWait = 2 * time.Second

// Config says what a Server serves and to whom.
type Config struct {
	// Subscribe registers the caller in ctx. It does not block and being late
	// is no error. notify is called after Update may have changed; it does not
	// block. Errors wrapping attest.ErrDenied are refusals for good, those
	// wrapping svid.ErrOverLimit are limits, others are passing. Required.
	Subscribe func(ctx context.Context, notify func()) (Subscription, error)
	// JWT issues a token for an entry the caller in ctx matched. Errors as
	// Subscribe's, authority.ErrRefused and svid.ErrNotMatched. Required.
	JWT func(ctx context.Context, e *entry.Entry, audience []string) (token string, err error)
	// Snapshot is what the caller in ctx may have now; unary calls ask it first
	// and subscribe only if the caller is late. Errors as Subscribe's. nil =
	// unary calls subscribe at once.
	Snapshot func(ctx context.Context) (*svid.Update, error)
	// PeerID names the connection in ctx in StreamStatus; nil = always 0.
	PeerID func(ctx context.Context) uint64
	// LogAttrs are the facts about the caller in ctx for log lines; nil = none.
	LogAttrs func(ctx context.Context) []slog.Attr
	// FetchWait is how long a late caller is held, never past 80 % of its
	// deadline; 0 = DefaultFetchWait, negative = not at all.
	FetchWait time.Duration
	// AllowUnauthenticatedVerifiers gives callers without an identity the own
	// trust domain's bundles and lets them validate its tokens.
	AllowUnauthenticatedVerifiers bool
	// AllowedForeignJWTClaims are the claims of tokens of other trust domains
	// that ValidateJWTSVID passes on beside sub, exp and aud.
	AllowedForeignJWTClaims []string
	// Logger; nil = none.
	Logger *slog.Logger
	// Metrics; nil = unregistered ones.
	Metrics *Metrics
}

func (c Config) fetchWait() time.Duration {
	switch {
	case c.FetchWait == 0:
		return DefaultFetchWait
	case c.FetchWait < 0:
		return 0
	}
	return c.FetchWait
}

func (c Config) logger() *slog.Logger {
	if c.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return c.Logger
}

func (c Config) validate() error {
	if c.Subscribe == nil {
		return errors.New("config has no Subscribe")
	}
	if c.JWT == nil {
		return errors.New("config has no JWT")
	}
	return nil
}
