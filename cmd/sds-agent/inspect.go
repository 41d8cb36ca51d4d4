package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/peersock"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// inspector answers the Inspect service from what the parts know. It never
// touches a private key: none of the types it reads has one to give.
type inspector struct {
	agent *agent
	node  *node
}

var _ adminapi.Source = inspector{}

// Status is the agent at a glance.
func (i inspector) Status(context.Context) (*adminapi.Status, error) {
	n, cfg, stat := i.node, i.agent.cfg, i.node.manager.Status()
	peers := n.public.listener.Connections()
	mode := "unix"
	if cfg.Mode == config.ModeKubernetes {
		mode = config.ModeKubernetes
	}
	streams := int64(0)
	for _, s := range i.streams() {
		streams += int64(len(s))
	}
	return &adminapi.Status{
		TrustDomain:        cfg.TrustDomain,
		AgentID:            n.agentID(),
		Version:            version,
		StartedAt:          i.agent.started,
		Mode:               mode,
		PeerIdentification: n.public.listener.Mode(),
		Authority:          n.authorityStatus(),
		Entries:            int64(stat.Entries),
		Connections:        int64(len(peers)),
		Streams:            streams,
		Parked:             int64(stat.Parked),
		Limits: []adminapi.Limit{
			{Name: "connections", Used: int64(len(peers)), Max: int64(cfg.Limits.Connections)},
			{Name: "connections per pod", Used: busiest(peers, limitKey), Max: int64(cfg.Limits.ConnectionsPerPod)},
			{Name: "connections per user", Used: busiest(peers, userOf), Max: int64(cfg.Limits.ConnectionsPerUID)},
		},
		Sockets:  n.socketNames(cfg),
		Warnings: i.warnings(stat),
		Trust:    n.rollout.Look(),
	}, nil
}

func (i inspector) warnings(stat svid.Status) []string {
	var out []string
	if i.node.public.listener.Mode() != peersock.ModePidfd {
		out = append(out, "this kernel cannot name peers by process descriptor (SO_PEERPIDFD, Linux 6.5): a reused process number could be mistaken")
	}
	if w := i.node.swapWarning(); w != "" {
		out = append(out, w)
	}
	if err := i.node.ready(); err != nil {
		out = append(out, "not ready: "+err.Error())
	}
	if i.node.pods != nil {
		out = append(out, i.node.pods.Problems()...)
	}
	if stat.LastError != "" && stat.LastFailure.After(stat.LastGood) {
		out = append(out, "the authority does not sign: "+stat.LastError)
	}
	return out
}

// busiest is the largest number of peers that share a key.
func busiest(peers []*peersock.Peer, key func(*peersock.Peer) string) int64 {
	counts := map[string]int64{}
	for _, p := range peers {
		counts[key(p)]++
	}
	if len(counts) == 0 {
		return 0
	}
	return slices.Max(slices.Collect(maps.Values(counts)))
}

func limitKey(p *peersock.Peer) string {
	if s, err := p.Subject(); err == nil {
		return s.LimitKey()
	}
	return userOf(p)
}

func userOf(p *peersock.Peer) string { return fmt.Sprintf("uid:%d", p.Caller().UID) }

// Connections are those of the public socket, oldest first.
func (i inspector) Connections(context.Context) ([]adminapi.Connection, error) {
	return i.connections(func(*peersock.Peer) bool { return true }), nil
}

func (i inspector) connections(want func(*peersock.Peer) bool) []adminapi.Connection {
	streams := i.streams()
	var out []adminapi.Connection
	for _, p := range i.node.public.listener.Connections() {
		if !want(p) {
			continue
		}
		subject, err := p.Subject()
		c := adminapi.Connection{ID: p.ID(), Caller: callerInfo(p.Caller(), subject, err), Since: p.Since(), Streams: streams[p.ID()]}
		slices.SortFunc(c.Streams, func(a, b adminapi.Stream) int { return a.Since.Compare(b.Since) })
		out = append(out, c)
	}
	return out
}

// streams are all open streams by the connection they run on.
func (i inspector) streams() map[uint64][]adminapi.Stream {
	ids := i.spiffeIDs()
	out := map[uint64][]adminapi.Stream{}
	if i.node.public.sds != nil {
		for _, s := range i.node.public.sds.Streams() {
			st := adminapi.Stream{
				API: "sds", Since: s.OpenedAt, Names: s.Names, Late: s.Late, Unknown: s.Unknown,
				Version: s.Version, LastPush: s.SentAt, LastACK: s.AckedAt, LastNACK: s.NackedAt, NACKText: s.NackText,
			}
			if s.Kind == "delta" {
				st.API = "sds-delta"
			}
			if len(s.Late) > 0 {
				st.ParkedSince = s.LateSince
			}
			for _, v := range s.Served {
				st.Served = append(st.Served, adminapi.Served{Name: v.Name, Serial: v.Serial, SPIFFEID: ids[v.Serial].id, ExpiresAt: ids[v.Serial].expires})
			}
			out[s.Peer] = append(out[s.Peer], st)
		}
	}
	if i.node.public.workload != nil {
		for _, s := range i.node.public.workload.Streams() {
			st := adminapi.Stream{API: s.Method, Since: s.OpenedAt, LastPush: s.SentAt}
			if s.Late {
				st.ParkedSince = s.OpenedAt
			}
			for _, serial := range s.Serials {
				st.Served = append(st.Served, adminapi.Served{Serial: serial, SPIFFEID: ids[serial].id, ExpiresAt: ids[serial].expires})
			}
			out[s.Peer] = append(out[s.Peer], st)
		}
	}
	return out
}

type issued struct {
	id      string
	expires time.Time
}

// spiffeIDs says whose each serial in use is.
func (i inspector) spiffeIDs() map[string]issued {
	out := map[string]issued{}
	seen := map[attest.Subject]bool{}
	for _, p := range i.node.public.listener.Connections() {
		s, err := p.Subject()
		if err != nil || seen[s] {
			continue
		}
		seen[s] = true
		in, ok := i.node.manager.Inspect(s)
		if !ok {
			continue
		}
		for _, e := range in.Entries {
			if e.Serial != "" {
				out[e.Serial] = issued{id: e.Entry.SPIFFEID.String(), expires: e.NotAfter}
			}
		}
	}
	return out
}

func callerInfo(c attest.Caller, subject attest.Subject, err error) adminapi.CallerInfo {
	info := adminapi.CallerInfo{PID: c.PID, UID: c.UID, GID: c.GID}
	b, ok := subject.(*attest.Binding)
	if err == nil && ok {
		info.PodUID, info.ContainerID, info.Witnesses, info.Selectors = b.PodUID(), b.ContainerID(), b.Witnesses(), b.Selectors()
		if pod, known := b.Pod(); known {
			info.PodNamespace, info.PodName, info.ServiceAccount = pod.Namespace, pod.Name, pod.ServiceAccount
		}
		err = b.Err()
	}
	if errors.Is(err, attest.ErrDenied) {
		info.Denied = err.Error()
	}
	return info
}
