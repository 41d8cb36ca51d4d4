package main

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/internal/podinfo"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// openPods opens the witnesses of pods: the publish ledger, and what is
// configured besides.
func (n *node) openPods(cfg *config.Agent, reg prometheus.Registerer) (err error) {
	k := cfg.Attestation.Kubernetes
	n.ledger, err = ledger.NewReader(ledger.ReaderConfig{
		Dir:       k.LedgerDirectory,
		OnPublish: func(r ledger.Record) { n.pods.Published(r.Pod()) },
		Logger:    n.log,
	})
	if err != nil {
		return fmt.Errorf("attestation.kubernetes.ledgerDirectory: %w", err)
	}
	pods := podinfo.Config{
		Node:    cfg.Node.Name,
		Ledger:  n.ledger,
		OnPod:   n.onPod,
		Logger:  n.log,
		Metrics: podinfo.NewMetrics(reg),
	}
	if n.stateDir != "" {
		// The identities' state has made the directory and checked that it is a
		// private one in memory.
		pods.StateFile = filepath.Join(n.stateDir, "pods.json")
	}
	source, err := podFacts(k.Pods, &pods)
	if err != nil {
		return err
	}
	if k.Pods.CRISocket != "" {
		if pods.Runtime, err = podinfo.NewRuntime(k.Pods.CRISocket); err != nil {
			return fmt.Errorf("attestation.kubernetes.pods.criSocket: %w", err)
		}
	}
	if n.pods, err = podinfo.New(pods); err != nil {
		return fmt.Errorf("attestation.kubernetes.pods: %w", err)
	}
	n.log.Info("pod facts", slog.String("source", source), slog.Bool("runtime", pods.Runtime != nil))
	return nil
}

// podFacts says what is asked for labels, owners, images and containers.
func podFacts(p config.Pods, out *podinfo.Config) (source string, err error) {
	const key = "attestation.kubernetes.pods"
	switch p.Source {
	case config.PodsKubelet:
		out.Kubelet, err = podinfo.NewKubelet(podinfo.KubeletConfig{
			Address:    p.Kubelet.Address,
			TokenPath:  p.Kubelet.TokenPath,
			CAPath:     p.Kubelet.CAPath,
			SkipVerify: p.Kubelet.InsecureSkipVerify,
		})
		if err != nil {
			return "", fmt.Errorf("%s.kubelet: %w", key, err)
		}
		return config.PodsKubelet, nil
	case config.PodsNone:
		return config.PodsNone, nil
	}
	out.API, err = podinfo.NewAPI(p.Kubeconfig, "spiffe-node-sds-agent/"+version)
	switch {
	case errors.Is(err, podinfo.ErrNoAPI) && p.Source == config.PodsAuto:
		out.API = nil
		return config.PodsNone, nil
	case err != nil:
		return "", fmt.Errorf("%s.source: %w", key, err)
	}
	out.NamespaceLabels = p.NamespaceLabels
	return config.PodsWatch, nil
}

// onPod has the SVIDs of a pod signed before its containers start.
func (n *node) onPod(pod attest.Pod) {
	n.hurry()
	n.manager.Warm(attest.NewSelectors(pod.K8sSelectors()...))
}
