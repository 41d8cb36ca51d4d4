// Command sds-agent attests the callers of a node's public socket and serves
// them their SPIFFE identities over Envoy SDS v3 and the SPIFFE Workload API.
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

func commandLine() *command.Command[config.Agent] {
	return &command.Command[config.Agent]{
		Name:    "sds-agent",
		Purpose: "Serves SPIFFE identities on this node. Flags override the configuration file;\nall its keys are in docs/configuration.md.",
		Version: version,
		Load:    config.Load,
		Log:     func(a *config.Agent) config.Log { return a.Log },
		Flags: []command.Flag[config.Agent]{
			{Name: "trust-domain", Usage: "`name` of the trust domain (trustDomain)", Key: func(a *config.Agent) *string { return &a.TrustDomain }},
			{Name: "mode", Usage: "standalone or kubernetes (mode)", Key: func(a *config.Agent) *string { return &a.Mode }},
			{Name: "node-name", Usage: "`name` of this node (node.name)", Key: func(a *config.Agent) *string { return &a.Node.Name }},
			{Name: "socket-dir", Usage: "public socket `directory` (socket.directory)", Key: func(a *config.Agent) *string { return &a.Socket.Directory }},
			{Name: "admin-socket", Usage: "admin socket `path` (admin.socketPath)", Key: func(a *config.Agent) *string { return &a.Admin.SocketPath }},
			{Name: "authority-state", Usage: "state `file` of the embedded authority (authority.embedded.statePath)", Key: func(a *config.Agent) *string { return &a.Authority.Embedded.StatePath }},
			{Name: "state-dir", Usage: "restart state `directory` on tmpfs (identity.stateDirectory)", Key: func(a *config.Agent) *string { return &a.Identity.StateDirectory }},
			{Name: "ledger-dir", Usage: "publish ledger `directory` (attestation.kubernetes.ledgerDirectory)", Key: func(a *config.Agent) *string { return &a.Attestation.Kubernetes.LedgerDirectory }},
			{Name: "health-address", Usage: "`host:port` of health and metrics (health.address)", Key: func(a *config.Agent) *string { return &a.Health.Address }},
			{Name: "log-level", Usage: "debug, info, warn or error (log.level)", Key: func(a *config.Agent) *string { return &a.Log.Level }},
			{Name: "log-format", Usage: "json or text (log.format)", Key: func(a *config.Agent) *string { return &a.Log.Format }},
		},
		Run: func(ctx context.Context, cfg *config.Agent, logs command.Logs) error {
			a, err := newAgent(cfg, logs)
			if err != nil {
				return err
			}
			return a.run(ctx)
		},
	}
}
