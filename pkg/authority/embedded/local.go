package embedded

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// LocalAuthority is one of the own signing keys, as SPIRE Server's LocalAuthority
// API shows it.
type LocalAuthority struct {
	ID        string // subject key ID in hex, or JWT key ID
	State     LocalState
	ExpiresAt time.Time
	// UpstreamID is the subject key ID in hex of the upstream root below which
	// a CA stands; empty for a self-signed one and for JWT keys.
	UpstreamID string
}

// LocalAuthorities are the own signing keys of one kind.
type LocalAuthorities struct {
	Active        LocalAuthority
	Prepared, Old *LocalAuthority // at most one of them
}

// X509Authorities are the CA keys. Error: authority.ErrNotReady.
func (a *Authority) X509Authorities() (LocalAuthorities, error) { return a.local(kindX509) }

// CAChain is from the active CA's own certificate to its root; empty before the
// first CA.
func (a *Authority) CAChain() []*x509.Certificate {
	s := a.journal.Load().x509.current
	if s == nil {
		return nil
	}
	return append([]*x509.Certificate{s.x509.Certificate()}, s.x509.Above()...)
}

// JWTAuthorities are the JWT keys. Error: authority.ErrNotReady.
func (a *Authority) JWTAuthorities() (LocalAuthorities, error) { return a.local(kindJWT) }

func (s *slot) local() *LocalAuthority {
	return &LocalAuthority{ID: s.id, State: s.state, ExpiresAt: s.notAfter, UpstreamID: s.upstream}
}

func (a *Authority) local(k kind) (LocalAuthorities, error) {
	s := a.journal.Load().of(k)
	if s.current == nil {
		return LocalAuthorities{}, fmt.Errorf("%w: server is initializing", authority.ErrNotReady)
	}
	out := LocalAuthorities{Active: *s.current.local()}
	if s.next != nil {
		if s.next.state == Prepared {
			out.Prepared = s.next.local()
		} else {
			out.Old = s.next.local()
		}
	}
	return out, nil
}

// PrepareX509 makes a new CA and adds it to the bundle. An earlier prepared one
// is dropped but stays in the bundle.
func (a *Authority) PrepareX509(ctx context.Context) (LocalAuthority, error) {
	return a.prepare(ctx, kindX509)
}

// PrepareJWT is PrepareX509 for the JWT key.
func (a *Authority) PrepareJWT(ctx context.Context) (LocalAuthority, error) {
	return a.prepare(ctx, kindJWT)
}

func (a *Authority) prepare(ctx context.Context, k kind) (LocalAuthority, error) {
	if err := ctx.Err(); err != nil {
		return LocalAuthority{}, err
	}
	a.rotating.Lock()
	defer a.rotating.Unlock()
	if err := a.step(ctx, k, stepPrepare, time.Now()); err != nil {
		return LocalAuthority{}, fmt.Errorf("failed to prepare %s authority: %w", k.name(), err)
	}
	return *a.journal.Load().of(k).next.local(), nil
}

// ActivateX509 lets the prepared CA sign from now on; the active one becomes
// old. id must be the prepared authority's. Errors: ErrInvalid; any other is
// internal. The texts are SPIRE Server's.
func (a *Authority) ActivateX509(ctx context.Context, id string) (LocalAuthority, error) {
	return a.activate(ctx, kindX509, id)
}

// ActivateJWT is ActivateX509 for the JWT key.
func (a *Authority) ActivateJWT(ctx context.Context, id string) (LocalAuthority, error) {
	return a.activate(ctx, kindJWT, id)
}

var (
	errNoAuthorityID         = invalid("no authority ID provided", nil)
	errUnexpectedAuthorityID = invalid("unexpected authority ID", nil)
)

func (a *Authority) activate(ctx context.Context, k kind, id string) (LocalAuthority, error) {
	if err := ctx.Err(); err != nil {
		return LocalAuthority{}, err
	}
	a.rotating.Lock()
	defer a.rotating.Unlock()
	next := a.journal.Load().of(k).next
	switch {
	case id == "":
		return LocalAuthority{}, errNoAuthorityID
	case next == nil || next.id != id:
		return LocalAuthority{}, errUnexpectedAuthorityID
	case next.state != Prepared:
		return LocalAuthority{}, fmt.Errorf("only Prepared authorities can be activated: unsupported local authority status: %s", next.state)
	case !next.usable(time.Now()):
		return LocalAuthority{}, fmt.Errorf("prepared authority is not valid now: valid from %s to %s", next.notBefore, next.notAfter)
	}
	a.forced(k, *a.journal.Load().of(k), time.Now())
	if err := a.step(ctx, k, stepActivate, time.Now()); err != nil {
		return LocalAuthority{}, fmt.Errorf("failed to activate %s authority: %w", k.name(), err)
	}
	return *a.journal.Load().of(k).current.local(), nil
}

// TaintX509 marks the old CA as compromised: SVIDs below it must be replaced.
// Errors: ErrInvalid; any other is internal. The texts are SPIRE Server's.
func (a *Authority) TaintX509(ctx context.Context, id string) (LocalAuthority, error) {
	return a.taint(ctx, kindX509, id)
}

// TaintJWT is TaintX509 for the JWT key.
func (a *Authority) TaintJWT(ctx context.Context, id string) (LocalAuthority, error) {
	return a.taint(ctx, kindJWT, id)
}

