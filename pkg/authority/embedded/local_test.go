package embedded_test

import (
	"context"
	"errors"
	"testing"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// TestLocalAuthority walks one CA and one JWT key through their lives by hand,
// with the texts of SPIRE Server.
func TestLocalAuthority(t *testing.T) {
	type methods struct {
		state                          func() (embedded.LocalAuthorities, error)
		prepare                        func(context.Context) (embedded.LocalAuthority, error)
		activate, taint                func(context.Context, string) (embedded.LocalAuthority, error)
		revoke                         func(context.Context, string) error
		again, untainted, dirty, early string
		tainted                        func(*embedded.Authority) int
	}
	for name, of := range map[string]func(a *embedded.Authority) methods{
		"X.509": func(a *embedded.Authority) methods {
			return methods{
				a.X509Authorities, a.PrepareX509, a.ActivateX509, a.TaintX509, a.RevokeX509,
				"failed to taint X.509 authority: root CA is already tainted",
				"failed to revoke X.509 authority: it is not possible to revoke an untainted root CA",
				"invalid authority ID: only Old local authority can be revoked",
				"invalid authority ID: only Old local authority can be revoked",
				func(a *embedded.Authority) int { return len(getBundles(t, a).TaintedX509) },
			}
		},
		"JWT": func(a *embedded.Authority) methods {
			return methods{
				a.JWTAuthorities, a.PrepareJWT, a.ActivateJWT, a.TaintJWT, a.RevokeJWT,
				"failed to taint JWT authority: key is already tainted",
				"failed to revoke JWT authority: it is not possible to revoke an untainted key",
				"invalid authority ID: no JWT authority found with provided authority ID",
				"invalid authority ID: unable to use a prepared key",
				func(a *embedded.Authority) int { return len(getBundles(t, a).TaintedJWT) },
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t)
			a := start(t, cfg)
			m := of(a)
			ctx := t.Context()
			e := mustCreate(t, a, newEntry("/w"))
			state := func() embedded.LocalAuthorities {
				t.Helper()
				s, err := m.state()
				if err != nil {
					t.Fatal(err)
				}
				return s
			}
			refused := func(err error, kind error, text string) {
				t.Helper()
				if err == nil || err.Error() != text {
					t.Errorf("error %v, want %q", err, text)
				}
				if got := errors.Is(err, embedded.ErrInvalid); got != (kind != nil) {
					t.Errorf("%v: ErrInvalid is %v", err, got)
				}
			}
			second := func(_ embedded.LocalAuthority, err error) error { return err }

			first := state().Active
			refused(second(m.activate(ctx, "")), embedded.ErrInvalid, "no authority ID provided")
			refused(second(m.activate(ctx, first.ID)), embedded.ErrInvalid, "unexpected authority ID")
			dropped, err := m.prepare(ctx)
			if err != nil || dropped.State != embedded.Prepared {
				t.Fatal(dropped, err)
			}
			prepared, err := m.prepare(ctx)
			if err != nil || prepared.ID == dropped.ID || state().Prepared.ID != prepared.ID {
				t.Fatal(prepared, err)
			}
			refused(second(m.activate(ctx, dropped.ID)), embedded.ErrInvalid, "unexpected authority ID")
			refused(second(m.taint(ctx, prepared.ID)), embedded.ErrInvalid, "only Old local authorities can be tainted: unsupported local authority status: PREPARED")
			refused(m.revoke(ctx, prepared.ID), embedded.ErrInvalid, m.early)
			active, err := m.activate(ctx, prepared.ID)
			if err != nil || active.ID != prepared.ID || active.State != embedded.Active {
				t.Fatal(active, err)
			}
			if s := state(); s.Active.ID != prepared.ID || s.Old == nil || s.Old.ID != first.ID || s.Prepared != nil {
				t.Errorf("%+v", s)
			}
			verifies(t, a, sign(t, a, e))
			refused(second(m.activate(ctx, first.ID)), nil, "only Prepared authorities can be activated: unsupported local authority status: OLD")

			refused(second(m.taint(ctx, "")), embedded.ErrInvalid, "no authority ID provided")
			refused(second(m.taint(ctx, prepared.ID)), embedded.ErrInvalid, "unable to taint current local authority")
			refused(second(m.taint(ctx, "nobody")), embedded.ErrInvalid, "unexpected authority ID")
			refused(m.revoke(ctx, first.ID), nil, m.untainted)
			sequence := a.OwnBundle().Sequence
			if _, err := m.taint(ctx, first.ID); err != nil {
				t.Fatal(err)
			}
			if a.OwnBundle().Sequence != sequence+1 || m.tainted(a) != 1 {
				t.Errorf("sequence %d, %d tainted", a.OwnBundle().Sequence, m.tainted(a))
			}
			refused(second(m.taint(ctx, first.ID)), nil, m.again)

			refused(m.revoke(ctx, ""), embedded.ErrInvalid, "invalid authority ID: no authority ID provided")
			refused(m.revoke(ctx, prepared.ID), embedded.ErrInvalid, "invalid authority ID: unable to use current authority")
			refused(m.revoke(ctx, "nobody"), embedded.ErrInvalid, m.dirty)
			if err := m.revoke(ctx, first.ID); err != nil {
				t.Fatal(err)
			}
			if a.OwnBundle().Sequence != sequence+2 || m.tainted(a) != 0 {
				t.Errorf("sequence %d, %d tainted", a.OwnBundle().Sequence, m.tainted(a))
			}
			if s := state(); s.Old == nil {
				t.Error("the revoked authority is not shown as old")
			}
			want := takePicture(t, a)
			if err := a.Close(); err != nil {
				t.Fatal(err)
			}
			comparePictures(t, takePicture(t, start(t, cfg)), want)
		})
	}
}
