package main

import (
	"flag"
	"fmt"
	"io"

	"github.com/spiffe-node/spiffe-node/internal/config"
)

// options are the command line. Flags that were given override the file.
type options struct {
	config   string
	validate bool
	version  bool
	set      []func(*config.Agent)
}

func parseFlags(args []string, stderr io.Writer) (*options, error) {
	o := &options{}
	fs := flagSet(o, stderr)
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q; everything is a flag", fs.Arg(0))
	}
	return o, nil
}

func flagSet(o *options, stderr io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet("sds-agent", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprintln(stderr, "usage: sds-agent [--config FILE] [flags]\n\nServes SPIFFE identities on this node. Flags override the configuration file;\nall its keys are in docs/configuration.md.")
		fmt.Fprintln(stderr)
		fs.PrintDefaults()
	}
	fs.StringVar(&o.config, "config", "", "configuration `file` (YAML); empty: defaults and flags only")
	fs.BoolVar(&o.validate, "validate", false, "check the configuration and exit")
	fs.BoolVar(&o.version, "version", false, "print the version and exit")
	o.text(fs, "trust-domain", "`name` of the trust domain (trustDomain)", func(a *config.Agent) *string { return &a.TrustDomain })
	o.text(fs, "mode", "standalone or kubernetes (mode)", func(a *config.Agent) *string { return &a.Mode })
	o.text(fs, "node-name", "`name` of this node (node.name)", func(a *config.Agent) *string { return &a.Node.Name })
	o.text(fs, "socket-dir", "public socket `directory` (socket.directory)", func(a *config.Agent) *string { return &a.Socket.Directory })
	o.text(fs, "admin-socket", "admin socket `path` (admin.socketPath)", func(a *config.Agent) *string { return &a.Admin.SocketPath })
	o.text(fs, "authority-state", "state `file` of the embedded authority (authority.embedded.statePath)", func(a *config.Agent) *string { return &a.Authority.Embedded.StatePath })
	o.text(fs, "state-dir", "restart state `directory` on tmpfs (identity.stateDirectory)", func(a *config.Agent) *string { return &a.Identity.StateDirectory })
	o.text(fs, "ledger-dir", "publish ledger `directory` (attestation.kubernetes.ledgerDirectory)", func(a *config.Agent) *string { return &a.Attestation.Kubernetes.LedgerDirectory })
	o.text(fs, "health-address", "`host:port` of health and metrics (health.address)", func(a *config.Agent) *string { return &a.Health.Address })
	o.text(fs, "log-level", "debug, info, warn or error (log.level)", func(a *config.Agent) *string { return &a.Log.Level })
	o.text(fs, "log-format", "json or text (log.format)", func(a *config.Agent) *string { return &a.Log.Format })
	return fs
}

// text defines a flag that overrides one key of the file, if given.
func (o *options) text(fs *flag.FlagSet, name, usage string, key func(*config.Agent) *string) {
	fs.Func(name, usage, func(v string) error {
		o.set = append(o.set, func(a *config.Agent) { *key(a) = v })
		return nil
	})
}

func (o *options) override(a *config.Agent) {
	for _, set := range o.set {
		set(a)
	}
}
