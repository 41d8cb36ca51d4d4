package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/localauthoritypb"
)

type (
	localAuthorityClient = localauthoritypb.LocalAuthorityClient
	authorityState       = localauthoritypb.AuthorityState
)

// warningTrailer is where an authority says what an operator should know about
// a step that was taken nevertheless. SPIRE Server never sets it.
const warningTrailer = "spiffe-node-warning"

// keyKind is one of the two kinds of local authorities with its calls.
type keyKind struct {
	use, name  string
	getProblem string // before the error of show
	show       func(ctx context.Context, c localAuthorityClient) (msg proto.Message, active, prepared, old *authorityState, err error)
	steps      []keyStep
}

// keyStep is a command that changes one authority.
type keyStep struct {
	use, short, done string
	idUsage          string // empty: takes no authority ID
	take             func(ctx context.Context, c localAuthorityClient, id string, opts ...grpc.CallOption) (proto.Message, *authorityState, error)
}

func (a *app) localAuthorityCommand() *cobra.Command {
	return group("localauthority", "Manage the authority's own signing keys", a.keyCommand(x509Authorities()), a.keyCommand(jwtAuthorities()))
}

func x509Authorities() keyKind {
	return keyKind{
		use: "x509", name: "X.509", getProblem: "could not get X.509 authorities: ",
		show: func(ctx context.Context, c localAuthorityClient) (proto.Message, *authorityState, *authorityState, *authorityState, error) {
			r, err := c.GetX509AuthorityState(ctx, &localauthoritypb.GetX509AuthorityStateRequest{})
			return r, r.GetActive(), r.GetPrepared(), r.GetOld(), err
		},
		steps: []keyStep{
			{"prepare", "Makes a new X.509 authority and adds it to the bundle", "Prepared", "", func(ctx context.Context, c localAuthorityClient, _ string, opts ...grpc.CallOption) (proto.Message, *authorityState, error) {
				r, err := c.PrepareX509Authority(ctx, &localauthoritypb.PrepareX509AuthorityRequest{}, opts...)
				return r, r.GetPreparedAuthority(), err
			}},
			{"activate", "Lets the prepared X.509 authority sign from now on", "Activated", "The authority ID of the X.509 authority to activate", func(ctx context.Context, c localAuthorityClient, id string, opts ...grpc.CallOption) (proto.Message, *authorityState, error) {
				r, err := c.ActivateX509Authority(ctx, &localauthoritypb.ActivateX509AuthorityRequest{AuthorityId: id}, opts...)
				return r, r.GetActivatedAuthority(), err
			}},
			{"taint", "Marks the old X.509 authority as compromised; what it signed is replaced", "Tainted", "The authority ID of the X.509 authority to taint", func(ctx context.Context, c localAuthorityClient, id string, opts ...grpc.CallOption) (proto.Message, *authorityState, error) {
				r, err := c.TaintX509Authority(ctx, &localauthoritypb.TaintX509AuthorityRequest{AuthorityId: id}, opts...)
				return r, r.GetTaintedAuthority(), err
			}},
			{"revoke", "Removes the old, tainted X.509 authority from the bundle", "Revoked", "The authority ID of the X.509 authority to revoke", func(ctx context.Context, c localAuthorityClient, id string, opts ...grpc.CallOption) (proto.Message, *authorityState, error) {
				r, err := c.RevokeX509Authority(ctx, &localauthoritypb.RevokeX509AuthorityRequest{AuthorityId: id}, opts...)
				return r, r.GetRevokedAuthority(), err
			}},
		},
	}
}

