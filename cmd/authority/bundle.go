package main

import (
	"fmt"

	"github.com/spiffe-node/spiffe-node/internal/bundlemap"
	"github.com/spiffe-node/spiffe-node/internal/daemon"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/k8spsat"
)

// addBundleMap adds the publisher of the trust bundle where agents are pods of
// the cluster that this process is a pod of.
func (p *parts) addBundleMap(of *process) error {
	k := of.cfg.NodeAttestation.K8sPSAT
	if k.Cluster == "" || k.KubeConfigFile != "" {
		return nil
	}
	rest, err := k8spsat.RESTConfig("")
	if err != nil {
		return fmt.Errorf("bundle ConfigMap: %w", err)
	}
	publisher, err := bundlemap.New(bundlemap.Config{Client: rest, Bundles: p.authority.Bundles, Logger: of.log})
	if err != nil {
		return err
	}
	p.tasks = append(p.tasks, daemon.Task{Name: "bundle ConfigMap", Run: publisher.Run})
	return nil
}
