package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/spiffe-node/spiffe-node/internal/adminapi/inspectpb"
)

// rotation asks an authority how its signing keys stand; nil where there is no
// authority of ours at the other end.
func rotation(ctx context.Context, conn grpc.ClientConnInterface) (*inspectpb.ShowRotationResponse, error) {
	resp, err := inspectpb.NewRotationClient(conn).Show(ctx, &inspectpb.ShowRotationRequest{})
	if status.Code(err) == codes.Unimplemented {
		return nil, nil //nolint:nilnil // an answer, too
	}
	return resp, err
}

// printRotation says when the next key signs and who is not ready for it.
func printRotation(w io.Writer, resp *inspectpb.ShowRotationResponse, now time.Time) {
	line := func(label, format string, args ...any) {
		fmt.Fprintf(w, "%-16s %s\n", label, clean(fmt.Sprintf(format, args...)))
	}
	for _, r := range resp.GetRotations() {
		name := map[string]string{"x509": "X.509 keys", "jwt": "JWT keys"}[r.GetKind()]
		line(cmp.Or(name, r.GetKind()), "%s", keyText("active", r.GetActive(), now))
		if r.GetPrepared() != nil {
			line("", "%s", keyText("prepared", r.GetPrepared(), now))
		}
		if r.GetOld() != nil {
			line("", "%s", keyText("old", r.GetOld(), now))
		}
		switch {
		case r.GetDelayed():
			line("", "next: activate, delayed since %s until everybody has acknowledged it, at most until %s (%s)",
				clock(r.GetNextAt()), clock(r.GetDeadline()), ahead(r.GetDeadline(), now))
		default:
			line("", "next: %s %s (%s)", r.GetNextStep(), ahead(r.GetNextAt(), now), clock(r.GetNextAt()))
		}
		which := "active"
		if r.GetPrepared() != nil {
			which = "prepared"
		}
		line("", "%s key acknowledged by %d of %s (%d cannot say), %s lagging of %d",
			which, r.GetAgentsAcknowledged(), count(r.GetAgents(), "agent", "agents"), r.GetAgentsSilent(),
			count(r.GetConsumersLagging(), "consumer", "consumers"), r.GetConsumers())
		if n := r.GetOutdatedSvids(); n > 0 {
			line("", "%s still to be replaced: below a tainted or revoked key", count(n, "X.509-SVID", "X.509-SVIDs"))
		}
		for _, l := range r.GetLaggards() {
			line("", "lags: %s: %s", l.GetAgentId(), l.GetWhy())
			for _, c := range l.GetLaggards() {
				line("", "  %s", laggardText(c))
			}
		}
	}
}

// ahead is how far ahead a moment is; what is due happens now.
func ahead(t *timestamppb.Timestamp, now time.Time) string {
	if !t.AsTime().After(now) {
		return "now"
	}
	return "in " + until(t, now)
}

func keyText(state string, k *inspectpb.KeyRotation_Key, now time.Time) string {
	expires := "expired"
	if k.GetExpiresAt().AsTime().After(now) {
		expires = "expires in " + until(k.GetExpiresAt(), now)
	}
	text := fmt.Sprintf("%s %s, %s (%s)", state, shorten(k.GetId()), expires, clock(k.GetExpiresAt()))
	switch {
	case k.GetTainted():
		text += ", tainted"
	case k.GetRevoked():
		text += ", revoked"
	}
	return text
}

func laggardText(l *inspectpb.Laggard) string {
	if l.GetRejected() != "" {
		return fmt.Sprintf("%s (%s) rejected it: %s", l.GetName(), l.GetApi(), l.GetRejected())
	}
	return fmt.Sprintf("%s (%s) has not acknowledged it", l.GetName(), l.GetApi())
}

// printTrust is how far the trust bundle has got on one node.
func printTrust(w io.Writer, t *inspectpb.StatusResponse_Trust) {
	line := func(label, format string, args ...any) {
		fmt.Fprintf(w, "%-16s %s\n", label, clean(fmt.Sprintf(format, args...)))
	}
	if t == nil || len(t.GetX509().GetHeld()) == 0 {
		return
	}
	line("Trust bundle", "%s, acknowledged by %d of %s", count(len(t.GetX509().GetHeld()), "root", "roots"),
		t.GetX509().GetConsumers()-t.GetX509().GetLagging(), count(t.GetX509().GetConsumers(), "consumer", "consumers"))
	for _, l := range t.GetX509().GetLaggards() {
		line("", "lags: %s", laggardText(l))
	}
	if n := t.GetOutdatedSvids(); n > 0 {
		line("", "%s still to be replaced: below a tainted or revoked key", count(n, "X.509-SVID", "X.509-SVIDs"))
	}
}

// authorityStatus is the status of an authority that is no agent; without one of
// ours it is the error that was met.
func (a *app) authorityStatus(ctx context.Context, conn grpc.ClientConnInterface, met error) error {
	keys, err := rotation(ctx, conn)
	switch {
	case err != nil:
		return err
	case keys == nil:
		return met
	}
	return a.print(answer{message: keys, pretty: func() error {
		printRotation(a.stdout, keys, time.Now())
		return nil
	}})
}
