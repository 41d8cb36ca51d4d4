package svid

import (
	"container/list"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// staleWait is how long a caller waits for a fresh token while a valid one is
// there.
const staleWait = 250 * time.Millisecond

// jwtCache holds the tokens most recently used, and makes one request to the
// authority for all who want the same.
type jwtCache struct {
	m *Manager

	mu      sync.Mutex
	byKey   map[jwtKey]*list.Element // of *cachedJWT
	used    list.List                // most recent first
	flights map[jwtKey]*flight
	tainted map[string]bool // key IDs; immutable
}

// jwtKey names a token: an entry in one revision and sorted audiences.
type jwtKey struct {
	entry    string
	revision int64
	audience string
}

type cachedJWT struct {
	key     jwtKey
	svid    *JWTSVID
	freshTo time.Time // until then it is handed out without asking
}

// flight is one request under way; svid and err are set before done is closed.
type flight struct {
	done chan struct{}
	svid *JWTSVID
	err  error
}

func newJWTCache(m *Manager) *jwtCache {
	return &jwtCache{m: m, byKey: make(map[jwtKey]*list.Element), flights: make(map[jwtKey]*flight)}
}

// get is a token and how it was come by.
func (c *jwtCache) get(ctx context.Context, e *entry.Entry, audience []string) (*JWTSVID, string, error) {
	if e.JWTSVIDIncludeJTI {
		// Each token has its own ID and is for one use.
		ctx, cancel := context.WithTimeout(ctx, c.m.cfg.JWTTimeout)
		defer cancel()
		svid, err := c.sign(ctx, e, audience)
		if err != nil {
			return nil, outcomeOf(err), err
		}
		return svid, "signed", nil
	}
	key := jwtKey{entry: e.ID, revision: e.Revision, audience: strings.Join(audience, "\x00")}
	now := c.m.now()
	cached, fresh := c.lookup(key, now)
	if fresh {
		return cached, "cached", nil
	}
	wait := c.m.cfg.JWTTimeout
	if cached != nil {
		wait = min(staleWait, wait)
	}
	f := c.fly(ctx, key, e, audience)
	t := time.NewTimer(wait)
	defer t.Stop()
	var err error
	select {
	case <-f.done:
		if err = f.err; err == nil {
			return f.svid, "signed", nil
		}
	case <-t.C:
		err = fmt.Errorf("%w: no answer within %s", authority.ErrTryLater, wait)
	case <-ctx.Done():
		err = ctx.Err()
	}
	if cached != nil && !errors.Is(err, authority.ErrRefused) && ctx.Err() == nil && c.m.now().Before(cached.ExpiresAt) {
		return cached, "stale", nil
	}
	return nil, outcomeOf(err), err
}

// fly joins the request for a token, or starts it. The request outlives the
// caller that started it, so that others who wait do not fail with it.
func (c *jwtCache) fly(ctx context.Context, key jwtKey, e *entry.Entry, audience []string) *flight {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.flights[key]; f != nil {
		return f
	}
	f := &flight{done: make(chan struct{})}
	c.flights[key] = f
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.m.cfg.JWTTimeout)
	go func() {
		defer cancel()
		svid, err := c.sign(ctx, e, audience)
		c.mu.Lock()
		defer c.mu.Unlock()
		f.svid, f.err = svid, err
		if c.flights[key] == f {
			delete(c.flights, key)
			switch el := c.byKey[key]; {
			case err == nil:
				c.storeLocked(key, svid)
			case el == nil:
			case errors.Is(err, authority.ErrRefused):
				c.dropLocked(el)
			default:
				// Callers of an old token do not ask again and again.
				el.Value.(*cachedJWT).freshTo = c.m.now().Add(backoff(2))
			}
		}
		close(f.done)
	}()
	return f
}

