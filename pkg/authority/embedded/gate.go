package embedded

import (
	"log/slog"
	"time"
)

// A prepared authority is activated at its time; agents and consumers that have
// not acknowledged it put that off up to a deadline, after which it happens
// whoever lags. The deadline leaves the longest SVID its life below the old
// authority, so that waiting costs nobody anything. Whatever agents say or do
// not say, nothing else depends on it.

// spreadTime is how long a prepared authority has at least to get around.
const spreadTime = time.Minute

// step times of a pair of slots with a usable current key.
type schedule struct {
	prepare, activate, deadline time.Time
}

// schedule is when the steps of a kind come.
func (a *Authority) schedule(k kind, s slots) (out schedule) {
	life := s.current.notAfter.Sub(s.current.notBefore)
	out.prepare = s.current.notAfter.Add(-min(life/2, 30*24*time.Hour))
	out.activate = s.current.notAfter.Add(-min(life/6, 7*24*time.Hour))
	// The job that acts on it comes around once in its period.
	out.deadline = s.current.notAfter.Add(-a.longestLife(k) - rotationPeriod(a.cfg.CATTL))
	if s.next != nil && s.next.state == Prepared {
		// Prepared late: it still takes a moment to get around.
		around := s.next.notBefore.Add(backdate + min(spreadTime, life/60))
		if around.After(out.deadline) {
			around = out.deadline
		}
		out.activate = later(out.activate, around)
	}
	out.deadline = later(out.deadline, out.activate)
	return out
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// longestLife is that of the longest SVID the registry may ask for.
func (a *Authority) longestLife(k kind) time.Duration {
	longest := a.cfg.DefaultX509SVIDTTL
	if k == kindJWT {
		longest = a.cfg.DefaultJWTSVIDTTL
	}
	for e := range a.Set().All() {
		if k == kindX509 {
			longest = max(longest, e.X509SVIDTTL)
		} else {
			longest = max(longest, e.JWTSVIDTTL)
		}
	}
	return longest
}

// rotationPeriod is how often Run looks after the keys. With a CA of minutes
// the usual period would be a good part of its life.
func rotationPeriod(caTTL time.Duration) time.Duration { return min(rotatePeriod, caTTL/60) }

// holdsBack says whether an activation that is due is put off, and logs when
// that begins and when it ends by the deadline. The caller performs one step at
// a time.
func (a *Authority) holdsBack(k kind, s slots, now time.Time) bool {
	if !s.current.usable(now) || s.next == nil {
		return false
	}
	when := a.schedule(k, s)
	if now.Before(when.activate) {
		return true
	}
	p := a.progress(k, s.next.rootID(), now)
	if p.Lagging == 0 {
		a.delayed[k] = ""
		return false
	}
	attrs := []any{
		slog.String("kind", string(k)), slog.String("authority_id", s.next.id), slog.Int("agents", p.Agents), slog.Int("lagging_agents", p.Lagging),
		slog.Int("lagging_consumers", p.LaggingConsumers), slog.String("laggards", p.Names()),
	}
	if !now.Before(when.deadline) {
		a.log.Warn("prepared authority is activated at its deadline although not everybody has acknowledged it", attrs...)
		a.metrics.passed.WithLabelValues(string(k), "deadline").Add(float64(p.Lagging))
		a.delayed[k] = ""
		return false
	}
	if a.delayed[k] != s.next.id {
		a.delayed[k] = s.next.id
		a.log.Warn("activation of the prepared authority waits for acknowledgements", append(attrs, slog.Time("until", when.deadline))...)
	}
	return true
}

// forced notes who lags when somebody activates by hand.
func (a *Authority) forced(k kind, s slots, now time.Time) {
	p := a.progress(k, s.next.rootID(), now)
	if p.Lagging == 0 {
		return
	}
	a.metrics.passed.WithLabelValues(string(k), "forced").Add(float64(p.Lagging))
	a.log.Warn("authority is activated by hand although not everybody has acknowledged it", slog.String("kind", string(k)),
		slog.String("authority_id", s.next.id), slog.Int("agents", p.Agents), slog.Int("lagging_agents", p.Lagging),
		slog.Int("lagging_consumers", p.LaggingConsumers), slog.String("laggards", p.Names()))
}

// Rotation is how the keys of one kind stand.
type Rotation struct {
	Kind        string // x509 or jwt
	Authorities LocalAuthorities
	// OldTainted: the old authority is marked as compromised; OldRevoked: it is
	// no longer in the bundle.
	OldTainted, OldRevoked bool
	// NextStep is prepare or activate; NextAt is when it is due by the time.
	NextStep string
	NextAt   time.Time
	// Deadline is when the prepared authority is activated whoever lags; zero
	// without one.
	Deadline time.Time
	// Delayed: the activation is due and waits for acknowledgements.
	Delayed bool
	// Progress is that of the prepared authority, or of the active one if there
	// is none.
	Progress Progress
}

// Rotations are those of the X.509 and the JWT keys. Kinds that have no active
// key yet are left out.
func (a *Authority) Rotations() []Rotation {
	now := time.Now()
	var out []Rotation
	for _, k := range []kind{kindX509, kindJWT} {
		s := *a.journal.Load().of(k)
		all, err := a.local(k)
		if err != nil {
			continue
		}
		r := Rotation{Kind: string(k), Authorities: all}
		when := a.schedule(k, s)
		subject := s.current
		if all.Prepared != nil {
			subject = s.next
			r.NextStep, r.NextAt, r.Deadline = string(stepActivate), when.activate, when.deadline
		} else {
			r.NextStep, r.NextAt = string(stepPrepare), when.prepare
		}
		if all.Old != nil {
			tainted := a.OwnBundle().find(k, s.next.rootID())
			r.OldTainted, r.OldRevoked = tainted != nil && *tainted, tainted == nil
		}
		r.Progress = a.progress(k, subject.rootID(), now)
		r.Delayed = all.Prepared != nil && !now.Before(when.activate) && now.Before(when.deadline) && r.Progress.Lagging > 0
		out = append(out, r)
	}
	return out
}

// observe sets the gauges of rotation.
func (a *Authority) observe() {
	for _, r := range a.Rotations() {
		a.metrics.lagging.WithLabelValues(r.Kind).Set(float64(r.Progress.Lagging))
		a.metrics.behind.WithLabelValues(r.Kind).Set(float64(r.Progress.LaggingConsumers))
		a.metrics.nextStep.WithLabelValues(r.Kind).Set(float64(r.NextAt.Unix()))
		delayed := 0.0
		if r.Delayed {
			delayed = 1
		}
		a.metrics.delayed.WithLabelValues(r.Kind).Set(delayed)
		if r.Kind == string(kindX509) {
			a.metrics.outdated.Set(float64(r.Progress.Outdated))
		}
	}
}
