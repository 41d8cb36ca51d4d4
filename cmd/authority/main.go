// Command authority is the CA and registrar of a cluster: agents attest to it
// over TLS and are pushed what they may serve, administrators use its socket.
// It speaks the SPIRE Server API on both.
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
		fmt.Fprintln(os.Stderr, "authority:", err)
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
	cfg, err := config.LoadAuthority(o.config, o.override)
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
	// What was signed and changed is written down whatever the level.
	audit, err := daemon.NewLogger(stderr, cfg.Log.Format, new(slog.LevelVar))
	if err != nil {
		return err
	}
	return newProcess(cfg, log, audit.With(slog.String("log", "audit")), level).run(ctx)
}
