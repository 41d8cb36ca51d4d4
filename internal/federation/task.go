package federation

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// rollbacks is how many answers in a row with an older sequence number it takes
// to believe it: one is a replica that lags behind, several are a trust domain
// that was restored or set up anew.
const rollbacks = 3

// maxError bounds the text of an error that is shown, in bytes: part of it may
// come from the endpoint.
const maxError = 300

var errGone = errors.New("the relationship was changed or deleted meanwhile; try again")

// task is one relationship.
type task struct {
	p      *Poller
	about  embedded.Relationship
	cancel context.CancelFunc
	asked  chan chan error // refresh requests
	kick   chan struct{}   // one slot: try again
	done   chan struct{}   // closed when run has ended

	mu    sync.Mutex
	since time.Time // from when staleness counts without a success
	state adminapi.RelationshipStatus
	hint  time.Duration // of the last bundle
	older int           // answers in a row with an older sequence number
	stale bool          // as said in the log
}

func newTask(p *Poller, r embedded.Relationship) *task {
	return &task{
		p: p, about: r, asked: make(chan chan error), kick: make(chan struct{}, 1), done: make(chan struct{}), since: time.Now(),
		state: adminapi.RelationshipStatus{TrustDomain: r.TrustDomain, Declared: r.Declared},
	}
}

// inherit takes over what still holds of a relationship that was changed.
func (t *task) inherit(old *task) {
	old.mu.Lock()
	defer old.mu.Unlock()
	t.since, t.hint, t.stale, t.state.LastSuccess = old.since, old.hint, old.stale, old.state.LastSuccess
}

// run fetches at once, and then whenever it is time or somebody asks.
func (t *task) run(ctx context.Context) {
	defer close(t.done)
	if stored, err := t.p.store.FederatedBundle(t.about.TrustDomain); err == nil {
		t.mu.Lock()
		t.hint = stored.RefreshHint
		t.mu.Unlock()
	}
	var waiting chan error
	for {
		err := t.attempt(ctx)
		if waiting != nil {
			waiting <- err
			waiting = nil
		}
		next, stale := t.next()
		timer, turns := time.NewTimer(next), time.NewTimer(stale)
		for again := false; !again; {
			select {
			case <-ctx.Done():
				timer.Stop()
				turns.Stop()
				return
			case <-turns.C:
				t.sayStale()
			case <-timer.C:
				again = true
			case <-t.kick:
				again = true
			case waiting = <-t.asked:
				again = true
			}
		}
		timer.Stop()
		turns.Stop()
	}
}

// refresh has run fetch now and waits for the outcome.
func (t *task) refresh(ctx context.Context) error {
	outcome := make(chan error, 1)
	select {
	case t.asked <- outcome:
	case <-t.done:
		return errGone
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-outcome:
		return err
	case <-t.done:
		return errGone
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t *task) failing() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.state.Failures > 0
}

// next is the time to the next attempt, and to when the bundle is stale.
func (t *task) next() (attempt, stale time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	attempt = spread(interval(t.hint))
	if t.state.Failures > 0 {
		attempt = spread(pause(t.state.Failures, t.hint))
	}
	t.state.NextAttempt = now.Add(attempt)
	if t.stale {
		return attempt, maxHint * 2 // has been said
	}
	return attempt, max(t.staleAt().Sub(now), 0)
}

// staleAt is when the bundle becomes stale. The caller holds mu.
func (t *task) staleAt() time.Time {
	from := t.since
	if t.state.LastSuccess.After(from) {
		from = t.state.LastSuccess
	}
	return from.Add(staleAfter(t.hint))
}

func (t *task) status(now time.Time) adminapi.RelationshipStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := t.state
	if at := t.staleAt(); !now.Before(at) {
		out.StaleSince = at
	}
	return out
}

// attempt fetches once, stores what is new and says what has changed.
func (t *task) attempt(ctx context.Context) error {
	start := time.Now()
	bundle, err := t.p.fetch(ctx, t.about)
	var stored bool
	if err != nil {
		err = fmt.Errorf("failed to fetch federated bundle from endpoint: %w", err)
	} else {
		stored, err = t.store(ctx, bundle)
	}
	if ctx.Err() != nil {
		return errGone
	}
	t.p.metrics.fetched(start, stored, err)
	t.record(ctx, start, bundle, stored, err)
	return err
}

