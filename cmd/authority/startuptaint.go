package main

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/daemon"
	"github.com/spiffe-node/spiffe-node/internal/startuptaint"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/k8spsat"
)

// addStartupTaint adds who takes the start-up taint off nodes.
func (p *parts) addStartupTaint(td spiffeid.TrustDomain, nodes *adminapi.Nodes, of *process) error {
	cfg, k := of.cfg.StartupTaint, of.cfg.NodeAttestation.K8sPSAT
	if cfg.Key == "" {
		return nil
	}
	rest, err := k8spsat.RESTConfig(k.KubeConfigFile)
	if err != nil {
		return fmt.Errorf("startupTaint: %w", err)
	}
	kube, err := startuptaint.NewKube(rest)
	if err != nil {
		return fmt.Errorf("startupTaint: %w", err)
	}
	remover, err := startuptaint.New(startuptaint.Config{
		API:    kube,
		Key:    cfg.Key,
		Driver: cfg.Driver,
		Agents: k.ServiceAccountAllowList,
		Serving: func(nodeUID string) error {
			id, err := k8spsat.AgentID(td, k.Cluster, nodeUID)
			if err != nil {
				return err
			}
			return nodes.Serving(id)
		},
		Logger:  of.log,
		Metrics: startuptaint.NewMetrics(of.metrics),
	})
	if err != nil {
		return err
	}
	p.tasks = append(p.tasks, daemon.Task{Name: "start-up taint", Run: remover.Run})
	return nil
}
