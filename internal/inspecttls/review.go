package inspecttls

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
)

// ErrUnknownToken is wrapped by a Reviewer's error if the token is nobody's,
// or not for this audience.
var ErrUnknownToken = errors.New("the token is not known to the API server, has expired, or is for another audience")

// errBusy is the answer when more reviews are due than may be asked for.
var errBusy = errors.New("too many callers have to be looked up; try again in a second")

// User is who the API server says a token belongs to.
type User struct {
	Name   string
	UID    string
	Groups []string
	Extra  map[string][]string
}

// Access is what a caller wants, in the terms of RBAC.
type Access struct {
	Verb, Group, Resource, Subresource, Namespace, Name string
}

func (a Access) String() string {
	s := fmt.Sprintf("%s %s/%s.%s %q", a.Verb, a.Resource, a.Subresource, a.Group, a.Name)
	if a.Namespace != "" {
		s += " in namespace " + a.Namespace
	}
	return s
}

// Reviewer asks the API server. Safe for concurrent use.
type Reviewer interface {
	// Token says whose token it is. The error wraps ErrUnknownToken if it is
	// nobody's; any other error means that it could not be found out.
	Token(ctx context.Context, token, audience string) (User, error)
	// Access says whether the user may.
	Access(ctx context.Context, user User, access Access) (bool, error)
}

// The kept results. They are few: a record is the hash of a token and an
// answer.
const (
	maxKept       = 1024
	reviewTimeout = 5 * time.Second
)

// reviews keeps answers for a short while, asks for each once at a time, and
// not too often.
type reviews struct {
	reviewer Reviewer
	audience string
	keep     time.Duration
	limit    *rate.Limiter
	flight   singleflight.Group

	mu   sync.Mutex
	kept map[string]answer
}

type answer struct {
	user    User
	allowed bool
	err     error
	until   time.Time
}

// who is whose token it is.
func (r *reviews) who(ctx context.Context, token string) (User, error) {
	sum := sha256.Sum256([]byte(token))
	a := r.ask(ctx, "t"+string(sum[:]), func(ctx context.Context) answer {
		user, err := r.reviewer.Token(ctx, token, r.audience)
		return answer{user: user, err: err}
	})
	return a.user, a.err
}

// may is whether the user may. The key holds all that the answer depends on.
func (r *reviews) may(ctx context.Context, token string, user User, access Access) (bool, error) {
	sum := sha256.Sum256([]byte(token))
	a := r.ask(ctx, "a"+string(sum[:])+fmt.Sprintf("%q", access), func(ctx context.Context) answer {
		allowed, err := r.reviewer.Access(ctx, user, access)
		return answer{allowed: allowed, err: err}
	})
	return a.allowed, a.err
}

func (r *reviews) ask(ctx context.Context, key string, review func(context.Context) answer) answer {
	if a, ok := r.known(key); ok {
		return a
	}
	// Not the caller's context: others wait for the same answer.
	got := r.flight.DoChan(key, func() (any, error) {
		if a, ok := r.known(key); ok {
			return a, nil
		}
		if !r.limit.Allow() {
			return answer{err: errBusy}, nil
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reviewTimeout)
		defer cancel()
		a := review(ctx)
		if a.err == nil || errors.Is(a.err, ErrUnknownToken) {
			r.put(key, a)
		}
		return a, nil
	})
	select {
	case <-ctx.Done():
		return answer{err: ctx.Err()}
	case res := <-got:
		if a, ok := res.Val.(answer); ok && res.Err == nil {
			return a
		}
		return answer{err: res.Err}
	}
}

func (r *reviews) known(key string) (answer, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a, ok := r.kept[key]
	return a, ok && time.Now().Before(a.until)
}

func (r *reviews) put(key string, a answer) {
	now := time.Now()
	a.until = now.Add(r.keep)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.kept) >= maxKept {
		for k, old := range r.kept {
			if now.After(old.until) {
				delete(r.kept, k)
			}
		}
	}
	if len(r.kept) >= maxKept {
		clear(r.kept)
	}
	r.kept[key] = a
}
