package main

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/spiffe-node/spiffe-node/internal/command"
	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/daemon"
	"github.com/spiffe-node/spiffe-node/internal/daemon/profile"
)

// process is the daemon: health first, then everything else.
type process struct {
	cfg     *config.AuthorityProcess
	log     *slog.Logger
	audit   *slog.Logger
	level   *slog.LevelVar
	started time.Time
	metrics *prometheus.Registry
	health  *daemon.Health
	// parts is set once they are built; until then readiness says so.
	parts atomic.Pointer[parts]
}

func newProcess(cfg *config.AuthorityProcess, logs command.Logs) *process {
	reg := prometheus.NewRegistry()
	reg.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "spiffe_node", Name: "authority_info", Help: "Always 1; the labels say what runs.",
			ConstLabels: prometheus.Labels{"version": version, "trust_domain": cfg.TrustDomain},
		}, func() float64 { return 1 }),
	)
	p := &process{cfg: cfg, log: logs.Log, audit: logs.Audit, level: logs.Level, started: time.Now(), metrics: reg, health: daemon.NewHealth(reg)}
	if cfg.Health.Profiling {
		profile.Serve(p.health)
	}
	p.health.AddReady("authority", func() error {
		if parts := p.parts.Load(); parts != nil {
			return parts.ready()
		}
		return errors.New("starting")
	})
	return p
}

// run serves until ctx ends. Health and metrics answer before the state has
// been opened and after everything else has ended.
func (p *process) run(ctx context.Context) error {
	health, addr, err := p.health.Task(p.cfg.Health.Address)
	if err != nil {
		return err
	}
	if addr != nil {
		p.log.Info("serving health and metrics", slog.String("address", addr.String()))
	}
	return daemon.Run(ctx, p.log, health, daemon.Task{Name: "authority", Run: p.serve})
}

func (p *process) serve(ctx context.Context) error {
	parts, err := p.wire(ctx)
	if err != nil {
		return err
	}
	p.parts.Store(parts)
	attrs := []any{
		slog.String("version", version),
		slog.String("trust_domain", p.cfg.TrustDomain),
		slog.String("admin_socket", p.cfg.Admin.SocketPath),
		slog.Any("node_attestation", parts.attestors),
		slog.Bool("registration", p.cfg.Registration.Enabled),
		slog.Duration("took", time.Since(p.started)),
	}
	if parts.remote != nil {
		attrs = append(attrs, slog.String("address", parts.remote.Addr().String()))
	}
	if parts.endpoint != nil {
		attrs = append(attrs, slog.String("bundle_endpoint", parts.endpoint.Addr().String()))
	}
	p.log.Info("authority started", attrs...)
	err = parts.run(ctx)
	p.log.Info("authority stopped", slog.Duration("uptime", time.Since(p.started)))
	return err
}
