package adminapi

import (
	"context"
	"net/netip"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Page is readPage and page.next for tests.
func Page(size int32, token string, n int, last int64) (after int64, next string, err error) {
	p, err := readPage(size, token)
	return p.after, p.next(n, last), err
}

// Cut is one page of the numbers.
func Cut(size int32, token string, rows []int64) (items []int64, next string, err error) {
	p, err := readPage(size, token)
	if err != nil {
		return nil, "", err
	}
	items, last := cut(p, rows, func(r int64) int64 { return r })
	return items, p.next(len(items), last), nil
}

// ApplyMask clears fields of msg as the mask says.
func ApplyMask[M interface {
	comparable
	proto.Message
}](mask M, msg proto.Message,
) {
	newMasker(mask).apply(msg)
}

// SyncEntries is the sync protocol over any stream.
func SyncEntries(s interface {
	Recv() (*entrypb.SyncAuthorizedEntriesRequest, error)
	Send(*entrypb.SyncAuthorizedEntriesResponse) error
}, set *entry.Set, page int,
) error {
	return syncEntries(s, set, page)
}

// Limiter is a rate limiter whose callers have the given addresses.
type Limiter struct{ l *limiter }

// NewLimiter makes one.
func NewLimiter(perSecond int) Limiter { return Limiter{newLimiter(perSecond, "rejecting request")} }

// Wait takes n tokens for a caller.
func (l Limiter) Wait(ctx context.Context, address netip.Addr, n int) error {
	return l.l.wait(context.WithValue(ctx, callerKey{}, &caller{address: address}), n)
}

// Buckets is how many callers are remembered.
func (l Limiter) Buckets() int { return len(l.l.buckets) }

// Views is how many agents' views are remembered.
func (n *Nodes) Views() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.views)
}

// AttestOver is AttestAgent over any stream.
func (n *Nodes) AttestOver(s grpc.BidiStreamingServer[agentpb.AttestAgentRequest, agentpb.AttestAgentResponse]) error {
	return (&nodeAgents{agentService{td: n.cfg.TrustDomain, store: n.cfg.Authority}, n}).AttestAgent(s)
}
