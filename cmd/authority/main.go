// Command authority is the CA and registrar of a cluster: agents attest to it
// over TLS and are pushed what they may serve, administrators use its socket.
// It speaks the SPIRE Server API on both.
package main

import (
	"context"
	"os"

	"github.com/spiffe-node/spiffe-node/internal/command"
	"github.com/spiffe-node/spiffe-node/internal/config"
)

// version is set by the build.
var version = "dev"

func main() { os.Exit(commandLine().Main()) }

func commandLine() *command.Command[config.AuthorityProcess] {
	return &command.Command[config.AuthorityProcess]{
		Name:    "authority",
		Purpose: "Signs identities for the agents of a cluster. Flags override the configuration\nfile; all its keys are in docs/configuration.md.",
		Version: version,
		Load:    config.LoadAuthority,
		Log:     func(a *config.AuthorityProcess) config.Log { return a.Log },
		Flags: []command.Flag[config.AuthorityProcess]{
			{Name: "trust-domain", Usage: "`name` of the trust domain (trustDomain)", Key: func(a *config.AuthorityProcess) *string { return &a.TrustDomain }},
			{Name: "address", Usage: "`host:port` of the SPIRE Server API for agents (server.address)", Key: func(a *config.AuthorityProcess) *string { return &a.Server.Address }},
			{Name: "admin-socket", Usage: "admin socket `path` (admin.socketPath)", Key: func(a *config.AuthorityProcess) *string { return &a.Admin.SocketPath }},
			{Name: "state", Usage: "state `file` (embedded.statePath)", Key: func(a *config.AuthorityProcess) *string { return &a.Embedded.StatePath }},
			{Name: "health-address", Usage: "`host:port` of health and metrics (health.address)", Key: func(a *config.AuthorityProcess) *string { return &a.Health.Address }},
			{Name: "log-level", Usage: "debug, info, warn or error (log.level)", Key: func(a *config.AuthorityProcess) *string { return &a.Log.Level }},
			{Name: "log-format", Usage: "json or text (log.format)", Key: func(a *config.AuthorityProcess) *string { return &a.Log.Format }},
		},
		Run: func(ctx context.Context, cfg *config.AuthorityProcess, logs command.Logs) error {
			return newProcess(cfg, logs).run(ctx)
		},
	}
}
