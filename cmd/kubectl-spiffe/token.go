package main

import (
	"context"
	"fmt"
	"math"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
)

func (a *app) tokenCommand() *cobra.Command {
	return group("token", "Manage join tokens", a.tokenGenerateCommand())
}

func (a *app) tokenGenerateCommand() *cobra.Command {
	var (
		ttl int
		id  string
	)
	cmd := command("generate", "Generates a join token", func(ctx context.Context) error {
		if ttl > math.MaxInt32 {
			return fmt.Errorf("a TTL of %d seconds is more than the server can be told", ttl)
		}
		req := &agentpb.CreateJoinTokenRequest{Ttl: int32(ttl)}
		if id != "" {
			parsed, err := spiffeid.FromString(id)
			if err != nil {
				return err
			}
			req.AgentId = idToWire(parsed)
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			token, err := agentpb.NewAgentClient(conn).CreateJoinToken(ctx, req)
			if err != nil {
				return err
			}
			return a.print(answer{message: token, pretty: func() error {
				fmt.Fprintf(a.stdout, "Token: %s\n", token.GetValue())
				if id == "" {
					fmt.Fprintln(a.stdout, "Warning: Missing SPIFFE ID.")
				}
				return nil
			}})
		})
	})
	cmd.Flags().IntVar(&ttl, "ttl", 600, "Token TTL in seconds")
	cmd.Flags().StringVar(&id, "spiffeID", "", "Additional SPIFFE ID to assign the token owner (optional)")
	return cmd
}
