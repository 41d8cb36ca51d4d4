package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spiffe-node/spiffe-node/internal/bundleendpoint"
	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/daemon"
	"github.com/spiffe-node/spiffe-node/internal/federation"
)

// addFederation adds what fetches the bundles of other trust domains and, where
// configured, what serves ours to them. Neither is part of readiness: what is
// known is served on.
func (p *parts) addFederation(ctx context.Context, of *process) error {
	var err error
	p.poller, err = federation.New(federation.Config{Store: p.authority, Logger: of.log, Metrics: federation.NewMetrics(of.metrics)})
	if err != nil {
		return err
	}
	p.tasks = append(p.tasks, daemon.Task{Name: "federation", Run: p.poller.Run})
	cfg := of.cfg.Federation.BundleEndpoint
	if cfg.Address == "" {
		return nil
	}
	cert, err := p.endpointCertificate(of, cfg)
	if err != nil {
		return fmt.Errorf("federation: %w", err)
	}
	p.endpoint, err = bundleendpoint.New(ctx, bundleendpoint.Config{
		Address:     cfg.Address,
		Bundle:      p.authority.OwnBundle,
		Certificate: cert,
		RefreshHint: time.Duration(cfg.RefreshHint),
		Logger:      of.log,
		Metrics:     bundleendpoint.NewMetrics(of.metrics),
	})
	if err != nil {
		return fmt.Errorf("federation: %w", err)
	}
	p.tasks = append(p.tasks, daemon.Task{Name: "bundle endpoint", Run: p.endpoint.Run})
	return nil
}

func (p *parts) endpointCertificate(of *process, cfg config.BundleEndpoint) (bundleendpoint.Certificate, error) {
	switch {
	case cfg.Profile == config.ProfileSPIFFE:
		return bundleendpoint.Certificate{Get: p.identity}, nil
	case cfg.ACME.Domain != "":
		return bundleendpoint.ACME(bundleendpoint.ACMEConfig{
			Domain: cfg.ACME.Domain, Email: cfg.ACME.Email, Directory: cfg.ACME.DirectoryURL,
			CacheDir: cfg.ACME.CacheDirectory, AcceptTOS: cfg.ACME.TOSAccepted,
		})
	default:
		return bundleendpoint.Files(cfg.CertFile, cfg.KeyFile, of.log)
	}
}
