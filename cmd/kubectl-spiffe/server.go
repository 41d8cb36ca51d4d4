package main

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/debugpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/loggerpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// version is set by the linker.
var version = ""

func (a *app) versionCommand() *cobra.Command {
	return command("version", "Prints the version of this command", func(context.Context) error {
		v := version
		if info, ok := debug.ReadBuildInfo(); v == "" && ok {
			v = info.Main.Version
		}
		if v == "" {
			v = "unknown"
		}
		return a.print(answer{value: map[string]string{"version": v}, pretty: func() error {
			fmt.Fprintln(a.stdout, v)
			return nil
		}})
	})
}

func (a *app) healthcheckCommand() *cobra.Command {
	var verbose bool
	cmd := command("healthcheck", "Determines server health status", func(ctx context.Context) error {
		if verbose {
			fmt.Fprintln(a.stdout, "Checking server health...")
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
			switch {
			case err != nil:
				if verbose {
					fmt.Fprintln(a.stderr, "Failed to check health:", err)
				}
				return errors.New("server is unhealthy: unable to determine health")
			case resp.GetStatus() != healthpb.HealthCheckResponse_SERVING:
				return fmt.Errorf("server is unhealthy: server returned status %q", resp.GetStatus())
			}
			return a.print(answer{message: resp, pretty: func() error {
				fmt.Fprintln(a.stdout, "Server is healthy.")
				return nil
			}})
		})
	})
	cmd.Flags().BoolVar(&verbose, "verbose", false, "Print verbose information")
	cmd.Flags().Bool("shallow", false, "Perform a less stringent health check")
	return cmd
}

func (a *app) loggerCommand() *cobra.Command {
	var level string
	get := command("get", "Gets the logger details", func(ctx context.Context) error {
		return a.logger("error fetching logger: %w", func(c loggerpb.LoggerClient) (*typespb.Logger, error) {
			return c.GetLogger(ctx, &loggerpb.GetLoggerRequest{})
		})
	})
	set := command("set", "Sets the logger details", func(ctx context.Context) error {
		if level == "" {
			return errors.New("a value (-level) must be set")
		}
		i := slices.Index(levelNames, strings.ToLower(level))
		if i < 0 {
			return fmt.Errorf("the value %q is not a valid setting", level)
		}
		return a.logger("failed to set log level: %w", func(c loggerpb.LoggerClient) (*typespb.Logger, error) {
			return c.SetLogLevel(ctx, &loggerpb.SetLogLevelRequest{NewLevel: typespb.LogLevel(i + 1)}) // an index
		})
	})
	set.Flags().StringVar(&level, "level", "", "The new log level, one of ("+strings.Join(levelNames, ", ")+")")
	reset := command("reset", "Reset the logger details to launch level", func(ctx context.Context) error {
		return a.logger("failed to reset logger: %w", func(c loggerpb.LoggerClient) (*typespb.Logger, error) {
			return c.ResetLogLevel(ctx, &loggerpb.ResetLogLevelRequest{})
		})
	})
	return group("logger", "Read and set the log level", get, reset, set)
}

// levelNames are in the order of the wire's numbers, which start at 1.
var levelNames = []string{"panic", "fatal", "error", "warn", "info", "debug", "trace"}

func (a *app) logger(problem string, call func(loggerpb.LoggerClient) (*typespb.Logger, error)) error {
	return a.connect(func(conn grpc.ClientConnInterface) error {
		l, err := call(loggerpb.NewLoggerClient(conn))
		if err != nil {
			return fmt.Errorf(problem, err)
		}
		return a.print(answer{message: l, pretty: func() error {
			fmt.Fprintf(a.stdout, "Logger Level : %s\nLaunch Level : %s\n\n", levelText(l.GetCurrentLevel()), levelText(l.GetLaunchLevel()))
			return nil
		}})
	})
}

// levelText is the name the server's logging library has for a level.
func levelText(l typespb.LogLevel) string {
	if l == typespb.LogLevel_WARN {
		return "warning"
	}
	return strings.ToLower(l.String())
}

func (a *app) debugCommand() *cobra.Command {
	return group("debug", "Debug information", command("getinfo", "Prints debug information about the server", func(ctx context.Context) error {
		return a.connect(func(conn grpc.ClientConnInterface) error {
			info, err := debugpb.NewDebugClient(conn).GetInfo(ctx, &debugpb.GetInfoRequest{})
			if err != nil {
				return err
			}
			return a.print(answer{message: info, pretty: func() error {
				a.printDebugInfo(info)
				return nil
			}})
		})
	}))
}

func (a *app) printDebugInfo(info *debugpb.GetInfoResponse) {
	w := a.stdout
	fmt.Fprintln(w, "Server Debug Info:")
	fmt.Fprintf(w, "  Uptime:                  %s\n", time.Duration(info.GetUptime())*time.Second)
	fmt.Fprintf(w, "  Registered Agents:       %d\n", info.GetAgentsCount())
	fmt.Fprintf(w, "  Registration Entries:    %d\n", info.GetEntriesCount())
	fmt.Fprintf(w, "  Federated Bundles:       %d\n", info.GetFederatedBundlesCount())
	if len(info.GetSvidChain()) > 0 {
		fmt.Fprintln(w, "  SVID Chain:")
	}
	for i, c := range info.GetSvidChain() {
		fmt.Fprintf(w, "    [%d] SPIFFE ID:  %s\n", i, idText(c.GetId()))
		fmt.Fprintf(w, "        Subject:    %s\n", c.GetSubject())
		fmt.Fprintf(w, "        Expires At: %s\n", time.Unix(c.GetExpiresAt(), 0).UTC().Format(time.RFC3339))
	}
}
