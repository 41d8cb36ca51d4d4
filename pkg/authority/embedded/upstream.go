package embedded

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded/internal/issue"
)

// Upstream is a CA above this authority. It signs the CA certificates that an
// authority without one signs itself; its roots are then the trust bundle.
//
// Calls may take their time and end with ctx. They are repeated, so asking
// twice must do no harm. What they answer is checked: a chain under which
// SVIDs would not verify is refused. Safe for concurrent use.
type Upstream interface {
	// Name says who it is in logs and status.
	Name() string
	// SignCA has a CA certificate signed for the public key of a CSR, whose
	// subject and URI SAN are what the certificate should say. It lives for ttl
	// at most. Roots of the answer are all that Bundle gives.
	SignCA(ctx context.Context, csr []byte, ttl time.Duration) (*UpstreamCA, error)
	// Bundle is what upstream trusts now: asked for every few seconds.
	Bundle(ctx context.Context) (*UpstreamBundle, error)
	// PublishJWTKey makes a key known to all who trust upstream's bundle, and
	// returns the JWT keys of that. errors.ErrUnsupported where upstream knows
	// no JWT keys.
	PublishJWTKey(ctx context.Context, key JWTKey) ([]JWTKey, error)
}

// UpstreamBundle is what an upstream trusts. Of its authorities certificate or
// key and taint count.
type UpstreamBundle struct {
	X509 []Root
	JWT  []JWTKey
}

// UpstreamCA is a CA certificate that an upstream has signed.
type UpstreamCA struct {
	// Chain starts with the new certificate; each is signed by the next. Roots
	// at its end may be there or not.
	Chain []*x509.Certificate
	UpstreamBundle
}

// UpstreamStatus is how an authority stands with its upstream.
type UpstreamStatus struct {
	Name string
	// LastSuccess is when upstream last answered as it should.
	LastSuccess time.Time
	// Err is what is wrong since then; nil if nothing is.
	Err error
}

const (
	// upstreamTimeout bounds one call; upstreamStartTimeout bounds those of
	// Open, after which the authority goes on without.
	upstreamTimeout      = 15 * time.Second
	upstreamStartTimeout = 5 * time.Second
	// upstreamPeriod is how often upstream's bundle is asked for; SPIRE Server's.
	upstreamPeriod = 5 * time.Second
	// upstreamMaxDelay bounds the back-off.
	upstreamMaxDelay = 5 * time.Minute
)

// maxUpstreamAuthorities bounds what an upstream can put into the bundle.
const maxUpstreamAuthorities = 1000

// upstreamState is the memory of how calls went.
type upstreamState struct {
	mu     sync.Mutex
	status UpstreamStatus
	// errs is what is wrong, by what was tried.
	errs map[string]error
	// retryAt and delay are the back-off of rotation, by kind.
	retryAt map[kind]time.Time
	delay   map[kind]time.Duration
}

// UpstreamStatus is how the authority stands with its upstream; nil without
// one.
func (a *Authority) UpstreamStatus() *UpstreamStatus {
	if a.cfg.Upstream == nil {
		return nil
	}
	u := &a.upstream
	u.mu.Lock()
	defer u.mu.Unlock()
	s := u.status
	s.Name = a.cfg.Upstream.Name()
	for _, what := range []string{"rotation x509", "rotation jwt", "bundle"} {
		if err := u.errs[what]; err != nil {
			s.Err = err
			break
		}
	}
	return &s
}

// noteUpstream records the outcome of something that upstream took part in.
func (a *Authority) noteUpstream(what string, err error, now time.Time) {
	u := &a.upstream
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.errs == nil {
		u.errs = make(map[string]error)
	}
	failing := 0.0
	if err == nil {
		u.status.LastSuccess = now
		delete(u.errs, what)
	} else {
		u.errs[what] = err
	}
	if len(u.errs) > 0 {
		failing = 1
	}
	a.metrics.upstreamFailing.Set(failing)
}

// atRest forgets failures of a step that is due no more, as when somebody took
// it by hand.
func (a *Authority) atRest(k kind) {
	u := &a.upstream
	u.mu.Lock()
	failed := u.errs["rotation "+string(k)] != nil
	delete(u.retryAt, k)
	delete(u.delay, k)
	u.mu.Unlock()
	if failed {
		a.noteUpstream("rotation "+string(k), nil, time.Now())
	}
}

