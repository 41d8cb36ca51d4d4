// Command sds-agent attests the callers of a node's public socket and serves
// them their SPIFFE identities over Envoy SDS v3 and the SPIFFE Workload API.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/daemon"
)

// version is set by the build.
var version = "dev"

func main() {
	ctx, stop := daemon.SignalContext(context.Background())
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "sds-agent:", err)
		os.Exit(1)
	}
}

// run is main without the process: it returns when ctx ends or something fails.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	if o.version {
		_, err := fmt.Fprintln(stdout, version)
		return err
	}
	cfg, err := config.Load(o.config, o.override)
	if err != nil {
		return err
	}
	if o.validate {
		_, err := fmt.Fprintln(stdout, "configuration is valid")
		return err
	}
	level := new(slog.LevelVar)
	l, err := daemon.ParseLevel(cfg.Log.Level)
	if err != nil {
		return err
	}
	level.Set(l)
	log, err := daemon.NewLogger(stderr, cfg.Log.Format, level)
	if err != nil {
		return err
	}
	// What was handed out and changed is written down whatever the level.
	audit, err := daemon.NewLogger(stderr, cfg.Log.Format, new(slog.LevelVar))
	if err != nil {
		return err
	}
	a, err := newAgent(cfg, log, audit.With(slog.String("log", "audit")), level)
	if err != nil {
		return err
	}
	return a.run(ctx)
}