// sign asks the authority and checks what comes back as far as the manager
// relies on it.
func (c *jwtCache) sign(ctx context.Context, e *entry.Entry, audience []string) (_ *JWTSVID, err error) {
	defer c.m.recovered(&err)
	issued, err := c.m.cfg.Authority.SignJWT(ctx, authority.JWTRequest{
		EntryID:    e.ID,
		SPIFFEID:   e.SPIFFEID,
		Audience:   audience,
		TTL:        e.JWTSVIDTTL,
		IncludeJTI: e.JWTSVIDIncludeJTI,
	})
	now := c.m.now()
	switch {
	case err != nil:
		return nil, err
	case issued == nil || issued.Token == "":
		return nil, errors.New("the authority returned no token")
	case !now.Before(issued.ExpiresAt):
		return nil, fmt.Errorf("the authority returned a token that expired at %s; compare the clocks", issued.ExpiresAt)
	}
	life := issued.ExpiresAt.Sub(issued.IssuedAt)
	if life <= 0 {
		life = issued.ExpiresAt.Sub(now)
	}
	return &JWTSVID{
		ID:        e.SPIFFEID,
		EntryID:   e.ID,
		Hint:      e.Hint,
		Audience:  audience,
		Token:     issued.Token,
		KeyID:     keyID(issued.Token),
		IssuedAt:  issued.IssuedAt,
		ExpiresAt: issued.ExpiresAt,
		renewAt:   issued.ExpiresAt.Add(-life*3/5 + jitter(life/5)),
	}, nil
}

// lookup is a cached token that is valid at now, and whether it will do
// without asking for a newer one.
func (c *jwtCache) lookup(key jwtKey, now time.Time) (svid *JWTSVID, fresh bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	el := c.byKey[key]
	if el == nil {
		return nil, false
	}
	cached := el.Value.(*cachedJWT)
	if !now.Before(cached.svid.ExpiresAt) {
		c.dropLocked(el)
		return nil, false
	}
	c.used.MoveToFront(el)
	return cached.svid, now.Before(cached.freshTo)
}

func (c *jwtCache) storeLocked(key jwtKey, svid *JWTSVID) {
	if c.tainted[svid.KeyID] {
		return
	}
	if el := c.byKey[key]; el != nil {
		c.dropLocked(el)
	}
	c.byKey[key] = c.used.PushFront(&cachedJWT{key: key, svid: svid, freshTo: svid.renewAt})
	if c.used.Len() > c.m.cfg.MaxJWT {
		c.dropLocked(c.used.Back())
	}
}

func (c *jwtCache) dropLocked(el *list.Element) {
	delete(c.byKey, el.Value.(*cachedJWT).key)
	c.used.Remove(el)
}

// forget drops the tokens of an entry, and what is under way for it.
func (c *jwtCache) forget(entryID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key := range c.flights {
		if key.entry == entryID {
			delete(c.flights, key)
		}
	}
	c.dropIfLocked(func(t *JWTSVID) bool { return t.EntryID == entryID })
}

// forgetAll empties the cache.
func (c *jwtCache) forgetAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropIfLocked(func(*JWTSVID) bool { return true })
}

// taint drops the tokens signed with tainted keys.
func (c *jwtCache) taint(keyIDs map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tainted = keyIDs
	c.dropIfLocked(func(t *JWTSVID) bool { return keyIDs[t.KeyID] })
}

func (c *jwtCache) dropIfLocked(drop func(*JWTSVID) bool) {
	for el := c.used.Front(); el != nil; {
		next := el.Next()
		if drop(el.Value.(*cachedJWT).svid) {
			c.dropLocked(el)
		}
		el = next
	}
}

// keyID reads the kid of a token's header, empty if it cannot.
func keyID(token string) string {
	head, _, _ := strings.Cut(token, ".")
	raw, err := base64.RawURLEncoding.DecodeString(head)
	if err != nil {
		return ""
	}
	var h struct {
		KeyID string `json:"kid"`
	}
	if json.Unmarshal(raw, &h) != nil {
		return ""
	}
	return h.KeyID
}