// mayTry says whether rotation's back-off is over.
func (a *Authority) mayTry(k kind, now time.Time) bool {
	a.upstream.mu.Lock()
	defer a.upstream.mu.Unlock()
	return !now.Before(a.upstream.retryAt[k])
}

// backOff notes how a step of rotation with upstream went, and when the next
// may be tried: later each time, but often where the current CA's end is near.
func (a *Authority) backOff(ctx context.Context, k kind, s *slot, err error, now time.Time) {
	a.noteUpstream("rotation "+string(k), err, now)
	u := &a.upstream
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.retryAt == nil {
		u.retryAt, u.delay = make(map[kind]time.Time), make(map[kind]time.Duration)
	}
	if err == nil {
		delete(u.retryAt, k)
		delete(u.delay, k)
		return
	}
	limit, log := rotatePeriod, a.log.ErrorContext
	state := "there is no valid key; nothing can be signed"
	var ends time.Time
	if s.usable(now) {
		life, left := s.notAfter.Sub(s.notBefore), s.notAfter.Sub(now)
		limit = min(upstreamMaxDelay, max(limit, left/20))
		ends = s.notAfter
		state = "the present key signs on, but it ends soon"
		if left >= life/6 {
			log, state = a.log.WarnContext, "the present key signs on"
		}
	}
	u.delay[k] = min(limit, max(2*u.delay[k], min(rotatePeriod, a.cfg.CATTL/60)))
	u.retryAt[k] = now.Add(u.delay[k])
	log(ctx, "upstream gives no new signing key", slog.String("upstream", a.cfg.Upstream.Name()), slog.String("kind", string(k)),
		slog.String("state", state), slog.Time("present_ends", ends), slog.Duration("retry_in", u.delay[k]), slog.Any("error", err))
}

// upstreamCall bounds a call and counts it.
func upstreamCall[T any](ctx context.Context, a *Authority, what string, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	out, err := f(ctx)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		a.metrics.upstreamCalls.WithLabelValues(what, "error").Inc()
		return out, fmt.Errorf("upstream %s: %s: %w", a.cfg.Upstream.Name(), what, err)
	}
	a.metrics.upstreamCalls.WithLabelValues(what, "ok").Inc()
	return out, err
}

// newIntermediate has a CA signed upstream.
func (a *Authority) newIntermediate(ctx context.Context, now time.Time) (*madeKey, error) {
	key, csr, err := issue.NewRequest(a.cfg.CAKeyType, issue.Root{TrustDomain: a.cfg.TrustDomain, Subject: a.cfg.CASubject})
	if err != nil {
		return nil, err
	}
	signed, err := upstreamCall(ctx, a, "sign", func(ctx context.Context) (*UpstreamCA, error) {
		return a.cfg.Upstream.SignCA(ctx, csr, a.cfg.CATTL)
	})
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*madeKey, error) {
		return nil, fmt.Errorf("upstream %s: the CA certificate it signed is of no use: %w", a.cfg.Upstream.Name(), err)
	}
	if err := signed.check(); err != nil {
		return fail(err)
	}
	chain, err := a.toRoot(signed)
	if err != nil {
		return fail(err)
	}
	ca, err := issue.NewIntermediate(a.cfg.TrustDomain, chain, key)
	if err != nil {
		return fail(err)
	}
	s := &slot{state: Prepared, id: ca.AuthorityID(), upstream: ca.RootID(), x509: ca}
	s.notBefore, s.notAfter = ca.Validity()
	if !s.usable(now) {
		return fail(fmt.Errorf("it or one above is valid from %s to %s only", s.notBefore.Format(time.RFC3339), s.notAfter.Format(time.RFC3339)))
	}
	return &madeKey{slot: s, upstream: &signed.UpstreamBundle}, nil
}

func (u *UpstreamBundle) check() error {
	if n := len(u.X509) + len(u.JWT); n > maxUpstreamAuthorities {
		return fmt.Errorf("%d authorities are more than %d", n, maxUpstreamAuthorities)
	}
	if len(u.X509) == 0 {
		return errors.New("there are no roots")
	}
	for _, k := range u.JWT {
		if err := checkJWTKey(k); err != nil {
			return err
		}
	}
	return nil
}