// store stores a bundle that differs from the stored one, and says whether it
// did.
func (t *task) store(ctx context.Context, in *spiffebundle.Bundle) (bool, error) {
	next, err := embedded.BundleOf(in)
	if err != nil {
		return false, err
	}
	old, err := t.p.store.FederatedBundle(t.about.TrustDomain)
	if err == nil && old.Sequence > next.Sequence && next.Sequence > 0 {
		t.mu.Lock()
		t.older++
		n := t.older
		t.mu.Unlock()
		if n < rollbacks {
			return false, fmt.Errorf("the endpoint serves sequence number %d, older than %d, which is stored; it is believed when it says so %d times in a row", next.Sequence, old.Sequence, rollbacks)
		}
	}
	t.mu.Lock()
	t.older = 0
	t.mu.Unlock()
	if err == nil && sameBundle(old, in) {
		return false, nil
	}
	if err := t.p.store.SetFederatedBundle(ctx, next); err != nil {
		return false, fmt.Errorf("failed to store fetched federated bundle: %w", err)
	}
	return true, nil
}

// sameBundle does not count the order of keys, which a bundle given by hand may
// have its own of.
func sameBundle(old *embedded.Bundle, in *spiffebundle.Bundle) bool {
	have, err := embedded.BundleOf(in)
	if err != nil || len(have.X509) != len(old.X509) || len(have.JWT) != len(old.JWT) ||
		have.Sequence != old.Sequence || have.RefreshHint != old.RefreshHint {
		return false
	}
	roots := make(map[string]bool, len(old.X509))
	for _, r := range old.X509 {
		roots[string(r.Certificate.Raw)] = true
	}
	for _, r := range have.X509 {
		if !roots[string(r.Certificate.Raw)] {
			return false
		}
	}
	keys := make(map[string]string, len(old.JWT))
	for _, k := range old.JWT {
		keys[k.ID] = string(k.PublicKey)
	}
	for _, k := range have.JWT {
		if keys[k.ID] != string(k.PublicKey) {
			return false
		}
	}
	return true
}

// record keeps the outcome and logs what has changed, once.
func (t *task) record(ctx context.Context, start time.Time, bundle *spiffebundle.Bundle, stored bool, err error) {
	attrs := []any{slog.String("trust_domain", t.about.TrustDomain.Name()), slog.String("bundle_endpoint_url", t.about.EndpointURL)}
	t.mu.Lock()
	t.state.LastAttempt = start
	failing := t.state.Failures > 0
	if err != nil {
		t.state.Failures++
		t.state.LastError = oneLine(err)
		attrs = append(attrs, slog.String("error", t.state.LastError))
	} else {
		t.state.Failures, t.state.LastError, t.state.LastSuccess, t.stale = 0, "", time.Now(), false
		t.hint, _ = bundle.RefreshHint()
	}
	first := t.state.LastSuccess.IsZero()
	t.mu.Unlock()
	switch {
	case err != nil && !failing:
		t.p.log.WarnContext(ctx, "a foreign bundle could not be fetched; trying again", append(attrs, slog.Bool("fetched_before", !first))...)
	case err != nil:
		t.p.log.DebugContext(ctx, "a foreign bundle could not be fetched again", attrs...)
		return
	case stored:
		t.p.log.InfoContext(ctx, "foreign bundle stored", append(attrs, slog.Int("x509_authorities", len(bundle.X509Authorities())), slog.Int("jwt_authorities", len(bundle.JWTAuthorities())))...)
		if len(bundle.X509Authorities())+len(bundle.JWTAuthorities()) == 0 {
			t.p.log.WarnContext(ctx, "the bundle of a foreign trust domain is empty now: it has withdrawn all its keys", attrs...)
		}
	case failing:
		t.p.log.InfoContext(ctx, "foreign bundle fetched again", attrs...)
	}
	t.p.changed.say()
}

// sayStale is said once per spell.
func (t *task) sayStale() {
	t.mu.Lock()
	t.stale = true
	text := t.state.LastError
	t.mu.Unlock()
	t.p.log.Warn("a foreign bundle is stale: new keys of the trust domain are not known here", slog.String("trust_domain", t.about.TrustDomain.Name()),
		slog.String("bundle_endpoint_url", t.about.EndpointURL), slog.String("error", text))
	t.p.changed.say()
}

// oneLine is an error's text, harmless for a terminal and of bounded length.
func oneLine(err error) string {
	text := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, err.Error())
	if len(text) > maxError {
		text = strings.ToValidUTF8(text[:maxError], "") + "..."
	}
	return text
}
