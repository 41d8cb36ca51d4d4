package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/spiffe-node/spiffe-node/internal/daemon"
	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

// run is the command: it serves until ctx ends.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	o, err := parse(args, getenv, stderr)
	if err != nil {
		return err
	}
	if o.version {
		_, err := fmt.Fprintln(stdout, versionText())
		return err
	}
	level, err := daemon.ParseLevel(o.logLevel)
	if err != nil {
		return fmt.Errorf("-log-level: %w", err)
	}
	var lv slog.LevelVar
	lv.Set(level)
	log, err := daemon.NewLogger(stderr, o.logFormat, &lv)
	if err != nil {
		return fmt.Errorf("-log-format: %w", err)
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	health := daemon.NewHealth(reg)
	healthTask, at, err := health.Task(o.healthAddress)
	if err != nil {
		return err
	}
	if at != nil {
		log.Info("health and metrics", slog.String("address", at.String()))
	}
	return daemon.Run(ctx, log, healthTask, daemon.Task{Name: "csi", Run: func(ctx context.Context) error {
		return serve(ctx, o, log, csi.NewMetrics(reg), health)
	}})
}

// serve builds the driver and runs it. The CSI socket listens before anything
// else runs: calls that come before its task does wait in its backlog.
func serve(ctx context.Context, o options, log *slog.Logger, metrics *csi.Metrics, health *daemon.Health) error {
	health.AddReady("driver", func() error { return fmt.Errorf("starting") })
	store, err := ledger.Open(o.ledgerDir, log)
	if err != nil {
		return err
	}
	driver, err := csi.New(csi.Config{
		Name:        o.pluginName,
		Version:     versionText(),
		NodeID:      o.nodeID,
		SourceDir:   o.sourceDir,
		SocketNames: o.names(),
		AgentCheck:  csi.AgentCheck(o.agentCheck),
		KubeletRoot: o.kubeletRoot,
		AnyVolumeID: o.anyVolumeID,
		ReadOnly:    o.readOnly,
		Ledger:      store,
		Logger:      log,
		Metrics:     metrics,
	})
	if err != nil {
		return err
	}
	tasks := []daemon.Task{{Name: "reconciliation", Run: driver.RunReconcile}}
	if o.register {
		registrar, err := csi.NewRegistrar(csi.RegistrarConfig{
			Dir: o.registryDir, Endpoint: o.endpoint, Name: driver.Name(), Logger: log, Metrics: metrics,
		})
		if err != nil {
			return err
		}
		tasks = append(tasks, daemon.Task{Name: "registration", Run: registrar.Run})
	}
	socket, live, err := csi.ListenSocket(o.csiSocket)
	if err != nil {
		return err
	}
	if live {
		log.Warn("took the CSI socket over from another instance, which should be about to end", slog.String("socket", o.csiSocket))
	}
	server := csi.NewServer(log, metrics)
	driver.Register(server)
	tasks = append(tasks, daemon.Task{Name: "CSI socket", Run: func(ctx context.Context) error {
		return csi.Serve(ctx, server, socket, o.grace)
	}})
	health.AddLive("socket directory", driver.Live)
	health.AddReady("driver", driver.Ready)
	log.Info("serving CSI", slog.String("socket", o.csiSocket), slog.String("driver", driver.Name()), slog.String("version", versionText()),
		slog.String("node", o.nodeID), slog.String("source", o.sourceDir), slog.Int("volumes", len(store.List())))
	err = daemon.Run(ctx, log, tasks...)
	log.Info("stopped")
	return err
}

// version is set by the linker (-X main.version=...).
var version string

// versionText is the version of the build: the linker's, or the module's as Go
// recorded it.
func versionText() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}
