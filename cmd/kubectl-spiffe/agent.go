package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// agentsPerPage is spire-server's page size.
const agentsPerPage = 1000

// expiresLayout is how -expiresBefore is written.
const expiresLayout = "2006-01-02 15:04:05 -0700 -07"

func (a *app) agentCommand() *cobra.Command {
	return group("agent", "Manage attested agents", a.agentBanCommand(), a.agentCountCommand(), a.agentEvictCommand(),
		a.agentListCommand(), a.agentPurgeCommand(), a.agentShowCommand())
}

// agentFlags are the flags of agent list and agent count.
type agentFlags struct {
	attestationType, matchSelectorsOn, expiresBefore string
	banned, canReattest                              string
	selectors                                        []string
}

func (f *agentFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.attestationType, "attestationType", "", "Filter by attestation type, like join_token or x509pop.")
	flags.StringVar(&f.banned, "banned", "", "Filter based on string received, 'true': banned agents, 'false': not banned agents, other value will return all.")
	flags.StringVar(&f.canReattest, "canReattest", "", "Filter based on string received, 'true': agents that can reattest, 'false': agents that can't reattest, other value will return all.")
	flags.StringVar(&f.expiresBefore, "expiresBefore", "", `Filter by expiration time (format: "`+expiresLayout+`")`)
	flags.StringArrayVar(&f.selectors, "selector", nil, "A colon-delimited type:value selector. Can be used more than once")
	flags.StringVar(&f.matchSelectorsOn, "matchSelectorsOn", "superset", "The match mode used when filtering by selectors. Options: exact, any, superset and subset")
}

func (f *agentFlags) filter() (*agentpb.ListAgentsRequest_Filter, error) {
	out := &agentpb.ListAgentsRequest_Filter{
		ByAttestationType: f.attestationType, ByExpiresBefore: f.expiresBefore,
		ByBanned: maybe(f.banned), ByCanReattest: maybe(f.canReattest),
	}
	if len(f.selectors) > 0 {
		match, err := matchMode(f.matchSelectorsOn)
		if err != nil {
			return nil, errors.New("unsupported match behavior")
		}
		out.BySelectorMatch = &typespb.SelectorMatch{Match: match}
		for _, s := range f.selectors {
			sel, err := parseSelector(s)
			if err != nil {
				return nil, fmt.Errorf("error parsing selector %q: %w", s, err)
			}
			out.BySelectorMatch.Selectors = append(out.BySelectorMatch.Selectors, sel)
		}
	}
	if f.expiresBefore != "" {
		if _, err := time.Parse(expiresLayout, f.expiresBefore); err != nil {
			return nil, fmt.Errorf("date is not valid: %w", err)
		}
	}
	return out, nil
}

// maybe is a filter on true or false; anything else does not filter.
func maybe(s string) *wrapperspb.BoolValue {
	switch s {
	case "true":
		return wrapperspb.Bool(true)
	case "false":
		return wrapperspb.Bool(false)
	}
	return nil
}

func (a *app) agentListCommand() *cobra.Command {
	var f agentFlags
	cmd := command("list", "Lists attested agents and their SPIFFE IDs", func(ctx context.Context) error {
		filter, err := f.filter()
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			client := agentpb.NewAgentClient(conn)
			all := &agentpb.ListAgentsResponse{}
			token := ""
			for {
				resp, err := client.ListAgents(ctx, &agentpb.ListAgentsRequest{Filter: filter, PageSize: agentsPerPage, PageToken: token})
				if err != nil {
					return err
				}
				all.Agents = append(all.Agents, resp.GetAgents()...)
				if token = resp.GetNextPageToken(); token == "" {
					break
				}
			}
			return a.print(answer{
				message: all,
				pretty: func() error {
					if len(all.GetAgents()) == 0 {
						fmt.Fprintln(a.stdout, "No attested agents found")
						return nil
					}
					fmt.Fprintf(a.stdout, "Found %s:\n\n", count(len(all.GetAgents()), "attested agent", "attested agents"))
					for _, agent := range all.GetAgents() {
						printAgent(a.stdout, agent)
					}
					return nil
				},
				table: agentTable(all.GetAgents()),
			})
		})
	})
	f.register(cmd.Flags())
	return cmd
}

func (a *app) agentShowCommand() *cobra.Command {
	var id string
	cmd := command("show", "Shows the details of an attested agent given its SPIFFE ID", func(ctx context.Context) error {
		if id == "" {
			return errors.New("a SPIFFE ID is required")
		}
		parsed, err := spiffeid.FromString(id)
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			agent, err := agentpb.NewAgentClient(conn).GetAgent(ctx, &agentpb.GetAgentRequest{Id: idToWire(parsed)})
			if err != nil {
				return err
			}
			return a.print(answer{
				message: agent,
				pretty: func() error {
					fmt.Fprintf(a.stdout, "Found an attested agent given its SPIFFE ID\n\n")
					printAgent(a.stdout, agent)
					for _, s := range agent.GetSelectors() {
						fmt.Fprintf(a.stdout, "%-18s: %s:%s\n", "Selectors", s.GetType(), s.GetValue())
					}
					return nil
				},
				table: agentTable([]*typespb.Agent{agent}),
			})
		})
	})
	cmd.Flags().StringVar(&id, "spiffeID", "", "The SPIFFE ID of the agent to show (agent identity)")
	return cmd
}

