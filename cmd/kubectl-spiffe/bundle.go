package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

func (a *app) bundleCommand() *cobra.Command {
	return group("bundle", "Manage trust bundles",
		a.bundleCountCommand(), a.bundleDeleteCommand(), a.bundleListCommand(), a.bundleSetCommand(), a.bundleShowCommand())
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

func (a *app) bundleShowCommand() *cobra.Command {
	var form string
	cmd := command("show", "Prints server CA bundle to stdout", func(ctx context.Context) error {
		return a.connect(func(conn grpc.ClientConnInterface) error {
			b, err := bundlepb.NewBundleClient(conn).GetBundle(ctx, &bundlepb.GetBundleRequest{})
			if err != nil {
				return err
			}
			return a.print(answer{
				message: b,
				pretty:  func() error { return writeBundle(a.stdout, b, form) },
				table:   bundleTable([]*typespb.Bundle{b}),
			})
		})
	})
	cmd.Flags().StringVar(&form, "format", "pem", `The format to show the bundle (only pretty output format supports this flag). Either "pem" or "spiffe".`)
	return cmd
}

func (a *app) bundleListCommand() *cobra.Command {
	var id, form string
	cmd := command("list", "Lists federated bundle data", func(ctx context.Context) error {
		return a.connect(func(conn grpc.ClientConnInterface) error {
			client := bundlepb.NewBundleClient(conn)
			if id != "" {
				b, err := client.GetFederatedBundle(ctx, &bundlepb.GetFederatedBundleRequest{TrustDomain: id})
				if err != nil {
					return err
				}
				return a.print(answer{
					message: b,
					pretty:  func() error { return writeBundle(a.stdout, b, form) },
					table:   bundleTable([]*typespb.Bundle{b}),
				})
			}
			resp, err := client.ListFederatedBundles(ctx, &bundlepb.ListFederatedBundlesRequest{})
			if err != nil {
				return err
			}
			return a.print(answer{
				message: resp,
				pretty:  func() error { return a.printBundles(resp.GetBundles(), form) },
				table:   bundleTable(resp.GetBundles()),
			})
		})
	})
	cmd.Flags().StringVar(&id, "id", "", "SPIFFE ID of the trust domain")
	cmd.Flags().StringVar(&form, "format", "pem", `The format to list federated bundles (only pretty output format supports this flag). Either "pem" or "spiffe".`)
	return cmd
}

func (a *app) printBundles(bundles []*typespb.Bundle, form string) error {
	rule := strings.Repeat("*", 40)
	for i, b := range bundles {
		if _, err := parseBundleFormat(form); err != nil {
			return err
		}
		if i > 0 {
			fmt.Fprintln(a.stdout)
		}
		fmt.Fprintf(a.stdout, "%s\n* %s\n%s\n", rule, b.GetTrustDomain(), rule)
		if err := writeBundle(a.stdout, b, form); err != nil {
			return err
		}
	}
	return nil
}

// bundleTable is one row per bundle.
func bundleTable(bundles []*typespb.Bundle) func(*table, bool) {
	return func(t *table, wide bool) {
		t.columns("TRUST DOMAIN", "X.509 AUTHORITIES", "JWT AUTHORITIES", "SEQUENCE", "REFRESH HINT")
		if wide {
			t.columns("EXPIRES", "KEY IDS")
		}
		for _, b := range bundles {
			cells := []string{
				b.GetTrustDomain(), strconv.Itoa(len(b.GetX509Authorities())), strconv.Itoa(len(b.GetJwtAuthorities())),
				strconv.FormatUint(b.GetSequenceNumber(), 10), (time.Duration(b.GetRefreshHint()) * time.Second).String(),
			}
			if wide {
				var ids []string
				for _, k := range b.GetJwtAuthorities() {
					ids = append(ids, k.GetKeyId())
				}
				cells = append(cells, lastExpiry(b), strings.Join(ids, ","))
			}
			t.row(cells...)
		}
	}
}

func (a *app) bundleSetCommand() *cobra.Command {
	var id, path, form string
	cmd := command("set", "Creates or updates federated bundle data", func(ctx context.Context) error {
		if id == "" {
			return errors.New("id flag is required")
		}
		f, err := parseBundleFormat(form)
		if err != nil {
			return err
		}
		if path == "" {
			path = "-"
		}
		data, err := a.readFile(path)
		if err != nil {
			return fmt.Errorf("unable to load bundle data: %w", err)
		}
		b, err := readBundle(id, data, f)
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := bundlepb.NewBundleClient(conn).BatchSetFederatedBundle(ctx, &bundlepb.BatchSetFederatedBundleRequest{Bundle: []*typespb.Bundle{b}})
			if err != nil {
				return fmt.Errorf("failed to set federated bundle: %w", err)
			}
			return a.print(answer{message: resp, pretty: func() error {
				for _, r := range resp.GetResults() {
					if failed(r.GetStatus()) {
						return fmt.Errorf("failed to set federated bundle: %s", r.GetStatus().GetMessage())
					}
				}
				fmt.Fprintln(a.stdout, "bundle set.")
				return nil
			}})
		})
	})
	cmd.Flags().StringVar(&id, "id", "", "SPIFFE ID of the trust domain")
	cmd.Flags().StringVar(&path, "path", "", "Path to the bundle data")
	cmd.Flags().StringVar(&form, "format", "pem", `The format of the bundle data. Either "pem" or "spiffe".`)
	return cmd
}

func (a *app) bundleDeleteCommand() *cobra.Command {
	var id, mode string
	modes := map[string]bundlepb.BatchDeleteFederatedBundleRequest_Mode{
		"restrict":   bundlepb.BatchDeleteFederatedBundleRequest_RESTRICT,
		"delete":     bundlepb.BatchDeleteFederatedBundleRequest_DELETE,
		"dissociate": bundlepb.BatchDeleteFederatedBundleRequest_DISSOCIATE,
	}
	cmd := command("delete", "Deletes federated bundle data", func(ctx context.Context) error {
		m, ok := modes[mode]
		switch {
		case id == "":
			return errors.New("id is required")
		case !ok:
			return fmt.Errorf("unsupported mode %q", mode)
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := bundlepb.NewBundleClient(conn).BatchDeleteFederatedBundle(ctx,
				&bundlepb.BatchDeleteFederatedBundleRequest{TrustDomains: []string{id}, Mode: m})
			if err != nil {
				return fmt.Errorf("failed to delete federated bundle: %w", err)
			}
			return a.print(answer{message: resp, pretty: func() error {
				for _, r := range resp.GetResults() {
					if failed(r.GetStatus()) {
						return fmt.Errorf("failed to delete federated bundle %q: %s", r.GetTrustDomain(), r.GetStatus().GetMessage())
					}
				}
				fmt.Fprintln(a.stdout, "bundle deleted.")
				return nil
			}})
		})
	})
	cmd.Flags().StringVar(&id, "id", "", "SPIFFE ID of the trust domain")
	cmd.Flags().StringVar(&mode, "mode", "restrict", "Deletion mode: one of restrict, delete, or dissociate")
	return cmd
}

func (a *app) bundleCountCommand() *cobra.Command {
	return command("count", "Count bundles", func(ctx context.Context) error {
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := bundlepb.NewBundleClient(conn).CountBundles(ctx, &bundlepb.CountBundlesRequest{})
			if err != nil {
				return err
			}
			return a.print(answer{message: resp, pretty: func() error {
				fmt.Fprintln(a.stdout, count(resp.GetCount(), "bundle", "bundles"))
				return nil
			}})
		})
	})
}
