package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/inspecttls"
	"github.com/spiffe-node/spiffe-node/internal/inspecttls/kubereview"
	"github.com/spiffe-node/spiffe-node/internal/podevent"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// openCluster opens what the agent says to a cluster: events on pods, where
// pods come from its API server, and the Inspect port, where it is configured.
func (n *node) openCluster(ctx context.Context, a *agent) error {
	cfg := a.cfg
	if cfg.Mode != config.ModeKubernetes {
		return nil
	}
	kubeconfig, agent := cfg.Attestation.Kubernetes.Pods.Kubeconfig, "spiffe-node-sds-agent/"+version
	if n.pods.HasAPI() {
		writer, err := podevent.NewKube(kubeconfig, agent, cfg.Node.Name)
		if err != nil {
			return fmt.Errorf("pod events: %w", err)
		}
		if n.events, err = podevent.New(writer, a.log, a.metrics); err != nil {
			return fmt.Errorf("pod events: %w", err)
		}
	}
	if cfg.Inspect.Address == "" {
		return nil
	}
	reviewer, err := kubereview.New(kubeconfig, agent)
	if err != nil {
		return fmt.Errorf("inspect.address: %w", err)
	}
	n.inspect, err = inspecttls.New(ctx, inspecttls.Config{
		Address:  cfg.Inspect.Address,
		TLS:      &tls.Config{GetCertificate: n.certificate, MinVersion: tls.VersionTLS13},
		Source:   inspector{agent: a, node: n},
		Reviewer: reviewer,
		Node:     cfg.Node.Name,
		Logger:   a.log,
		Audit:    a.audit,
	})
	if err != nil {
		return fmt.Errorf("inspect.address: %w", err)
	}
	a.log.Info("inspect port", slog.String("address", n.inspect.Addr().String()))
	return nil
}

// report has an event written on the caller's pod, if it is in one.
func (n *node) report(s attest.Subject, reason string, note func() string) {
	b, ok := s.(*attest.Binding)
	if !ok || n.events == nil {
		return
	}
	if pod, known := b.Pod(); known {
		n.events.Report(podevent.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}, reason, note)
	}
}

// reportLate says on the pod why a process of it has no identity. Whoever waits
// is not kept waiting for the reason.
func (n *node) reportLate(s attest.Subject, since time.Time) {
	n.report(s, podevent.ReasonLate, func() string { return n.whyLate(s, since) })
}

// whyLate is the reason; empty if the identity came meanwhile.
func (n *node) whyLate(s attest.Subject, since time.Time) string {
	in, known := n.manager.Inspect(s)
	if !known || len(in.Waiting) == 0 {
		return ""
	}
	var why string
	switch {
	case !in.Synced:
		why = "the node's agent has not heard from its authority yet"
	case len(in.Entries) == 0:
		why = "no registration entry matches it" + n.nearestOwn(in.Selectors)
	default:
		e := in.Entries[0]
		if e.Serial != "" {
			return ""
		}
		why = "the authority has not signed " + e.Entry.SPIFFEID.String()
	}
	return fmt.Sprintf("A process of this pod has waited %s for its SPIFFE identity: %s. It gets one as soon as there is one; kubectl spiffe explain says more.",
		time.Since(since).Round(time.Second), why)
}

// nearestOwn names the entry that lacks least of those that are for this pod's
// namespace or for any: events are read by the people of the namespace, whom
// the entries of others are no concern of. An entry for one other pod is no hint.
func (n *node) nearestOwn(selectors attest.Selectors) string {
	const looked = 16
	ofOthers := func(sel attest.Selector) bool {
		return slices.ContainsFunc([]string{"k8s:ns:", "k8s:pod-uid:", "k8s:pod-name:"}, func(prefix string) bool {
			return strings.HasPrefix(sel.String(), prefix)
		})
	}
	for _, near := range n.manager.Entries().Nearest(selectors, looked) {
		if slices.ContainsFunc(near.Missing, ofOthers) {
			continue
		}
		var missing []string
		for _, sel := range near.Missing {
			missing = append(missing, sel.String())
		}
		return fmt.Sprintf("; the nearest, for %s, asks for %s, which it lacks", near.Entry.SPIFFEID, strings.Join(missing, ", "))
	}
	return ""
}

// onAmbiguous says on the pod that nobody decided which identity is its default.
func (n *node) onAmbiguous(s attest.Subject, chosen, other *entry.Entry) {
	n.report(s, podevent.ReasonConflict, func() string {
		why := "is older than"
		if chosen.CreatedAt.Equal(other.CreatedAt) {
			why = "has a smaller ID, being as old as"
		}
		return fmt.Sprintf("%s is the default identity only because its entry %s that of %s: both match with as many selectors. Give one of them more selectors, or name the identity wanted.",
			chosen.SPIFFEID, why, other.SPIFFEID)
	})
}
