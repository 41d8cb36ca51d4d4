package embedded

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded/internal/issue"
)

const (
	// backdate is how far notBefore lies in the past, for clocks that differ.
	backdate = 10 * time.Second
	// pruneSafety is how long an expired authority stays in the bundle.
	pruneSafety = 24 * time.Hour
)

// rotate does what the time asks for, for both kinds.
func (a *Authority) rotate(ctx context.Context, now time.Time) error {
	a.rotating.Lock()
	defer a.rotating.Unlock()
	var errs []error
	for _, k := range []kind{kindX509, kindJWT} {
		s := *a.journal.Load().of(k)
		due := a.due(k, s, now)
		if due == stepNone {
			a.atRest(k)
			continue
		}
		if due != stepActivate && !a.mayTry(k, now) {
			continue
		}
		if due == stepActivate && a.holdsBack(k, s, now) {
			continue
		}
		if s.current != nil && !s.current.usable(now) {
			a.log.Warn("signing key is out of its time; the clock may have jumped", slog.String("kind", string(k)), slog.String("authority_id", s.current.id),
				slog.Time("not_before", s.current.notBefore), slog.Time("not_after", s.current.notAfter), slog.Time("now", now))
		}
		err := a.stepByTime(ctx, k, due, now)
		if a.cfg.Upstream != nil && due != stepActivate {
			if !errors.Is(err, context.Canceled) {
				a.backOff(ctx, k, s.current, err, now)
			}
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s authority: %w", due, k.name(), err))
		}
	}
	a.observe()
	return errors.Join(errs...)
}

// stepByTime is step, without a new CA that would be no gain.
func (a *Authority) stepByTime(ctx context.Context, k kind, st step, now time.Time) error {
	return a.stepIf(ctx, k, st, now, func(made *slot) error { return a.outlives(made, a.journal.Load().of(k).current, now) })
}

// step makes the key that a step of rotation needs, which may take its time,
// and performs the step. The caller holds rotating.
func (a *Authority) step(ctx context.Context, k kind, st step, now time.Time) error {
	return a.stepIf(ctx, k, st, now, func(*slot) error { return nil })
}

// stepIf is step if the new key, where there is one, is accepted.
func (a *Authority) stepIf(ctx context.Context, k kind, st step, now time.Time, accept func(*slot) error) (err error) {
	defer func() { a.metrics.rotations.WithLabelValues(string(k), string(st), outcome(err)).Inc() }()
	var made *madeKey
	if st == stepPrepare || st == stepReplace {
		if made, err = a.newKey(ctx, k, now); err == nil {
			err = accept(made.slot)
		}
		if err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.take(k, st, made, now)
}

// take performs one step of rotation, with the key it needs. The caller holds
// mu.
func (a *Authority) take(k kind, st step, made *madeKey, now time.Time) error {
	s := *a.journal.Load().of(k)
	var changes []change
	var fresh *bundleState
	if made != nil {
		own, err := a.bundleWith(made)
		if err != nil {
			return err
		}
		s.next, fresh = made.slot, own
		changes = append(changes, own.change())
	}
	if st == stepActivate || st == stepReplace {
		s = s.activated()
	}
	c, err := s.change(k)
	if err != nil {
		return err
	}
	if err := a.commit(append(changes, c)...); err != nil {
		// A prepared authority is in the stored bundle already. If the current
		// one is past its time, activating it in memory alone loses nothing: a
		// restart would do the same again.
		if st != stepActivate || a.journal.Load().of(k).current.usable(now) {
			return err
		}
		a.log.Error("activation could not be stored; going on with the prepared authority", slog.String("kind", string(k)), slog.Any("error", err))
	}
	// The bundle first: nobody may see an SVID whose root is not published.
	if fresh != nil {
		a.publishBundle(fresh)
	}
	a.publishSlots(k, s)
	a.log.Info("authority rotated", slog.String("kind", string(k)), slog.String("step", string(st)),
		slog.String("active", s.current.idOrNone()), slog.String("next", s.next.idOrNone()))
	return nil
}

func (s *slot) idOrNone() string {
	if s == nil {
		return "none"
	}
	return s.id
}

func (a *Authority) publishSlots(k kind, s slots) {
	a.journal.Store(a.journal.Load().with(k, s))
	if s.current != nil {
		a.metrics.expiry.WithLabelValues(string(k)).Set(float64(s.current.notAfter.Unix()))
	}
}

// madeKey is a new signing key with what the own bundle must hold before the
// key signs.
type madeKey struct {
	slot     *slot
	roots    []Root
	keys     []JWTKey
	upstream *UpstreamBundle // what upstream had to say, or nil
}

// newKey makes a key, with upstream's help where there is one. It needs no
// lock.
func (a *Authority) newKey(ctx context.Context, k kind, now time.Time) (*madeKey, error) {
	if k == kindX509 && a.cfg.Upstream != nil {
		return a.newIntermediate(ctx, now)
	}
	s := &slot{state: Prepared, notBefore: now.Add(-backdate).UTC().Truncate(time.Second), notAfter: now.Add(a.cfg.CATTL).UTC().Truncate(time.Second)}
	made := &madeKey{slot: s}
	switch k {
	case kindX509:
		ca, err := issue.NewRoot(a.cfg.CAKeyType, issue.Root{
			TrustDomain: a.cfg.TrustDomain, Subject: a.cfg.CASubject, NotBefore: s.notBefore, NotAfter: s.notAfter,
		})
		if err != nil {
			return nil, err
		}
		s.id, s.x509 = ca.AuthorityID(), ca
		made.roots = []Root{{Certificate: ca.Certificate()}}
	case kindJWT:
		key, err := issue.GenerateJWTKey(a.cfg.JWTKeyType, s.notAfter)
		if err != nil {
			return nil, err
		}
		pub, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, fmt.Errorf("encode the JWT key: %w", err)
		}
		s.id, s.jwt = key.ID(), key
		made.keys = []JWTKey{{ID: key.ID(), PublicKey: pub, ExpiresAt: s.notAfter}}
		if a.cfg.Upstream != nil {
			if err := a.publishJWT(ctx, made); err != nil {
				return nil, err
			}
		}
	}
	return made, nil
}