// toRoot is a signed CA's chain, ended by a root that is trusted, not tainted
// and not revoked here. What stands behind such a root is left out.
func (a *Authority) toRoot(signed *UpstreamCA) ([]*x509.Certificate, error) {
	if len(signed.Chain) == 0 || len(signed.Chain) > issue.MaxChain {
		return nil, fmt.Errorf("a chain of %d certificates", len(signed.Chain))
	}
	own := a.OwnBundle()
	var refused error
	for n, c := range signed.Chain {
		for _, r := range signed.X509 {
			if r.Certificate.Equal(c) || !bytes.Equal(r.Certificate.RawSubject, c.RawIssuer) || c.CheckSignatureFrom(r.Certificate) != nil {
				continue
			}
			if refused = own.mayAnchor(r); refused == nil {
				return append(slices.Clone(signed.Chain[:n+1]), r.Certificate), nil
			}
		}
	}
	if refused != nil {
		return nil, refused
	}
	last := signed.Chain[len(signed.Chain)-1]
	return nil, fmt.Errorf("its chain ends with %q, issued by %q, which is none of the roots", last.Subject, last.Issuer)
}

// mayAnchor refuses a root below which no new CA may stand.
func (b *Bundle) mayAnchor(r Root) error {
	tainted := r.Tainted
	for _, have := range b.X509 {
		tainted = tainted || have.Tainted && have.authorityID() == r.authorityID()
	}
	switch {
	case tainted:
		return fmt.Errorf("it stands below root %s (%s), which is tainted", r.authorityID(), r.Certificate.Subject)
	case slices.Contains(b.Revoked, fingerprint(r.Certificate)):
		return fmt.Errorf("it stands below root %s (%s), which was revoked here", r.authorityID(), r.Certificate.Subject)
	}
	return nil
}

// publishJWT makes a new JWT key known upstream before it is used.
func (a *Authority) publishJWT(ctx context.Context, made *madeKey) error {
	keys, err := upstreamCall(ctx, a, "publish", func(ctx context.Context) ([]JWTKey, error) {
		return a.cfg.Upstream.PublishJWTKey(ctx, made.keys[0])
	})
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return nil
	case err != nil:
		return err
	case len(keys) > maxUpstreamAuthorities:
		return fmt.Errorf("upstream %s: %d JWT keys are more than %d", a.cfg.Upstream.Name(), len(keys), maxUpstreamAuthorities)
	}
	for _, k := range keys {
		if err := checkJWTKey(k); err != nil {
			return fmt.Errorf("upstream %s: %w", a.cfg.Upstream.Name(), err)
		}
	}
	made.upstream = &UpstreamBundle{JWT: keys}
	return nil
}

// fits says whether a key is of the kind that a new one would be: a CA below a
// root that upstream has, or a self-signed one where there is no upstream.
func (a *Authority) fits(k kind, s *slot) bool {
	switch {
	case s == nil || k != kindX509 || s.state == Old:
		return true
	case a.cfg.Upstream == nil:
		return s.upstream == ""
	}
	return slices.ContainsFunc(a.OwnBundle().X509, func(r Root) bool {
		return r.authorityID() == s.upstream && !r.Tainted && r.Upstream != nil && r.Upstream.GoneSince.IsZero()
	})
}

// due is what the time asks for, and what upstream does: a CA below another
// root, or below none, is followed by one of the right kind, which is prepared
// at once and takes over as any other.
func (a *Authority) due(k kind, s slots, now time.Time) step {
	if s.current.usable(now) && !a.fits(k, s.next) {
		s.next = nil
	}
	st := s.due(now)
	prepared := s.next != nil && s.next.state == Prepared && s.next.usable(now)
	if st == stepNone && !prepared && !a.fits(k, s.current) {
		return stepPrepare
	}
	return st
}

// outlives refuses a new CA that ends no later than the present one: upstream's
// own end is near, and one short CA after the other would help nobody.
func (a *Authority) outlives(made, present *slot, now time.Time) error {
	if a.cfg.Upstream == nil || !present.usable(now) || made.notAfter.After(present.notAfter.Add(time.Minute)) || made.upstream != present.upstream {
		return nil
	}
	return fmt.Errorf("upstream %s: a new CA would end at %s, no later than the present one; the CA above has to be renewed",
		a.cfg.Upstream.Name(), made.notAfter.Format(time.RFC3339))
}
