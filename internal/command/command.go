// Package command is the command line that the daemons have in common: a
// configuration file, flags that override it, --validate and --version.
package command

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

// Command is a daemon whose configuration is a C.
type Command[C any] struct {
	Name string
	// Purpose is what the help says below the usage.
	Purpose string
	Version string
	// Load reads the configuration file, or the defaults if it is "", and applies
	// the flags before it checks the whole.
	Load func(file string, override func(*C)) (*C, error)
	// Log is the configuration's key of that name.
	Log   func(*C) config.Log
	Flags []Flag[C]
	// Run returns when ctx ends or something fails.
	Run func(ctx context.Context, cfg *C, logs Logs) error
}

// Flag overrides one key of the file, if given.
type Flag[C any] struct {
	Name, Usage string
	Key         func(*C) *string
}

// Logs is where a daemon writes.
type Logs struct {
	Log *slog.Logger
	// Audit is what was handed out, signed and changed; Level does not govern it.
	Audit *slog.Logger
	// Level is Log's; it may be set at any time.
	Level *slog.LevelVar
}

// Main runs the command with this process's arguments and returns the exit code: 1
// after an error, which it prints, 2 after the help.
func (c *Command[C]) Main() int {
	ctx, stop := daemon.SignalContext(context.Background())
	err := c.Execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 2
	case err != nil:
		fmt.Fprintf(os.Stderr, "%s: %v\n", c.Name, err)
		return 1
	}
	return 0
}

// Execute is Main without the process. The error is flag.ErrHelp when the help
// was asked for.
func (c *Command[C]) Execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := c.parse(args, stderr)
	if err != nil {
		return err
	}
	if o.version {
		_, err := fmt.Fprintln(stdout, c.Version)
		return err
	}
	cfg, err := c.Load(o.config, o.override)
	if err != nil {
		return err
	}
	if o.validate {
		_, err := fmt.Fprintln(stdout, "configuration is valid")
		return err
	}
	logs, err := openLogs(c.Log(cfg), stderr)
	if err != nil {
		return err
	}
	return c.Run(ctx, cfg, logs)
}

func openLogs(cfg config.Log, w io.Writer) (Logs, error) {
	level, err := daemon.ParseLevel(cfg.Level)
	if err != nil {
		return Logs{}, err
	}
	out := Logs{Level: new(slog.LevelVar)}
	out.Level.Set(level)
	if out.Log, err = daemon.NewLogger(w, cfg.Format, out.Level); err != nil {
		return Logs{}, err
	}
	audit, err := daemon.NewLogger(w, cfg.Format, new(slog.LevelVar))
	if err != nil {
		return Logs{}, err
	}
	out.Audit = audit.With(slog.String("log", "audit"))
	return out, nil
}

// options are a command line that was read.
type options[C any] struct {
	config   string
	validate bool
	version  bool
	set      []func(*C)
}

func (o *options[C]) override(cfg *C) {
	for _, set := range o.set {
		set(cfg)
	}
}

func (c *Command[C]) parse(args []string, stderr io.Writer) (*options[C], error) {
	o := &options[C]{}
	fs := c.flagSet(o, stderr)
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q; everything is a flag", fs.Arg(0))
	}
	return o, nil
}

// FlagSet is for documentation.
func (c *Command[C]) FlagSet() *flag.FlagSet { return c.flagSet(&options[C]{}, io.Discard) }

func (c *Command[C]) flagSet(o *options[C], stderr io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet(c.Name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprintf(stderr, "usage: %s [--config FILE] [flags]\n\n%s\n\n", c.Name, c.Purpose)
		fs.PrintDefaults()
	}
	fs.StringVar(&o.config, "config", "", "configuration `file` (YAML); empty: defaults and flags only")
	fs.BoolVar(&o.validate, "validate", false, "check the configuration and exit")
	fs.BoolVar(&o.version, "version", false, "print the version and exit")
	for _, f := range c.Flags {
		fs.Func(f.Name, f.Usage, func(v string) error {
			o.set = append(o.set, func(cfg *C) { *f.Key(cfg) = v })
			return nil
		})
	}
	return fs
}