func jwtAuthorities() keyKind {
	return keyKind{
		use: "jwt", name: "JWT",
		show: func(ctx context.Context, c localAuthorityClient) (proto.Message, *authorityState, *authorityState, *authorityState, error) {
			r, err := c.GetJWTAuthorityState(ctx, &localauthoritypb.GetJWTAuthorityStateRequest{})
			return r, r.GetActive(), r.GetPrepared(), r.GetOld(), err
		},
		steps: []keyStep{
			{"prepare", "Makes a new JWT authority and adds it to the bundle", "Prepared", "", func(ctx context.Context, c localAuthorityClient, _ string, opts ...grpc.CallOption) (proto.Message, *authorityState, error) {
				r, err := c.PrepareJWTAuthority(ctx, &localauthoritypb.PrepareJWTAuthorityRequest{}, opts...)
				return r, r.GetPreparedAuthority(), err
			}},
			{"activate", "Lets the prepared JWT authority sign from now on", "Activated", "The authority ID of the JWT authority to activate", func(ctx context.Context, c localAuthorityClient, id string, opts ...grpc.CallOption) (proto.Message, *authorityState, error) {
				r, err := c.ActivateJWTAuthority(ctx, &localauthoritypb.ActivateJWTAuthorityRequest{AuthorityId: id}, opts...)
				return r, r.GetActivatedAuthority(), err
			}},
			{"taint", "Marks the old JWT authority as compromised; its tokens are replaced", "Tainted", "The authority ID of the JWT authority to taint", func(ctx context.Context, c localAuthorityClient, id string, opts ...grpc.CallOption) (proto.Message, *authorityState, error) {
				r, err := c.TaintJWTAuthority(ctx, &localauthoritypb.TaintJWTAuthorityRequest{AuthorityId: id}, opts...)
				return r, r.GetTaintedAuthority(), err
			}},
			{"revoke", "Removes a tainted JWT authority from the bundle", "Revoked", "The authority ID of the JWT authority to revoke", func(ctx context.Context, c localAuthorityClient, id string, opts ...grpc.CallOption) (proto.Message, *authorityState, error) {
				r, err := c.RevokeJWTAuthority(ctx, &localauthoritypb.RevokeJWTAuthorityRequest{AuthorityId: id}, opts...)
				return r, r.GetRevokedAuthority(), err
			}},
		},
	}
}

func (a *app) keyCommand(k keyKind) *cobra.Command {
	subs := []*cobra.Command{command("show", "Shows the local "+k.name+" authorities", func(ctx context.Context) error {
		return a.connect(func(conn grpc.ClientConnInterface) error {
			msg, active, prepared, old, err := k.show(ctx, localauthoritypb.NewLocalAuthorityClient(conn))
			switch {
			case err != nil && k.getProblem != "":
				return fmt.Errorf("%s%w", k.getProblem, err)
			case err != nil:
				return err
			}
			return a.print(answer{message: msg, pretty: func() error {
				a.printAuthority(k.name, "Active", active)
				fmt.Fprintln(a.stdout)
				a.printAuthority(k.name, "Prepared", prepared)
				fmt.Fprintln(a.stdout)
				a.printAuthority(k.name, "Old", old)
				return nil
			}, table: authorityTable(active, prepared, old)})
		})
	})}
	for _, s := range k.steps {
		subs = append(subs, a.keyStepCommand(k, s))
	}
	return group(k.use, "Manage the "+k.name+" authorities", subs...)
}

func (a *app) keyStepCommand(k keyKind, s keyStep) *cobra.Command {
	var id string
	cmd := command(s.use, s.short, func(ctx context.Context) error {
		if s.idUsage != "" && id == "" {
			return errors.New("an authority ID is required")
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			var trailer metadata.MD
			msg, state, err := s.take(ctx, localauthoritypb.NewLocalAuthorityClient(conn), id, grpc.Trailer(&trailer))
			if err != nil {
				return fmt.Errorf("could not %s %s authority: %w", s.use, k.name, err)
			}
			a.warn(trailer)
			return a.print(answer{message: msg, pretty: func() error {
				if state == nil {
					return fmt.Errorf("the server did not say which %s authority it is", k.name)
				}
				a.printAuthority(k.name, s.done, state)
				return nil
			}})
		})
	})
	if s.idUsage != "" {
		cmd.Flags().StringVar(&id, "authorityID", "", s.idUsage)
	}
	return cmd
}

