package svid

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Errors of JWT.
var (
	// ErrNotMatched: the caller may not have the entry's identity (any more).
	ErrNotMatched = errors.New("entry does not match the caller")
	// ErrNoAudience: a JWT-SVID needs at least one audience.
	ErrNoAudience = errors.New("audience is missing")
)

// JWTSVID is one issued token. Immutable.
type JWTSVID struct {
	ID        spiffeid.ID
	EntryID   string
	Hint      string
	Audience  []string // sorted, without repetitions
	Token     string   // secret until it expires
	KeyID     string   // empty if the token's header could not be read
	IssuedAt  time.Time
	ExpiresAt time.Time

	renewAt time.Time // drawn once
}

// JWT is a JWT-SVID of an entry that the caller matches, from the cache while
// it is younger than about half of its life. A valid older one is handed out
// if the authority does not answer soon. Each token handed out is audited.
//
// Errors wrap ErrNotMatched, ErrNoAudience, the authority's, or ctx's; without
// a valid token in the cache the wait is bounded by Config.JWTTimeout.
func (m *Manager) JWT(ctx context.Context, s attest.Subject, e *entry.Entry, audience []string) (*JWTSVID, error) {
	if s == nil || e == nil {
		return nil, errNoSubject
	}
	audience = slices.DeleteFunc(slices.Clone(audience), func(a string) bool { return a == "" })
	slices.Sort(audience)
	audience = slices.Compact(audience)
	if len(audience) == 0 {
		m.met.jwt.WithLabelValues("denied").Inc()
		return nil, fmt.Errorf("JWT-SVID for %s: %w", e.SPIFFEID, ErrNoAudience)
	}
	v := m.attach(s, nil)
	e, ok := m.matched(v, e)
	if !ok {
		m.met.jwt.WithLabelValues("denied").Inc()
		return nil, fmt.Errorf("JWT-SVID for %s: %w", e.SPIFFEID, ErrNotMatched)
	}
	token, outcome, err := m.jwts.get(ctx, e, audience)
	m.met.jwt.WithLabelValues(outcome).Inc()
	if err != nil {
		return nil, fmt.Errorf("JWT-SVID for %s: %w", e.SPIFFEID, err)
	}
	if _, ok := m.matched(v, e); !ok {
		return nil, fmt.Errorf("JWT-SVID for %s: %w: it was withdrawn meanwhile", e.SPIFFEID, ErrNotMatched)
	}
	m.recordJWT(ctx, s, token)
	return token, nil
}

// matched is the entry as it is now, not as the caller's Update had it, and
// whether the caller matches it; otherwise e itself and false.
func (m *Manager) matched(v *view, e *entry.Entry) (*entry.Entry, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range v.group.records {
		if r.entry.ID == e.ID && !r.gone {
			return r.entry, true
		}
	}
	return e, false
}

func (m *Manager) recordJWT(ctx context.Context, s attest.Subject, t *JWTSVID) {
	var caller []any
	for _, a := range s.LogAttrs() {
		caller = append(caller, a)
	}
	m.audit.LogAttrs(ctx, slog.LevelInfo, "JWT-SVID decision",
		slog.Group("caller", caller...),
		slog.String("entry_id", t.EntryID),
		slog.String("spiffe_id", t.ID.String()),
		slog.Any("audience", t.Audience),
		slog.String("key_id", t.KeyID),
		slog.Time("expires", t.ExpiresAt),
		slog.String("outcome", "granted"),
	)
}
