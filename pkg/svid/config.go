package svid

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Config is what a Manager is built from. The zero value of a field means what
// its comment says.
type Config struct {
	// Authority signs and knows the bundles. Required.
	Authority authority.Authority
	// Entries is the source of registration entries. Required.
	Entries Entries
	// KeyType of X.509-SVIDs: ec-p256 (also if empty), ec-p384 or rsa-2048.
	KeyType string
	// Order and DefaultHint decide which of a caller's identities comes first.
	Order       entry.Order
	DefaultHint string
	// StateDir is an owner-only directory on tmpfs for what a restarted agent
	// needs to serve before the authority answers. Empty = nothing is kept.
	StateDir string
	// StateOf is the authority that the identities in StateDir are from, in one
	// line: those of another are erased. "" = whatever is there is loaded.
	StateOf string

	// MaxParked is how many callers of one pod (Subject.LimitKey) may be
	// parked at a time. 0 = 64.
	MaxParked int
	// AvailabilityTarget is how long an X.509-SVID should still be valid
	// whenever the authority goes away: it is renewed when that much of its life
	// is left, if its life is longer by half a day at least. 0 = SVIDs are
	// renewed at half of their life.
	AvailabilityTarget time.Duration
	// MaxIdle is how many SVIDs are held for pods that have not called yet, or
	// have left; those in use are always kept. 0 = 1000.
	MaxIdle int
	// MaxJWT is how many JWT-SVIDs are kept for reuse. 0 = 1000.
	MaxJWT int
	// Workers is how many certificates are requested at a time. 0 = 8. A
	// quarter of them is kept free of renewals.
	Workers int
	// SignTimeout bounds one request to the authority. 0 = 30 s.
	SignTimeout time.Duration
	// JWTTimeout bounds the wait for a JWT-SVID that is not in the cache.
	// 0 = 5 s.
	JWTTimeout time.Duration
	// WarmFor is how long after Warm an entry that appears late is still
	// signed in advance. 0 = 2 min.
	WarmFor time.Duration

	// OnLate is told once of each caller that has been parked for LateAfter.
	// It must not block. nil = nobody is told.
	OnLate func(s attest.Subject, what string, since time.Time)
	// OnAmbiguous is told when a caller is handed a default identity that only
	// its entry's age put before another of a different SPIFFE ID. It must not
	// block. nil = nobody is told.
	OnAmbiguous func(s attest.Subject, chosen, other *entry.Entry)
	// OnPark is told whenever a caller begins to wait, so that an authority that
	// is polled can be asked at once. It must not block. nil = nobody is told.
	OnPark func()
	// LateAfter: 0 = 10 s.
	LateAfter time.Duration

	// Logger: nil = discard.
	Logger *slog.Logger
	// Audit receives one record per decision to hand out an identity. nil =
	// Logger.
	Audit *slog.Logger
	// Metrics: nil = unregistered ones.
	Metrics *Metrics

	// anyFilesystem lets tests keep restart state outside tmpfs.
	anyFilesystem bool
}

// Intervals that nobody has needed to configure.
const (
	// retryMin and retryMax bound the pause after a failed request.
	retryMin = 250 * time.Millisecond
	retryMax = 30 * time.Second
	// firstHold is how long the first picture of a caller with several entries
	// waits for all their SVIDs.
	firstHold = time.Second
	// linger is how long a subject without subscriptions keeps its match after
	// Snapshot or JWT has ended.
	linger = time.Second
	// clockCheck is the longest sleep of the timer loop, so that a wall clock
	// that jumped is noticed. The heap is looked at, nothing is scanned.
	clockCheck = 30 * time.Second
	// clockSlack is how far wall and monotonic clock may part before it counts
	// as a jump.
	clockSlack = 2 * time.Second
	// maxDelta is the number of changed entries up to which each is tested
	// against each view; beyond it, matching anew by index is cheaper.
	maxDelta = 64
	// maxWarm bounds the selector sets remembered by Warm.
	maxWarm = 1024
)

func (c Config) withDefaults() (Config, error) {
	if c.Authority == nil {
		return c, errors.New("svid: Config.Authority is missing")
	}
	if c.Entries == nil {
		return c, errors.New("svid: Config.Entries is missing")
	}
	if c.KeyType == "" {
		c.KeyType = KeyECP256
	}
	switch c.KeyType {
	case KeyECP256, KeyECP384, KeyRSA2048:
	default:
		return c, fmt.Errorf("svid: key type %q is unknown; use %s, %s or %s", c.KeyType, KeyECP256, KeyECP384, KeyRSA2048)
	}
	for _, n := range []struct {
		value *int
		def   int
		name  string
	}{
		{&c.MaxParked, 64, "MaxParked"},
		{&c.MaxIdle, 1000, "MaxIdle"},
		{&c.MaxJWT, 1000, "MaxJWT"},
		{&c.Workers, 8, "Workers"},
	} {
		if *n.value < 0 {
			return c, fmt.Errorf("svid: Config.%s is %d; use a positive number, or 0 for %d", n.name, *n.value, n.def)
		}
		if *n.value == 0 {
			*n.value = n.def
		}
	}
	for _, d := range []struct {
		value *time.Duration
		def   time.Duration
		name  string
	}{
		{&c.SignTimeout, 30 * time.Second, "SignTimeout"},
		{&c.JWTTimeout, 5 * time.Second, "JWTTimeout"},
		{&c.WarmFor, 2 * time.Minute, "WarmFor"},
		{&c.LateAfter, 10 * time.Second, "LateAfter"},
		{&c.AvailabilityTarget, 0, "AvailabilityTarget"},
	} {
		if *d.value < 0 {
			return c, fmt.Errorf("svid: Config.%s is %s; use a positive time, or 0 for %s", d.name, *d.value, d.def)
		}
		if *d.value == 0 {
			*d.value = d.def
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Audit == nil {
		c.Audit = c.Logger
	}
	if c.Metrics == nil {
		c.Metrics = NewMetrics(nil)
	}
	return c, nil
}
