package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// rotateAtStart makes a first CA, and replaces one that is out of its time.
// Upstream is waited for only where nothing can be signed without it, and not
// for long: its absence is no error here.
func (a *Authority) rotateAtStart() error {
	now := time.Now()
	if a.cfg.Upstream == nil {
		return a.rotate(context.Background(), now)
	}
	j := a.journal.Load()
	if j.x509.current.usable(now) && j.jwt.current.usable(now) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), upstreamStartTimeout)
	defer cancel()
	return a.rotate(ctx, now)
}

// leaveUpstream marks what came from an upstream that is configured no more.
func (a *Authority) leaveUpstream(now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cfg.Upstream != nil {
		return nil
	}
	if b := a.bundles.Get().own.clone(); b.leave(now) {
		return a.storeOwn(b)
	}
	return nil
}

// followUpstream keeps the bundle what upstream's is until ctx ends.
func (a *Authority) followUpstream(ctx context.Context) {
	period := min(upstreamPeriod, a.cfg.CATTL/60)
	delay := period
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.closed:
			return
		case <-time.After(delay):
		}
		err := a.syncUpstream(ctx, time.Now())
		if ctx.Err() != nil {
			return
		}
		a.noteUpstream("bundle", err, time.Now())
		switch {
		case err == nil && delay > period:
			a.log.Info("upstream answers again", slog.String("upstream", a.cfg.Upstream.Name()))
			delay = period
		case err == nil:
		default:
			delay = min(2*delay, time.Minute)
			a.log.Warn("upstream's trust bundle could not be followed", slog.String("upstream", a.cfg.Upstream.Name()),
				slog.Duration("retry_in", delay), slog.Any("error", err))
		}
	}
}

// syncUpstream takes over what changed in upstream's bundle.
func (a *Authority) syncUpstream(ctx context.Context, now time.Time) error {
	up, err := upstreamCall(ctx, a, "bundle", a.cfg.Upstream.Bundle)
	if err != nil {
		return err
	}
	if err := up.check(); err != nil {
		return fmt.Errorf("upstream %s: %w", a.cfg.Upstream.Name(), err)
	}
	a.rotating.Lock()
	defer a.rotating.Unlock()
	j := a.journal.Load()
	if j.x509.current == nil || j.jwt.current == nil {
		return nil // The first keys bring the first bundle.
	}
	if err := a.leaveTainted(ctx, up, now); err != nil {
		return err
	}
	if err := a.republish(ctx, up); err != nil {
		return err
	}
	return a.storeFollowed(up, now)
}

// leaveTainted has the own keys replaced that upstream taints, before the taint
// is told: who asks for a new SVID then must not get another one from them.
func (a *Authority) leaveTainted(ctx context.Context, up *UpstreamBundle, now time.Time) error {
	for _, k := range []kind{kindX509, kindJWT} {
		s := a.journal.Load().of(k)
		if !up.taints(k, s.current.rootID()) {
			continue
		}
		st := stepReplace
		if n := s.next; n != nil && n.state == Prepared && n.usable(now) && !up.taints(k, n.rootID()) && a.fits(k, n) {
			st = stepActivate
		}
		a.log.Warn("upstream has tainted what the present signing key stands on; it is replaced", slog.String("kind", string(k)),
			slog.String("authority_id", s.current.id), slog.String("tainted", s.current.rootID()))
		if err := a.step(ctx, k, st, now); err != nil {
			return fmt.Errorf("replace the %s authority below a tainted one: %w", k.name(), err)
		}
	}
	return nil
}

func (u *UpstreamBundle) taints(k kind, id string) bool {
	if k == kindJWT {
		key := u.key(id)
		return key != nil && key.Tainted
	}
	return slices.ContainsFunc(u.X509, func(r Root) bool { return r.Tainted && r.authorityID() == id })
}

// republish makes own JWT keys known that upstream does not have: those from
// before there was an upstream, and those that it lost.
func (a *Authority) republish(ctx context.Context, up *UpstreamBundle) error {
	j := a.journal.Load()
	for _, s := range []*slot{j.jwt.current, j.jwt.next} {
		if s == nil || up.key(s.id) != nil {
			continue
		}
		i := slices.IndexFunc(a.OwnBundle().JWT, func(k JWTKey) bool { return k.ID == s.id && !k.Tainted })
		if i < 0 {
			continue
		}
		made := &madeKey{keys: []JWTKey{a.OwnBundle().JWT[i]}}
		if err := a.publishJWT(ctx, made); err != nil {
			return err
		}
		if made.upstream == nil {
			return nil // Upstream knows no JWT keys.
		}
		up.JWT = made.upstream.JWT
	}
	return nil
}

