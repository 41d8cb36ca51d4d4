package spireserver

import (
	"context"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// tellAgain is the pause after a report that did not arrive.
const tellAgain = 5 * time.Second

// ReportTrust has the authority told how far the own trust bundle has got on
// this node: now, and whenever a watch starts anew. An authority that does not
// push does not ask for it. It never blocks.
func (c *Client) ReportTrust(r authority.TrustReport) {
	c.told.Store(&r)
	signal(c.tell)
}

// keepReports tells the newest report until ctx ends.
func (c *Client) keepReports(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.tell:
		}
		r := c.told.Load()
		if r == nil || !c.report.status().Watching {
			continue
		}
		err := c.call(ctx, "ReportTrust", func(ctx context.Context, cc grpc.ClientConnInterface) error {
			_, err := watchpb.NewWatchClient(cc).ReportTrust(ctx, reportToWire(r))
			return err
		})
		switch {
		case err == nil:
			continue
		case status.Code(err) == codes.Unimplemented:
			continue // an older authority; the next watch may be another's
		}
		c.log.Debug("the authority was not told how far the trust bundle has got", slog.Any("error", err))
		timer := time.NewTimer(tellAgain + jitter(tellAgain))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
			signal(c.tell)
		}
	}
}

func reportToWire(r *authority.TrustReport) *watchpb.TrustReport {
	progress := func(p authority.TrustProgress) *watchpb.TrustProgress {
		out := &watchpb.TrustProgress{Held: p.Held, Acknowledged: p.Acknowledged, Consumers: int64(p.Consumers), Lagging: int64(p.Lagging)}
		for _, l := range p.Laggards {
			out.Laggards = append(out.Laggards, &watchpb.TrustProgress_Laggard{Name: l.Name, Api: l.API, Rejected: l.Rejected})
		}
		return out
	}
	return &watchpb.TrustReport{X509: progress(r.X509), Jwt: progress(r.JWT), OutdatedSvids: int64(r.Outdated)}
}
