package adminapi

import (
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

const (
	// watchKeepalive is how often a stream says something when there is
	// nothing to say.
	watchKeepalive = 20 * time.Second
	// watchPiece bounds one event, in bytes; clients take four times as much.
	watchPiece = 1 << 20
)

// watchService is spiffe.node.watch.v1.Watch.
type watchService struct {
	watchpb.UnimplementedWatchServer
	nodes    *Nodes
	stopping <-chan struct{}
}

// Watch pushes what the calling agent is authorized for, and the bundles.
func (s *watchService) Watch(req *watchpb.WatchRequest, stream grpc.ServerStreamingServer[watchpb.WatchEvent]) error {
	c := callerOf(stream.Context())
	if c.agent == nil {
		return errDenied(watchpb.Watch_Watch_FullMethodName)
	}
	s.nodes.cfg.Metrics.watching.Inc()
	defer s.nodes.cfg.Metrics.watching.Dec()
	defer s.nodes.cfg.Authority.AgentSeen(c.agent.ID)
	w := &watcher{nodes: s.nodes, caller: c, send: stream.Send}
	expired := time.NewTimer(time.Until(c.cert.NotAfter))
	defer expired.Stop()
	alive := time.NewTicker(watchKeepalive)
	defer alive.Stop()
	var ended func()
	defer func() {
		if ended != nil {
			ended()
		}
	}()
	for resume := req.GetResume(); ; resume = "" {
		// Taken before looking, so that nothing falls in between.
		changes := s.nodes.cfg.Authority.Changes()
		if err := w.push(resume); err != nil {
			return err
		}
		if ended == nil {
			ended = s.nodes.serves(c.agent.ID)
		}
		select {
		case <-changes.Entries:
		case <-changes.Bundles:
		case <-changes.Agents:
		case <-alive.C:
			s.nodes.cfg.Authority.AgentSeen(c.agent.ID)
			if err := stream.Send(&watchpb.WatchEvent{}); err != nil {
				return err
			}
		case <-expired.C:
			return errAgent(watchpb.Watch_Watch_FullMethodName, typespb.PermissionDeniedDetails_AGENT_EXPIRED)
		case <-s.stopping:
			return fail(codes.Unavailable, "the authority is stopping", nil)
		case <-stream.Context().Done():
			return nil
		}
	}
}

// watcher is one stream: what it has been told.
type watcher struct {
	nodes  *Nodes
	caller *caller
	send   func(*watchpb.WatchEvent) error

	view    *nodeView
	entries *entry.Set // nil = nothing yet
	bundles embedded.BundleView
}

// push sends what is new. The agent must still be who it was.
func (w *watcher) push(resume string) error {
	agent, reason := w.nodes.standing(w.caller)
	switch {
	case reason == typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE:
		// Most often the agent itself, with a newer SVID. If it was not, its
		// next call will say so.
		return fail(codes.Unavailable, "the SVID of this connection has been replaced by a newer one; call again with that", nil)
	case reason != 0:
		return errAgent(watchpb.Watch_Watch_FullMethodName, reason)
	}
	view := w.nodes.view(agent)
	bundles := w.nodes.cfg.Authority.BundleView()
	out := &pieces{send: w.send, event: &watchpb.WatchEvent{}}
	set := view.Set()
	delta, known := w.since(view, set, bundles.Version, resume)
	if !known {
		delta, out.reset = entry.Delta{}, true
		for e := range set.All() {
			delta.Changed = append(delta.Changed, e)
		}
		w.bundles = embedded.BundleView{}
	}
	resumed := w.entries == nil && known
	w.view, w.entries = view, set
	for _, e := range delta.Removed {
		if err := out.removed(e.ID); err != nil {
			return err
		}
	}
	for _, e := range delta.Changed {
		if err := out.entry(e); err != nil {
			return err
		}
	}
	if resumed {
		w.bundles = bundles
	} else if err := w.pushBundles(bundles, out); err != nil {
		return err
	}
	if !out.dirty && !out.reset && !resumed {
		return nil
	}
	w.nodes.cfg.Metrics.pushed.Inc()
	return out.finish(fmt.Sprintf("%s.%d.%d", view.name, set.Version(), bundles.Version))
}

// since is what changed in the entries since the last push, or since the
// position to resume from; false = start over.
func (w *watcher) since(view *nodeView, set *entry.Set, bundles uint64, resume string) (entry.Delta, bool) {
	if w.entries != nil {
		if view != w.view {
			return entry.Delta{}, false
		}
		return set.Since(w.entries)
	}
	var version, bundleVersion uint64
	if n, err := fmt.Sscanf(resume, view.name+".%d.%d", &version, &bundleVersion); err != nil || n != 2 || bundleVersion != bundles {
		return entry.Delta{}, false
	}
	return set.Changes(version)
}

// pushBundles adds the bundles that are new.
func (w *watcher) pushBundles(now embedded.BundleView, out *pieces) error {
	if now.Own != w.bundles.Own {
		if err := out.own(now.Own); err != nil {
			return err
		}
	}
	for td, b := range now.Federated {
		if w.bundles.Federated[td] != b {
			if err := out.federated(b); err != nil {
				return err
			}
		}
	}
	for td := range w.bundles.Federated {
		if now.Federated[td] == nil {
			if err := out.removedBundle(td); err != nil {
				return err
			}
		}
	}
	w.bundles = now
	return nil
}

// pieces cuts one change into events of bounded size.
type pieces struct {
	send  func(*watchpb.WatchEvent) error
	reset bool // to be said in the first event
	dirty bool // there is something to say

	event *watchpb.WatchEvent
	size  int
}

// add makes room for an item and has it added.
func (p *pieces) add(size int, add func(*watchpb.WatchEvent)) error {
	p.dirty = true
	if p.size > 0 && p.size+size > watchPiece || len(p.event.GetEntries()) == syncPage {
		if err := p.flush(true, ""); err != nil {
			return err
		}
	}
	p.size += size
	add(p.event)
	return nil
}

func (p *pieces) entry(e *entry.Entry) error {
	out := spirewire.EntryToWire(e)
	return p.add(proto.Size(out), func(v *watchpb.WatchEvent) { v.Entries = append(v.Entries, out) })
}

func (p *pieces) removed(id string) error {
	return p.add(len(id), func(v *watchpb.WatchEvent) { v.RemovedEntries = append(v.RemovedEntries, id) })
}

func (p *pieces) own(b *embedded.Bundle) error {
	out := bundleToWire(b)
	return p.add(proto.Size(out), func(v *watchpb.WatchEvent) { v.Bundle = out })
}

func (p *pieces) federated(b *embedded.Bundle) error {
	out := bundleToWire(b)
	return p.add(proto.Size(out), func(v *watchpb.WatchEvent) { v.FederatedBundles = append(v.FederatedBundles, out) })
}

func (p *pieces) removedBundle(td spiffeid.TrustDomain) error {
	return p.add(len(td.Name()), func(v *watchpb.WatchEvent) { v.RemovedBundles = append(v.RemovedBundles, td.Name()) })
}

func (p *pieces) finish(version string) error { return p.flush(false, version) }

func (p *pieces) flush(more bool, version string) error {
	event := p.event
	event.More, event.Version, event.Reset_ = more, version, p.reset
	p.event, p.reset, p.size = &watchpb.WatchEvent{}, false, 0
	return p.send(event)
}
