package embedded

import (
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
func (a *Authority) rotate(now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for _, k := range []kind{kindX509, kindJWT} {
		s := *a.journal.Load().of(k)
		due := s.due(now)
		if due == stepNone {
			continue
		}
		if s.current != nil && !s.current.usable(now) {
			a.log.Warn("signing key is out of its time; the clock may have jumped", slog.String("kind", string(k)), slog.String("authority_id", s.current.id),
				slog.Time("not_before", s.current.notBefore), slog.Time("not_after", s.current.notAfter), slog.Time("now", now))
		}
		if err := a.take(k, due, now); err != nil {
			errs = append(errs, fmt.Errorf("%s %s authority: %w", due, k.name(), err))
		}
	}
	return errors.Join(errs...)
}

// take performs one step of rotation. The caller holds mu.
func (a *Authority) take(k kind, st step, now time.Time) (err error) {
	defer func() { a.metrics.rotations.WithLabelValues(string(k), string(st), outcome(err)).Inc() }()
	s := *a.journal.Load().of(k)
	book := a.bundles.Get()
	var changes []change
	var fresh *bundleState
	if st == stepPrepare || st == stepReplace {
		next, own, err := a.generate(k, book.own, now)
		if err != nil {
			return err
		}
		s.next, fresh = next, own
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

// generate makes a key and the own bundle with it.
func (a *Authority) generate(k kind, own *bundleState, now time.Time) (*slot, *bundleState, error) {
	b := &Bundle{TrustDomain: a.cfg.TrustDomain}
	if own != nil {
		b = own.clone()
		b.Sequence++
	}
	s := &slot{state: Prepared, notBefore: now.Add(-backdate).UTC().Truncate(time.Second), notAfter: now.Add(a.cfg.CATTL).UTC().Truncate(time.Second)}
	switch k {
	case kindX509:
		ca, err := issue.NewRoot(a.cfg.CAKeyType, issue.Root{
			TrustDomain: a.cfg.TrustDomain, Subject: a.cfg.CASubject, NotBefore: s.notBefore, NotAfter: s.notAfter,
		})
		if err != nil {
			return nil, nil, err
		}
		s.id, s.x509 = ca.AuthorityID(), ca
		b.X509 = append(b.X509, Root{Certificate: ca.Certificate()})
	case kindJWT:
		key, err := issue.GenerateJWTKey(a.cfg.JWTKeyType, s.notAfter)
		if err != nil {
			return nil, nil, err
		}
		pub, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, nil, fmt.Errorf("encode the JWT key: %w", err)
		}
		s.id, s.jwt = key.ID(), key
		b.JWT = append(b.JWT, JWTKey{ID: key.ID(), PublicKey: pub, ExpiresAt: s.notAfter})
	}
	state, err := newBundleState(ownRow, b)
	if err != nil {
		return nil, nil, err
	}
	return s, state, nil
}

// pruneBundle removes authorities that expired a day ago from the own bundle,
// but never the last of a kind.
func (a *Authority) pruneBundle(now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	own := a.bundles.Get().own
	j := a.journal.Load()
	gone := func(id string, k kind, notAfter time.Time) bool {
		if s := j.of(k); s.current != nil && s.current.id == id {
			return false
		}
		return !notAfter.IsZero() && now.Sub(notAfter) > pruneSafety
	}
	b := own.clone()
	b.X509 = slices.DeleteFunc(b.X509, func(r Root) bool {
		return gone(r.authorityID(), kindX509, r.Certificate.NotAfter)
	})
	b.JWT = slices.DeleteFunc(b.JWT, func(k JWTKey) bool { return gone(k.ID, kindJWT, k.ExpiresAt) })
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