// printAgent writes the lines that spire-server prints for an agent.
func printAgent(w io.Writer, agent *typespb.Agent) {
	line := func(label, value string) { fmt.Fprintf(w, "%-18s: %s\n", label, value) }
	line("SPIFFE ID", idText(agent.GetId()))
	line("Attestation type", agent.GetAttestationType())
	line("Expiration time", time.Unix(agent.GetX509SvidExpiresAt(), 0).String())
	if agent.GetBanned() {
		line("Banned", "true")
	} else {
		line("Serial number", agent.GetX509SvidSerialNumber())
	}
	line("Can re-attest", strconv.FormatBool(agent.GetCanReattest()))
	if agent.GetAgentVersion() != "" {
		line("Agent version", agent.GetAgentVersion())
	}
	fmt.Fprintln(w)
}

// agentTable is one row per agent.
func agentTable(agents []*typespb.Agent) func(*table, bool) {
	return func(t *table, wide bool) {
		t.columns("SPIFFE ID", "TYPE", "EXPIRES", "BANNED", "VERSION")
		if wide {
			t.columns("SERIAL", "CAN RE-ATTEST", "SELECTORS")
		}
		for _, agent := range agents {
			cells := []string{
				idText(agent.GetId()), agent.GetAttestationType(), time.Unix(agent.GetX509SvidExpiresAt(), 0).UTC().Format(time.RFC3339),
				strconv.FormatBool(agent.GetBanned()), agent.GetAgentVersion(),
			}
			if wide {
				cells = append(cells, agent.GetX509SvidSerialNumber(), strconv.FormatBool(agent.GetCanReattest()),
					strings.Join(selectorTexts(agent.GetSelectors()), ","))
			}
			t.row(cells...)
		}
	}
}

func (a *app) agentCountCommand() *cobra.Command {
	var f agentFlags
	cmd := command("count", "Count attested agents", func(ctx context.Context) error {
		in, err := f.filter()
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := agentpb.NewAgentClient(conn).CountAgents(ctx, &agentpb.CountAgentsRequest{Filter: &agentpb.CountAgentsRequest_Filter{
				ByAttestationType: in.GetByAttestationType(), BySelectorMatch: in.GetBySelectorMatch(), ByBanned: in.GetByBanned(),
				ByCanReattest: in.GetByCanReattest(), ByExpiresBefore: in.GetByExpiresBefore(),
			}})
			if err != nil {
				return err
			}
			return a.print(answer{message: resp, pretty: func() error {
				fmt.Fprintln(a.stdout, count(resp.GetCount(), "attested agent", "attested agents"))
				return nil
			}})
		})
	})
	f.register(cmd.Flags())
	return cmd
}

func (a *app) agentBanCommand() *cobra.Command {
	return a.agentChange("ban", "Ban an attested agent given its SPIFFE ID", "Agent banned successfully",
		func(ctx context.Context, c agentpb.AgentClient, id *typespb.SPIFFEID) (*emptypb.Empty, error) {
			return c.BanAgent(ctx, &agentpb.BanAgentRequest{Id: id})
		})
}

func (a *app) agentEvictCommand() *cobra.Command {
	return a.agentChange("evict", "Evicts an attested agent given its SPIFFE ID", "Agent evicted successfully",
		func(ctx context.Context, c agentpb.AgentClient, id *typespb.SPIFFEID) (*emptypb.Empty, error) {
			return c.DeleteAgent(ctx, &agentpb.DeleteAgentRequest{Id: id})
		})
}

func (a *app) agentChange(use, short, done string, change func(context.Context, agentpb.AgentClient, *typespb.SPIFFEID) (*emptypb.Empty, error)) *cobra.Command {
	var id string
	cmd := command(use, short, func(ctx context.Context) error {
		if id == "" {
			return errors.New("a SPIFFE ID is required")
		}
		parsed, err := spiffeid.FromString(id)
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := change(ctx, agentpb.NewAgentClient(conn), idToWire(parsed))
			if err != nil {
				return err
			}
			return a.print(answer{message: resp, pretty: func() error {
				fmt.Fprintln(a.stdout, done)
				return nil
			}})
		})
	})
	cmd.Flags().StringVar(&id, "spiffeID", "", "The SPIFFE ID of the agent to "+use+" (agent identity)")
	return cmd
}
