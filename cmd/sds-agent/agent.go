package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/spiffe-node/spiffe-node/internal/command"
	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/daemon"
	"github.com/spiffe-node/spiffe-node/internal/daemon/profile"
	"github.com/spiffe-node/spiffe-node/internal/peersock"
)

// agent is the process: health first, then everything else.
type agent struct {
	cfg     *config.Agent
	log     *slog.Logger
	audit   *slog.Logger
	level   *slog.LevelVar
	started time.Time
	metrics *prometheus.Registry
	health  *daemon.Health
	// node is set once the parts are built; until then readiness says so.
	node atomic.Pointer[node]
}

func newAgent(cfg *config.Agent, logs command.Logs) (*agent, error) {
	if cfg.Mode == config.ModeKubernetes {
		if err := requireHostPIDs(); err != nil {
			return nil, err
		}
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "spiffe_node", Name: "agent_info", Help: "Always 1; the labels say what runs.",
			ConstLabels: prometheus.Labels{"version": version, "trust_domain": cfg.TrustDomain, "mode": cfg.Mode},
		}, func() float64 { return 1 }),
	)
	a := &agent{cfg: cfg, log: logs.Log, audit: logs.Audit, level: logs.Level, started: time.Now(), metrics: reg, health: daemon.NewHealth(reg)}
	if cfg.Health.Profiling {
		profile.Serve(a.health)
	}
	a.health.AddReady("agent", func() error {
		if n := a.node.Load(); n != nil {
			if err := n.ready(); err != nil {
				return err
			}
			return n.remark()
		}
		return errors.New("starting")
	})
	return a, nil
}

// requireHostPIDs refuses to attest pods where every one of them would have
// process number 0.
func requireHostPIDs() error {
	host, err := peersock.HostPIDNamespace("")
	if err != nil {
		return fmt.Errorf("find out whether this is the host's PID namespace: %w", err)
	}
	if !host {
		return errors.New("mode kubernetes needs the host's PID namespace, or callers cannot be told apart; set hostPID: true in the pod, or mode: standalone")
	}
	return nil
}

// run serves until ctx ends. Health and metrics answer before the authority's
// state has been opened and after everything else has ended.
func (a *agent) run(ctx context.Context) error {
	health, addr, err := a.health.Task(a.cfg.Health.Address)
	if err != nil {
		return err
	}
	if addr != nil {
		a.log.Info("serving health and metrics", slog.String("address", addr.String()))
	}
	return daemon.Run(ctx, a.log, health, daemon.Task{Name: "agent", Run: a.serve})
}

func (a *agent) serve(ctx context.Context) error {
	n, err := a.wire(ctx)
	if err != nil {
		return err
	}
	a.node.Store(n)
	a.log.Info("agent started",
		slog.String("version", version),
		slog.String("trust_domain", a.cfg.TrustDomain),
		slog.String("agent_id", n.agentID()),
		slog.String("mode", a.cfg.Mode),
		slog.String("socket", n.socket.Path()),
		slog.String("admin_socket", a.cfg.Admin.SocketPath),
		slog.String("peer_identification", n.public.listener.Mode()),
		slog.Duration("took", time.Since(a.started)))
	err = n.run(ctx)
	a.log.Info("agent stopped", slog.Duration("uptime", time.Since(a.started)))
	return err
}