func (a *Authority) taint(ctx context.Context, k kind, id string) (_ LocalAuthority, err error) {
	if err := ctx.Err(); err != nil {
		return LocalAuthority{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.journal.Load().of(k)
	switch {
	case id == "":
		return LocalAuthority{}, errNoAuthorityID
	case s.current != nil && s.current.id == id:
		return LocalAuthority{}, invalid("unable to taint current local authority", nil)
	case s.next == nil || s.next.id != id:
		return LocalAuthority{}, errUnexpectedAuthorityID
	case s.next.upstream != "":
		return LocalAuthority{}, errSignedUpstream
	case s.next.state != Old:
		return LocalAuthority{}, invalid(fmt.Sprintf("only Old local authorities can be tainted: unsupported local authority status: %s", s.next.state), nil)
	}
	defer func() { a.metrics.rotations.WithLabelValues(string(k), "taint", outcome(err)).Inc() }()
	b := a.bundles.Get().own.clone()
	tainted := b.find(k, id)
	switch {
	case tainted == nil:
		err = errors.New("not found in the bundle")
	case *tainted && k == kindX509:
		err = errors.New("root CA is already tainted")
	case *tainted:
		err = errors.New("key is already tainted")
	default:
		*tainted = true
		err = a.storeOwn(b)
	}
	if err != nil {
		return LocalAuthority{}, fmt.Errorf("failed to taint %s authority: %w", k.name(), err)
	}
	a.log.Warn("authority tainted", slog.String("kind", string(k)), slog.String("authority_id", id))
	return *s.next.local(), nil
}

// find is the taint mark of an authority in a bundle that may be changed, or
// nil.
func (b *Bundle) find(k kind, id string) *bool {
	if k == kindX509 {
		if i := slices.IndexFunc(b.X509, func(r Root) bool { return r.authorityID() == id }); i >= 0 {
			return &b.X509[i].Tainted
		}
		return nil
	}
	if i := slices.IndexFunc(b.JWT, func(key JWTKey) bool { return key.ID == id }); i >= 0 {
		return &b.JWT[i].Tainted
	}
	return nil
}

// RevokeX509 removes the old, tainted CA from the bundle. Errors: ErrInvalid;
// any other is internal. The texts are SPIRE Server's.
func (a *Authority) RevokeX509(ctx context.Context, id string) error {
	return a.revoke(ctx, kindX509, id)
}

// RevokeJWT removes a tainted JWT key, but not the active or prepared one.
func (a *Authority) RevokeJWT(ctx context.Context, id string) error {
	return a.revoke(ctx, kindJWT, id)
}

func (a *Authority) revoke(ctx context.Context, k kind, id string) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.journal.Load().of(k)
	b := a.bundles.Get().own.clone()
	if s.next != nil && s.next.id == id && s.next.upstream != "" {
		return errRevokeOfUpstream
	}
	if err := checkRevocable(k, *s, b, id); err != nil {
		return err
	}
	defer func() { a.metrics.rotations.WithLabelValues(string(k), "revoke", outcome(err)).Inc() }()
	tainted := b.find(k, id)
	switch {
	case tainted == nil:
		err = errors.New("not found in the bundle")
	case !*tainted && k == kindX509:
		err = errors.New("it is not possible to revoke an untainted root CA")
	case !*tainted:
		err = errors.New("it is not possible to revoke an untainted key")
	default:
		b.X509 = slices.DeleteFunc(b.X509, func(r Root) bool { return k == kindX509 && r.authorityID() == id })
		b.JWT = slices.DeleteFunc(b.JWT, func(key JWTKey) bool { return k == kindJWT && key.ID == id })
		err = a.storeOwn(b)
	}
	if err != nil {
		return fmt.Errorf("failed to revoke %s authority: %w", k.name(), err)
	}
	a.log.Warn("authority revoked", slog.String("kind", string(k)), slog.String("authority_id", id))
	return nil
}

func checkRevocable(k kind, s slots, b *Bundle, id string) error {
	var cause string
	switch {
	case id == "":
		cause = "no authority ID provided"
	case s.current != nil && s.current.id == id:
		cause = "unable to use current authority"
	case k == kindX509 && (s.next == nil || s.next.id != id || s.next.state != Old):
		cause = "only Old local authority can be revoked"
	case s.next != nil && s.next.id == id && s.next.state != Old:
		cause = "unable to use a prepared key"
	case k == kindJWT && b.find(k, id) == nil:
		cause = "no JWT authority found with provided authority ID"
	default:
		return nil
	}
	return invalid("invalid authority ID", errors.New(cause))
}

// RotateNow makes the CA and the JWT key take over at once, preparing them first
// where they are not. The time between publishing a root and signing with it is
// then up to the caller: prepare, wait, and call it.
func (a *Authority) RotateNow(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	a.rotating.Lock()
	defer a.rotating.Unlock()
	now := time.Now()
	for _, k := range []kind{kindX509, kindJWT} {
		s := a.journal.Load().of(k)
		if s.next == nil || s.next.state != Prepared || !s.next.usable(now) {
			if err := a.step(ctx, k, stepPrepare, now); err != nil {
				return fmt.Errorf("prepare %s authority: %w", k.name(), err)
			}
		}
		a.forced(k, *a.journal.Load().of(k), now)
		if err := a.step(ctx, k, stepActivate, now); err != nil {
			return fmt.Errorf("activate %s authority: %w", k.name(), err)
		}
	}
	return nil
}
