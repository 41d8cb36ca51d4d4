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
	set      []func(*config.AuthorityProcess)
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
	fs := flag.NewFlagSet("authority", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprintln(stderr, "usage: authority [--config FILE] [flags]\n\nSigns identities for the agents of a cluster. Flags override the configuration\nfile; all its keys are in docs/configuration.md.")
		fmt.Fprintln(stderr)
		fs.PrintDefaults()
	}
	fs.StringVar(&o.config, "config", "", "configuration `file` (YAML); empty: defaults and flags only")
	fs.BoolVar(&o.validate, "validate", false, "check the configuration and exit")
	fs.BoolVar(&o.version, "version", false, "print the version and exit")
	o.text(fs, "trust-domain", "`name` of the trust domain (trustDomain)", func(a *config.AuthorityProcess) *string { return &a.TrustDomain })
	o.text(fs, "address", "`host:port` of the SPIRE Server API for agents (server.address)", func(a *config.AuthorityProcess) *string { return &a.Server.Address })
	o.text(fs, "admin-socket", "admin socket `path` (admin.socketPath)", func(a *config.AuthorityProcess) *string { return &a.Admin.SocketPath })
	o.text(fs, "state", "state `file` (embedded.statePath)", func(a *config.AuthorityProcess) *string { return &a.Embedded.StatePath })
	o.text(fs, "health-address", "`host:port` of health and metrics (health.address)", func(a *config.AuthorityProcess) *string { return &a.Health.Address })
	o.text(fs, "log-level", "debug, info, warn or error (log.level)", func(a *config.AuthorityProcess) *string { return &a.Log.Level })
	o.text(fs, "log-format", "json or text (log.format)", func(a *config.AuthorityProcess) *string { return &a.Log.Format })
	return fs
}

// text defines a flag that overrides one key of the file, if given.
func (o *options) text(fs *flag.FlagSet, name, usage string, key func(*config.AuthorityProcess) *string) {
	fs.Func(name, usage, func(v string) error {
		o.set = append(o.set, func(a *config.AuthorityProcess) { *key(a) = v })
		return nil
	})
}

func (o *options) override(a *config.AuthorityProcess) {
	for _, set := range o.set {
		set(a)
	}
}