// warn shows what the authority has to say about a step it took.
func (a *app) warn(trailer metadata.MD) {
	for _, text := range trailer.Get(warningTrailer) {
		fmt.Fprintln(a.stderr, "Warning:", clean(text))
	}
}

// printAuthority writes what spire-server prints for an authority.
func (a *app) printAuthority(kind, state string, s *authorityState) {
	w := a.stdout
	fmt.Fprintf(w, "%s %s authority:\n", state, kind)
	if s == nil {
		fmt.Fprintf(w, "  No %s %s authority found\n", lowerFirst(state), kind)
		return
	}
	fmt.Fprintf(w, "  Authority ID: %s\n", s.GetAuthorityId())
	fmt.Fprintf(w, "  Expires at: %s\n", time.Unix(s.GetExpiresAt(), 0).UTC())
	switch {
	case kind != "X.509":
	case s.GetUpstreamAuthoritySubjectKeyId() != "":
		fmt.Fprintf(w, "  Upstream authority Subject Key ID: %s\n", s.GetUpstreamAuthoritySubjectKeyId())
	default:
		fmt.Fprintln(w, "  Upstream authority ID: No upstream authority")
	}
}

func lowerFirst(s string) string { return string(s[0]|0x20) + s[1:] }

func authorityTable(active, prepared, old *authorityState) func(*table, bool) {
	return func(t *table, _ bool) {
		t.columns("STATE", "AUTHORITY ID", "EXPIRES", "UPSTREAM")
		for _, row := range []struct {
			state string
			s     *authorityState
		}{{"active", active}, {"prepared", prepared}, {"old", old}} {
			if row.s != nil {
				t.row(row.state, row.s.GetAuthorityId(), time.Unix(row.s.GetExpiresAt(), 0).UTC().Format(time.RFC3339),
					cmp.Or(row.s.GetUpstreamAuthoritySubjectKeyId(), "-"))
			}
		}
	}
}

func (a *app) upstreamAuthorityCommand() *cobra.Command {
	return group("upstreamauthority", "Manage the roots of an upstream authority",
		a.upstreamStepCommand("taint", "Marks an X.509 upstream authority as compromised; what hangs on it is replaced", "Tainted",
			func(ctx context.Context, c localAuthorityClient, id string, opts ...grpc.CallOption) (proto.Message, string, error) {
				r, err := c.TaintX509UpstreamAuthority(ctx, &localauthoritypb.TaintX509UpstreamAuthorityRequest{SubjectKeyId: id}, opts...)
				return r, r.GetUpstreamAuthoritySubjectKeyId(), err
			}),
		a.upstreamStepCommand("revoke", "Removes a tainted X.509 upstream authority from the bundle", "Revoked",
			func(ctx context.Context, c localAuthorityClient, id string, opts ...grpc.CallOption) (proto.Message, string, error) {
				r, err := c.RevokeX509UpstreamAuthority(ctx, &localauthoritypb.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: id}, opts...)
				return r, r.GetUpstreamAuthoritySubjectKeyId(), err
			}))
}

func (a *app) upstreamStepCommand(use, short, done string, take func(context.Context, localAuthorityClient, string, ...grpc.CallOption) (proto.Message, string, error)) *cobra.Command {
	var id string
	cmd := command(use, short, func(ctx context.Context) error {
		if id == "" {
			return errors.New("the Subject Key ID of the X.509 upstream authority is required")
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			var trailer metadata.MD
			msg, got, err := take(ctx, localauthoritypb.NewLocalAuthorityClient(conn), id, grpc.Trailer(&trailer))
			if err != nil {
				return fmt.Errorf("could not %s X.509 upstream authority: %w", use, err)
			}
			a.warn(trailer)
			return a.print(answer{message: msg, pretty: func() error {
				fmt.Fprintf(a.stdout, "%s X.509 upstream authority:\n  Subject Key ID: %s\n", done, got)
				return nil
			}})
		})
	})
	cmd.Flags().StringVar(&id, "subjectKeyID", "", "The X.509 Subject Key Identifier of the upstream authority's CA certificate to "+use)
	return cmd
}
