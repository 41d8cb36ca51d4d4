package spireserver

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

var (
	errNoTrust     = errors.New("no trust bundle to verify the server with")
	errNotAttested = fmt.Errorf("%w: this agent is not attested yet", authority.ErrNotReady)
	errProtocol    = errors.New("the server broke the protocol")
	errTurnedAway  = fmt.Errorf("%w: the server has turned this agent's SVID away", authority.ErrNotReady)
	errClosed      = fmt.Errorf("%w: the client is closed", authority.ErrNotReady)
)

type reason = typespb.PermissionDeniedDetails_Reason

// Why a server turns an agent away; none is any other answer.
const (
	none         = typespb.PermissionDeniedDetails_UNKNOWN
	expired      = typespb.PermissionDeniedDetails_AGENT_EXPIRED
	notAttested  = typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED
	notActive    = typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE
	banned       = typespb.PermissionDeniedDetails_AGENT_BANNED
	mustReattest = typespb.PermissionDeniedDetails_AGENT_MUST_REATTEST
)

// deniedReason is why the server turned this agent away.
func deniedReason(err error) reason {
	s, ok := status.FromError(err)
	if !ok || s.Code() != codes.PermissionDenied {
		return none
	}
	for _, d := range s.Details() {
		if d, ok := d.(*typespb.PermissionDeniedDetails); ok {
			switch r := d.GetReason(); r {
			case expired, notAttested, notActive, banned, mustReattest:
				return r
			}
		}
	}
	return none
}

// sentinel wraps an error of a call in what it means for the caller.
func sentinel(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, authority.ErrRefused), errors.Is(err, authority.ErrTryLater), errors.Is(err, authority.ErrNotReady):
		return err
	}
	switch status.Code(err) {
	case codes.NotFound, codes.InvalidArgument, codes.Unimplemented:
		return fmt.Errorf("%w: %w", authority.ErrRefused, err)
	}
	return fmt.Errorf("%w: %w", authority.ErrTryLater, err)
}

// unreachable says whether an error is that of a server that is not there.
func unreachable(err error) bool { return status.Code(err) == codes.Unavailable }

// handshakeFailed says whether a server that is there and this client do not
// agree on who they are.
func handshakeFailed(err error) bool { return strings.Contains(err.Error(), "handshake failed") }

// certificateRefused says whether the server ended the handshake over the
// certificate it was shown.
func certificateRefused(err error) bool {
	return unreachable(err) && strings.Contains(err.Error(), "remote error: tls: ")
}

// pause is the time to wait after so many earlier failures: doubling up to
// retryMax, of which the upper half is jitter.
func pause(failures int) time.Duration {
	d := retryMax
	if failures < 5 {
		d = min(retryMin<<failures, d)
	}
	return d/2 + jitter(d/2)
}

// jitter is a random part of d.
func jitter(d time.Duration) time.Duration {
	return rand.N(d + 1) //nolint:gosec // it spreads load and guards nothing
}

// around is d, give or take a tenth.
func around(d time.Duration) time.Duration { return d - d/10 + jitter(d/5) }
