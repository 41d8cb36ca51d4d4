package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// purged is what became of one agent whose SVID has expired.
type purged struct {
	AgentID string `json:"agent_id"`
	Deleted bool   `json:"deleted"`
	Error   string `json:"error,omitempty"`
}

// agentPurgeCommand forgets agents that have been away for long. Only those that
// can attest again are taken: the others would be locked out for good.
func (a *app) agentPurgeCommand() *cobra.Command {
	var (
		expiredFor time.Duration
		dryRun     bool
	)
	cmd := command("purge", "Purge expired agents that were attested using a non-TOFU security model based on a given time", func(ctx context.Context) error {
		return a.connect(func(conn grpc.ClientConnInterface) error {
			client := agentpb.NewAgentClient(conn)
			expired, err := expiredAgents(ctx, client, time.Now().Add(-expiredFor))
			if err != nil {
				return err
			}
			all := make([]purged, 0, len(expired))
			for _, id := range expired {
				p := purged{AgentID: idText(id)}
				if !dryRun {
					if _, err := client.DeleteAgent(ctx, &agentpb.DeleteAgentRequest{Id: id}); err != nil {
						p.Error = err.Error()
					} else {
						p.Deleted = true
					}
				}
				all = append(all, p)
			}
			return a.print(answer{
				value:  map[string]any{"expired_agents": all},
				pretty: func() error { return a.printPurged(all, dryRun) },
			})
		})
	})
	cmd.Flags().DurationVar(&expiredFor, "expiredFor", 30*24*time.Hour, "Amount of time that has passed since the agent's SVID has expired. It is used to determine which agents to purge.")
	cmd.Flags().BoolVar(&dryRun, "dryRun", false, "Indicates that the command will not perform any action, but will print the agents that would be purged.")
	return cmd
}

// expiredAgents are those that can attest again and whose SVID ended before a
// moment.
func expiredAgents(ctx context.Context, client agentpb.AgentClient, before time.Time) ([]*typespb.SPIFFEID, error) {
	var out []*typespb.SPIFFEID
	for token := ""; ; {
		resp, err := client.ListAgents(ctx, &agentpb.ListAgentsRequest{
			Filter:     &agentpb.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(true)},
			OutputMask: &typespb.AgentMask{X509SvidExpiresAt: true},
			PageSize:   agentsPerPage,
			PageToken:  token,
		})
		if err != nil {
			return nil, fmt.Errorf("failed to list agents: %w", err)
		}
		for _, agent := range resp.GetAgents() {
			if time.Unix(agent.GetX509SvidExpiresAt(), 0).Before(before) {
				out = append(out, agent.GetId())
			}
		}
		if token = resp.GetNextPageToken(); token == "" {
			return out, nil
		}
	}
}

// printPurged writes the lines that spire-server prints.
func (a *app) printPurged(all []purged, dryRun bool) error {
	if len(all) == 0 {
		fmt.Fprintln(a.stdout, "No agents to purge.")
		return nil
	}
	fmt.Fprintf(a.stdout, "Found %s\n\n", count(len(all), "expired agent", "expired agents"))
	list := func(title string, is func(purged) bool) {
		for _, p := range all {
			if !is(p) {
				continue
			}
			if title != "" {
				fmt.Fprintln(a.stdout, title)
				title = ""
			}
			fmt.Fprintf(a.stdout, "%-18s: %s\n", "SPIFFE ID", p.AgentID)
			if p.Error != "" {
				fmt.Fprintf(a.stdout, "%-18s: %s\n", "Error", p.Error)
			}
		}
	}
	if dryRun {
		list("\nAgents that can be purged:", func(purged) bool { return true })
		return nil
	}
	list("Agents purged:", func(p purged) bool { return p.Deleted })
	list("Agents not purged:", func(p purged) bool { return !p.Deleted })
	return nil
}
