package main

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/daemon"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/k8spsat"
	"github.com/spiffe-node/spiffe-node/pkg/registration"
)

// addRegistration adds the registrar. It waits for the API server as long as it
// takes and is no part of readiness: agents are served without it.
func (p *parts) addRegistration(td spiffeid.TrustDomain, of *process) error {
	cfg := of.cfg.Registration
	if !cfg.Enabled {
		return nil
	}
	rest, err := k8spsat.RESTConfig(of.cfg.NodeAttestation.K8sPSAT.KubeConfigFile)
	if err != nil {
		return fmt.Errorf("registration: %w", err)
	}
	r, err := registration.New(registration.Config{
		Client:           rest,
		Authority:        p.authority,
		Relationships:    declared{p.authority, p.poller},
		TrustDomain:      td,
		ClusterName:      of.cfg.NodeAttestation.K8sPSAT.Cluster,
		ClusterDomain:    cfg.ClusterDomain,
		IgnoreNamespaces: append([]string{}, cfg.IgnoreNamespaces...), // nil would be the default
		ClassName:        cfg.ClassName,
		IgnoreClassless:  cfg.IgnoreClassless,
		Logger:           of.log,
		Metrics:          registration.NewMetrics(of.metrics),
	})
	if err != nil {
		return err
	}
	p.tasks = append(p.tasks, daemon.Task{Name: "registration", Run: r.Run})
	return nil
}
