package adminapi_test

import (
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	la "github.com/spiffe-node/spiffe-node/internal/spirewire/localauthoritypb"
)

// keyCalls are the calls of one kind of key.
type keyCalls struct {
	state                   func() (active, prepared, old *la.AuthorityState, err error)
	prepare                 func() (*la.AuthorityState, error)
	activate, taint, revoke func(id string) (*la.AuthorityState, error)
}

func x509Calls(t *testing.T, conn *grpc.ClientConn) keyCalls {
	t.Helper()
	c, ctx := la.NewLocalAuthorityClient(conn), t.Context()
	return keyCalls{
		func() (_, _, _ *la.AuthorityState, err error) {
			r, err := c.GetX509AuthorityState(ctx, &la.GetX509AuthorityStateRequest{})
			return r.GetActive(), r.GetPrepared(), r.GetOld(), err
		},
		func() (*la.AuthorityState, error) {
			r, err := c.PrepareX509Authority(ctx, &la.PrepareX509AuthorityRequest{})
			return r.GetPreparedAuthority(), err
		},
		func(id string) (*la.AuthorityState, error) {
			r, err := c.ActivateX509Authority(ctx, &la.ActivateX509AuthorityRequest{AuthorityId: id})
			return r.GetActivatedAuthority(), err
		},
		func(id string) (*la.AuthorityState, error) {
			r, err := c.TaintX509Authority(ctx, &la.TaintX509AuthorityRequest{AuthorityId: id})
			return r.GetTaintedAuthority(), err
		},
		func(id string) (*la.AuthorityState, error) {
			r, err := c.RevokeX509Authority(ctx, &la.RevokeX509AuthorityRequest{AuthorityId: id})
			return r.GetRevokedAuthority(), err
		},
	}
}

func jwtCalls(t *testing.T, conn *grpc.ClientConn) keyCalls {
	t.Helper()
	c, ctx := la.NewLocalAuthorityClient(conn), t.Context()
	return keyCalls{
		func() (_, _, _ *la.AuthorityState, err error) {
			r, err := c.GetJWTAuthorityState(ctx, &la.GetJWTAuthorityStateRequest{})
			return r.GetActive(), r.GetPrepared(), r.GetOld(), err
		},
		func() (*la.AuthorityState, error) {
			r, err := c.PrepareJWTAuthority(ctx, &la.PrepareJWTAuthorityRequest{})
			return r.GetPreparedAuthority(), err
		},
		func(id string) (*la.AuthorityState, error) {
			r, err := c.ActivateJWTAuthority(ctx, &la.ActivateJWTAuthorityRequest{AuthorityId: id})
			return r.GetActivatedAuthority(), err
		},
		func(id string) (*la.AuthorityState, error) {
			r, err := c.TaintJWTAuthority(ctx, &la.TaintJWTAuthorityRequest{AuthorityId: id})
			return r.GetTaintedAuthority(), err
		},
		func(id string) (*la.AuthorityState, error) {
			r, err := c.RevokeJWTAuthority(ctx, &la.RevokeJWTAuthorityRequest{AuthorityId: id})
			return r.GetRevokedAuthority(), err
		},
	}
}

// TestLocalAuthority moves keys through their lives over the wire, with the
// codes, texts and shapes of SPIRE Server. It changes the keys of a real one.
func TestLocalAuthority(t *testing.T) {
	for name, kind := range map[string]struct {
		calls      func(*testing.T, *grpc.ClientConn) keyCalls
		name       string
		taintedEnd bool // the answer to taint says when it expires
	}{"X.509": {x509Calls, "X.509", true}, "JWT": {jwtCalls, "JWT", false}} {
		t.Run(name, func(t *testing.T) {
			c := kind.calls(t, wire(t))
			must := func(s *la.AuthorityState, err error) *la.AuthorityState {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
				return s
			}
			first, _, _, err := c.state()
			if err != nil || first.GetAuthorityId() == "" || first.GetExpiresAt() <= time.Now().Unix() {
				t.Fatal(first, err)
			}
			for _, f := range []func(string) (*la.AuthorityState, error){c.activate, c.taint} {
				_, err := f("")
				want{int32(codes.InvalidArgument), "no authority ID provided"}.checkError(t, err)
				_, err = f("none")
				want{int32(codes.InvalidArgument), "unexpected authority ID"}.checkError(t, err)
			}
			_, err = c.revoke("")
			want{int32(codes.InvalidArgument), "invalid authority ID: no authority ID provided"}.checkError(t, err)
			_, err = c.taint(first.GetAuthorityId())
			want{int32(codes.InvalidArgument), "unable to taint current local authority"}.checkError(t, err)

			prepared := must(c.prepare())
			if active, next, old, err := c.state(); err != nil || !proto.Equal(active, first) || !proto.Equal(next, prepared) || old != nil {
				t.Errorf("prepared %v: %v, %v, %v, %v", prepared, active, next, old, err)
			}
			if got := must(c.activate(prepared.GetAuthorityId())); !proto.Equal(got, prepared) {
				t.Errorf("activated %v, prepared %v", got, prepared)
			}
			_, err = c.activate(first.GetAuthorityId())
			want{int32(codes.Internal), "only Prepared authorities can be activated: unsupported local authority status: OLD"}.checkError(t, err)
			_, err = c.revoke(first.GetAuthorityId())
			want{int32(codes.Internal), "failed to revoke " + kind.name + " authority: it is not possible to revoke an untainted *"}.checkError(t, err)
			tainted := must(c.taint(first.GetAuthorityId()))
			if tainted.GetAuthorityId() != first.GetAuthorityId() || (tainted.GetExpiresAt() != 0) != kind.taintedEnd {
				t.Errorf("tainted %v", tainted)
			}
			_, err = c.taint(first.GetAuthorityId())
			want{int32(codes.Internal), "failed to taint " + kind.name + " authority: *"}.checkError(t, err)
			if got := must(c.revoke(first.GetAuthorityId())); !proto.Equal(got, &la.AuthorityState{AuthorityId: first.GetAuthorityId()}) {
				t.Errorf("revoked %v", got)
			}
		})
	}
}

// What this authority does not have is said in the server's words.
func TestNoUpstreamNoWIT(t *testing.T) {
	c := la.NewLocalAuthorityClient(wire(t))
	_, err := c.TaintX509UpstreamAuthority(t.Context(), &la.TaintX509UpstreamAuthorityRequest{SubjectKeyId: "none"})
	want{int32(codes.FailedPrecondition), "upstream authority is not configured"}.checkError(t, err)
	_, err = c.RevokeX509UpstreamAuthority(t.Context(), &la.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: "none"})
	want{int32(codes.FailedPrecondition), "upstream authority is not configured"}.checkError(t, err)
	_, show := c.GetWITAuthorityState(t.Context(), &la.GetWITAuthorityStateRequest{})
	_, prepare := c.PrepareWITAuthority(t.Context(), &la.PrepareWITAuthorityRequest{})
	_, activate := c.ActivateWITAuthority(t.Context(), &la.ActivateWITAuthorityRequest{})
	_, taint := c.TaintWITAuthority(t.Context(), &la.TaintWITAuthorityRequest{})
	_, revoke := c.RevokeWITAuthority(t.Context(), &la.RevokeWITAuthorityRequest{})
	for _, err := range []error{show, prepare, activate, taint, revoke} {
		want{int32(codes.Unimplemented), "WIT-SVID functionality is not yet implemented"}.checkError(t, err)
	}
}
