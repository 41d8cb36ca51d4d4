package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/trustdomainpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

func (a *app) federationCommand() *cobra.Command {
	return group("federation", "Manage federation relationships with other trust domains",
		a.federationCreateCommand(), a.federationDeleteCommand(), a.federationListCommand(),
		a.federationRefreshCommand(), a.federationShowCommand(), a.federationUpdateCommand())
}

func (a *app) federationCreateCommand() *cobra.Command {
	var f federationFlags
	cmd := command("create", "Creates a dynamic federation relationship with a foreign trust domain", func(ctx context.Context) error {
		asked, err := a.relationshipsOf(&f)
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := trustdomainpb.NewTrustDomainClient(conn).BatchCreateFederationRelationship(ctx,
				&trustdomainpb.BatchCreateFederationRelationshipRequest{FederationRelationships: asked})
			if err != nil {
				return fmt.Errorf("request failed: %w", err)
			}
			var results []relationResult
			for _, r := range resp.GetResults() {
				results = append(results, relationResult{r.GetStatus(), r.GetFederationRelationship()})
			}
			return a.printRelationResults(resp, asked, results, "create")
		})
	})
	f.register(cmd.Flags())
	return cmd
}

func (a *app) federationUpdateCommand() *cobra.Command {
	var f federationFlags
	cmd := command("update", "Updates a dynamic federation relationship with a foreign trust domain", func(ctx context.Context) error {
		asked, err := a.relationshipsOf(&f)
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := trustdomainpb.NewTrustDomainClient(conn).BatchUpdateFederationRelationship(ctx,
				&trustdomainpb.BatchUpdateFederationRelationshipRequest{FederationRelationships: asked})
			if err != nil {
				return fmt.Errorf("request failed: %w", err)
			}
			var results []relationResult
			for _, r := range resp.GetResults() {
				results = append(results, relationResult{r.GetStatus(), r.GetFederationRelationship()})
			}
			return a.printRelationResults(resp, asked, results, "update")
		})
	})
	f.register(cmd.Flags())
	return cmd
}

// relationResult is one result of a batch.
type relationResult struct {
	status *typespb.Status
	of     *typespb.FederationRelationship
}

func (a *app) printRelationResults(resp proto.Message, asked []*typespb.FederationRelationship, results []relationResult, verb string) error {
	var done []*typespb.FederationRelationship
	for i := range results {
		r := &results[i]
		switch {
		case !failed(r.status):
			done = append(done, r.of)
		case i < len(asked):
			r.of = asked[i] // the server does not repeat what it refused
		}
	}
	failures := func() error {
		for _, r := range results {
			if failed(r.status) {
				fmt.Fprintln(a.stdout)
				fmt.Fprintf(a.stderr, "Failed to %s the following federation relationship (code: %s, msg: %q):\n", verb, codeText(r.status), r.status.GetMessage())
				printRelationship(a.stderr, r.of)
			}
		}
		if len(done) < len(results) {
			return fmt.Errorf("failed to %s one or more federation relationships", verb)
		}
		return nil
	}
	if a.output == formatTable || a.output == formatWide {
		if len(done) > 0 {
			if err := a.print(answer{table: relationTable(done, nil)}); err != nil {
				return err
			}
		}
		return failures()
	}
	return a.print(answer{message: resp, pretty: func() error {
		for _, r := range done {
			fmt.Fprintln(a.stdout)
			printRelationship(a.stdout, r)
		}
		return failures()
	}})
}

func printRelationship(w io.Writer, r *typespb.FederationRelationship) {
	fmt.Fprintf(w, "Trust domain              : %s\n", r.GetTrustDomain())
	fmt.Fprintf(w, "Bundle endpoint URL       : %s\n", r.GetBundleEndpointUrl())
	switch profile := r.GetBundleEndpointProfile().(type) {
	case *typespb.FederationRelationship_HttpsWeb:
		fmt.Fprintf(w, "Bundle endpoint profile   : %s\n", profileWeb)
	case *typespb.FederationRelationship_HttpsSpiffe:
		fmt.Fprintf(w, "Bundle endpoint profile   : %s\n", profileSPIFFE)
		fmt.Fprintf(w, "Endpoint SPIFFE ID        : %s\n", profile.HttpsSpiffe.GetEndpointSpiffeId())
	}
}