// bundleWith is the own bundle with what a new key needs. The caller holds mu.
func (a *Authority) bundleWith(made *madeKey) (*bundleState, error) {
	own := a.bundles.Get().own
	b := own.clone()
	if len(own.X509)+len(own.JWT) > 0 {
		b.Sequence++
	}
	b.X509 = append(b.X509, made.roots...)
	b.JWT = append(b.JWT, made.keys...)
	if made.upstream != nil {
		b.add(made.upstream)
		b.neededUntil(made.slot.upstream, made.slot.notAfter)
	}
	return newBundleState(ownRow, b)
}

// pruneBundle removes authorities that expired a day ago from the own bundle,
// and those that upstream dropped when nothing below them is left, but never the
// last of a kind.
func (a *Authority) pruneBundle(now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	own := a.bundles.Get().own
	j := a.journal.Load()
	gone := func(id string, k kind, notAfter time.Time, up *FromUpstream) bool {
		s := j.of(k)
		if s.current != nil && s.current.rootID() == id || s.next != nil && s.next.state == Prepared && s.next.rootID() == id {
			return false
		}
		return !notAfter.IsZero() && now.Sub(notAfter) > pruneSafety || up.over(now)
	}
	b := own.clone()
	b.X509 = slices.DeleteFunc(b.X509, func(r Root) bool {
		return gone(r.authorityID(), kindX509, r.Certificate.NotAfter, r.Upstream)
	})
	b.JWT = slices.DeleteFunc(b.JWT, func(k JWTKey) bool { return gone(k.ID, kindJWT, k.ExpiresAt, k.Upstream) })
	if len(b.X509) == 0 {
		b.X509 = own.X509
	}
	if len(b.JWT) == 0 {
		b.JWT = own.JWT
	}
	pruned := len(own.X509) + len(own.JWT) - len(b.X509) - len(b.JWT)
	if pruned == 0 {
		return nil
	}
	if err := a.storeOwn(b); err != nil {
		return err
	}
	a.log.Info("expired authorities pruned from the trust bundle", slog.Int("count", pruned), slog.Uint64("sequence", b.Sequence))
	return nil
}

// storeOwn stores and publishes a changed own bundle with the next sequence
// number. The caller holds mu.
func (a *Authority) storeOwn(b *Bundle) error {
	b.Sequence++
	state, err := newBundleState(ownRow, b)
	if err != nil {
		return err
	}
	if err := a.commit(state.change()); err != nil {
		return err
	}
	a.publishBundle(state)
	return nil
}
