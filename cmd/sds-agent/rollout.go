package main

import (
	"fmt"

	"github.com/spiffe-node/spiffe-node/internal/rollout"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/workloadapi"
)

// newRollout watches how the trust bundle spreads among the callers, for the
// authority.
func (n *node) newRollout() *rollout.Reporter {
	report := func(r authority.TrustReport) { n.authority.ReportTrust(n.id, r) }
	if n.server != nil {
		report = n.server.ReportTrust
	}
	return rollout.New(rollout.Config{Holder: n.manager, Consumers: n.public.consumers, Names: n.peerNames, Report: report})
}

// consumers visits the open streams that carry the own trust bundle.
func (p *public) consumers(visit func(rollout.Consumer)) {
	if p.sds != nil {
		p.sds.Roots(func(s sds.RootsStatus) {
			visit(rollout.Consumer{Peer: s.Peer, API: s.Kind, Acknowledged: s.Acked, Rejected: s.Rejected, Text: s.Text})
		})
	}
	if p.workload != nil {
		p.workload.Trust(func(s workloadapi.TrustStatus) {
			visit(rollout.Consumer{Peer: s.Peer, API: s.Method, JWT: s.JWT, Acknowledged: s.Sent})
		})
	}
}

// peerNames says who connections belong to.
func (n *node) peerNames(peers map[uint64]string) {
	for _, p := range n.public.listener.Connections() {
		if _, wanted := peers[p.ID()]; !wanted {
			continue
		}
		name := fmt.Sprintf("process %d", p.Caller().PID)
		if s, err := p.Subject(); err == nil {
			if b, ok := s.(*attest.Binding); ok {
				if pod, known := b.Pod(); known {
					name = pod.Namespace + "/" + pod.Name
				}
			}
		}
		peers[p.ID()] = name
	}
}