func (a *Authority) storeFollowed(up *UpstreamBundle, now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	j := a.journal.Load()
	own := a.bundles.Get().own
	b := own.clone()
	b.follow(up, func(id string) bool {
		return j.jwt.current.idOrNone() == id || j.jwt.next.idOrNone() == id
	}, now)
	state, err := newBundleState(ownRow, b)
	if err != nil || own.sameContent(state) {
		return err
	}
	if err := a.storeOwn(b); err != nil {
		return err
	}
	a.log.Info("trust bundle follows upstream", slog.String("upstream", a.cfg.Upstream.Name()), slog.Uint64("sequence", b.Sequence),
		slog.Int("x509_authorities", len(b.X509)), slog.Int("jwt_authorities", len(b.JWT)))
	return nil
}

// Ready is nil when X.509-SVIDs and JWT-SVIDs can be signed now; otherwise it
// says what is missing, and what upstream's part in that is.
func (a *Authority) Ready() error {
	now := time.Now()
	var err error
	for _, k := range []kind{kindX509, kindJWT} {
		if _, active := a.active(k, now); active != nil {
			err = active
			break
		}
	}
	if s := a.UpstreamStatus(); err != nil && s != nil && s.Err != nil {
		return fmt.Errorf("%w: %w", err, s.Err)
	}
	return err
}

// Errors of the two below that say what is not so.
var (
	errNoUpstream       = &kindError{ErrPrecondition, "upstream authority is not configured", nil}
	errSignedUpstream   = &kindError{ErrPrecondition, "local authority can't be tainted if there is an upstream authority", nil}
	errRevokeOfUpstream = &kindError{ErrPrecondition, "local authority can't be revoked if there is an upstream authority", nil}
)

// TaintX509Upstream marks the upstream root below which the old CA stands as
// compromised: SVIDs below it must be replaced. id is the root's subject key ID
// in hex. Errors: ErrInvalid, ErrPrecondition; any other is internal. The texts
// are SPIRE Server's.
func (a *Authority) TaintX509Upstream(ctx context.Context, id string) (string, error) {
	id, err := a.changeUpstreamRoots(ctx, "taint", id, "provided subject key id is not valid", func(b *Bundle, id string) error {
		found := false
		for i, r := range b.X509 {
			if r.authorityID() != id {
				continue
			}
			if found = true; r.Tainted {
				return errors.New("root CA is already tainted")
			}
			b.X509[i].Tainted = true
		}
		if !found {
			return errors.New("no ca found with provided subject key ID")
		}
		return nil
	})
	if err != nil {
		return id, err
	}
	a.log.Warn("upstream authority tainted", slog.String("upstream_authority_id", id))
	return id, nil
}

// RevokeX509Upstream removes a tainted upstream root from the bundle, also
// where upstream goes on having it. Otherwise as TaintX509Upstream.
func (a *Authority) RevokeX509Upstream(ctx context.Context, id string) (string, error) {
	id, err := a.changeUpstreamRoots(ctx, "revoke", id, "invalid subject key ID", func(b *Bundle, id string) error {
		before := len(b.X509)
		untainted := false
		b.X509 = slices.DeleteFunc(b.X509, func(r Root) bool {
			if r.authorityID() != id {
				return false
			}
			untainted = untainted || !r.Tainted
			if r.Upstream != nil && r.Upstream.GoneSince.IsZero() {
				b.Revoked = append(b.Revoked, fingerprint(r.Certificate))
			}
			return true
		})
		switch {
		case untainted:
			return errors.New("it is not possible to revoke an untainted root CA")
		case len(b.X509) == before:
			return errors.New("no root CA found with provided subject key ID")
		}
		return nil
	})
	if err != nil {
		return id, err
	}
	a.log.Warn("upstream authority revoked", slog.String("upstream_authority_id", id))
	return id, nil
}

func (a *Authority) changeUpstreamRoots(ctx context.Context, what, id, refusal string, change func(b *Bundle, id string) error) (_ string, err error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	// As in every call that moves keys: not while a step is under way.
	a.rotating.Lock()
	defer a.rotating.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	id = strings.ToLower(id)
	s := a.journal.Load().x509
	if a.cfg.Upstream == nil && (s.current == nil || s.current.upstream == "") && (s.next == nil || s.next.upstream == "") {
		return id, errNoUpstream
	}
	var cause string
	switch {
	case id == "":
		cause = "no subject key ID provided"
	case s.current != nil && s.current.upstream == id:
		cause = "unable to use upstream authority singing current authority"
	case s.next == nil || s.next.upstream != id:
		cause = "upstream authority didn't sign the old local authority"
	case s.next.state == Prepared:
		cause = "only upstream authorities signing an old authority can be used"
	}
	if cause != "" {
		return id, invalid(refusal, errors.New(cause))
	}
	defer func() { a.metrics.rotations.WithLabelValues(string(kindX509), what, outcome(err)).Inc() }()
	b := a.bundles.Get().own.clone()
	if err = change(b, id); err == nil {
		err = a.storeOwn(b)
	}
	if err != nil && what == "taint" {
		return id, fmt.Errorf("failed to taint upstream authority: %w", err)
	}
	if err != nil {
		return id, fmt.Errorf("failed to revoke X.509 upstream authority: %w", err)
	}
	return id, nil
}