func (a *app) federationListCommand() *cobra.Command {
	return command("list", "Lists all dynamic federation relationships", func(ctx context.Context) error {
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := trustdomainpb.NewTrustDomainClient(conn).ListFederationRelationships(ctx, &trustdomainpb.ListFederationRelationshipsRequest{})
			if err != nil {
				return fmt.Errorf("error listing federation relationship: %w", err)
			}
			all := resp.GetFederationRelationships()
			x := answer{message: resp, pretty: func() error {
				fmt.Fprintln(a.stdout, "Found", count(len(all), "federation relationship", "federation relationships"))
				for _, r := range all {
					fmt.Fprintln(a.stdout)
					printRelationship(a.stdout, r)
				}
				return nil
			}}
			x.table = relationTable(all, a.relationStatus(ctx, conn))
			return a.print(x)
		})
	})
}

func (a *app) federationShowCommand() *cobra.Command {
	var td string
	cmd := command("show", "Shows a dynamic federation relationship", func(ctx context.Context) error {
		if td == "" {
			return errors.New("a trust domain name is required")
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			r, err := trustdomainpb.NewTrustDomainClient(conn).GetFederationRelationship(ctx, &trustdomainpb.GetFederationRelationshipRequest{TrustDomain: td})
			if err != nil {
				return fmt.Errorf("error showing federation relationship: %w", err)
			}
			x := answer{message: r, pretty: func() error {
				fmt.Fprintf(a.stdout, "Found a federation relationship with trust domain %s:\n\n", td)
				printRelationship(a.stdout, r)
				return nil
			}}
			x.table = relationTable([]*typespb.FederationRelationship{r}, a.relationStatus(ctx, conn))
			return a.print(x)
		})
	})
	cmd.Flags().StringVar(&td, "trustDomain", "", "The trust domain name of the federation relationship to show")
	return cmd
}

func (a *app) federationDeleteCommand() *cobra.Command {
	var id string
	cmd := command("delete", "Deletes a dynamic federation relationship", func(ctx context.Context) error {
		if id == "" {
			return errors.New("id is required")
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := trustdomainpb.NewTrustDomainClient(conn).BatchDeleteFederationRelationship(ctx,
				&trustdomainpb.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{id}})
			if err != nil {
				return fmt.Errorf("failed to delete federation relationship: %w", err)
			}
			return a.print(answer{message: resp, pretty: func() error {
				for _, r := range resp.GetResults() {
					if failed(r.GetStatus()) {
						return fmt.Errorf("failed to delete federation relationship %q: %s", r.GetTrustDomain(), r.GetStatus().GetMessage())
					}
				}
				fmt.Fprintln(a.stdout, "federation relationship deleted.")
				return nil
			}})
		})
	})
	cmd.Flags().StringVar(&id, "id", "", "SPIFFE ID of the trust domain")
	return cmd
}

func (a *app) federationRefreshCommand() *cobra.Command {
	var id string
	cmd := command("refresh", "Refreshes the bundle from the specified federated trust domain", func(ctx context.Context) error {
		if id == "" {
			return errors.New("id is required")
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			_, err := trustdomainpb.NewTrustDomainClient(conn).RefreshBundle(ctx, &trustdomainpb.RefreshBundleRequest{TrustDomain: id})
			switch status.Code(err) {
			case codes.OK:
				return a.print(answer{message: &typespb.Status{Message: "OK"}, pretty: func() error {
					fmt.Fprintln(a.stdout, "Bundle refreshed")
					return nil
				}})
			case codes.NotFound:
				return fmt.Errorf("there is no federation relationship with trust domain %q", id)
			default:
				return fmt.Errorf("failed to refresh bundle: %w", err)
			}
		})
	})
	cmd.Flags().StringVar(&id, "id", "", "SPIFFE ID of the trust domain")
	return cmd
}
