package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// entriesPerPage keeps answers below the message size limit.
const entriesPerPage = 500

// filterFlags are the flags of entry show and entry count.
type filterFlags struct {
	parentID, spiffeID, hint           string
	selectors, federatesWith           []string
	downstream                         bool
	matchSelectorsOn, matchFederatesOn string
}

func (f *filterFlags) register(flags *pflag.FlagSet, verb string) {
	flags.StringVar(&f.parentID, "parentID", "", "The Parent ID of the records to "+verb)
	flags.StringVar(&f.spiffeID, "spiffeID", "", "The SPIFFE ID of the records to "+verb)
	flags.StringVar(&f.hint, "hint", "", "The Hint of the records to "+verb+" (optional)")
	flags.BoolVar(&f.downstream, "downstream", false, "A boolean value that, when set, indicates that the entry describes a downstream SPIRE server")
	flags.StringArrayVar(&f.selectors, "selector", nil, "A colon-delimited type:value selector. Can be used more than once")
	flags.StringArrayVar(&f.federatesWith, "federatesWith", nil, "SPIFFE ID of a trust domain an entry is federate with. Can be used more than once")
	flags.StringVar(&f.matchSelectorsOn, "matchSelectorsOn", "superset", "The match mode used when filtering by selectors. Options: exact, any, superset and subset")
	flags.StringVar(&f.matchFederatesOn, "matchFederatesWithOn", "superset", "The match mode used when filtering by federates with. Options: exact, any, superset and subset")
}

// filter always says something of downstream, as spire-server does; servers
// take false for "any".
func (f *filterFlags) filter() (*entrypb.ListEntriesRequest_Filter, error) {
	out := &entrypb.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(f.downstream)}
	if f.parentID != "" {
		id, err := spiffeid.FromString(f.parentID)
		if err != nil {
			return nil, fmt.Errorf("error parsing parent ID %q: %w", f.parentID, err)
		}
		out.ByParentId = idToWire(id)
	}
	if f.spiffeID != "" {
		id, err := spiffeid.FromString(f.spiffeID)
		if err != nil {
			return nil, fmt.Errorf("error parsing SPIFFE ID %q: %w", f.spiffeID, err)
		}
		out.BySpiffeId = idToWire(id)
	}
	if len(f.selectors) > 0 {
		selectors, err := parseSelectors(f.selectors)
		if err != nil {
			return nil, fmt.Errorf("error parsing selectors: %w", err)
		}
		match, err := matchMode(f.matchSelectorsOn)
		if err != nil {
			return nil, err
		}
		out.BySelectors = &typespb.SelectorMatch{Selectors: selectors, Match: match}
	}
	if len(f.federatesWith) > 0 {
		match, err := matchMode(f.matchFederatesOn)
		if err != nil {
			return nil, err
		}
		out.ByFederatesWith = &typespb.FederatesWithMatch{
			TrustDomains: f.federatesWith, Match: typespb.FederatesWithMatch_MatchBehavior(match),
		}
	}
	if f.hint != "" {
		out.ByHint = wrapperspb.String(f.hint)
	}
	return out, nil
}

func matchMode(name string) (typespb.SelectorMatch_MatchBehavior, error) {
	switch name {
	case "exact":
		return typespb.SelectorMatch_MATCH_EXACT, nil
	case "any":
		return typespb.SelectorMatch_MATCH_ANY, nil
	case "superset":
		return typespb.SelectorMatch_MATCH_SUPERSET, nil
	case "subset":
		return typespb.SelectorMatch_MATCH_SUBSET, nil
	}
	return 0, fmt.Errorf("match behavior %q unknown", name)
}

func (a *app) entryShowCommand() *cobra.Command {
	var f filterFlags
	var entryID string
	cmd := command("show", "Displays configured registration entries", func(ctx context.Context) error {
		if entryID != "" && (f.parentID != "" || f.spiffeID != "" || len(f.selectors) > 0) {
			return errors.New("the -entryID flag can't be combined with others")
		}
		filter, err := f.filter()
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			client := entrypb.NewEntryClient(conn)
			resp := &entrypb.ListEntriesResponse{}
			if entryID != "" {
				e, err := client.GetEntry(ctx, &entrypb.GetEntryRequest{Id: entryID})
				if err != nil {
					return fmt.Errorf("error fetching entry ID %s: %w", entryID, err)
				}
				resp.Entries = []*typespb.Entry{e}
			} else if resp.Entries, err = listEntries(ctx, client, filter); err != nil {
				return fmt.Errorf("error fetching entries: %w", err)
			}
			sortEntries(resp.GetEntries())
			return a.printEntries(resp)
		})
	})
	f.register(cmd.Flags(), "show")
	cmd.Flags().StringVar(&entryID, "entryID", "", "The Entry ID of the records to show")
	return cmd
}

func listEntries(ctx context.Context, client entrypb.EntryClient, filter *entrypb.ListEntriesRequest_Filter) ([]*typespb.Entry, error) {
	var out []*typespb.Entry
	token := ""
	for {
		resp, err := client.ListEntries(ctx, &entrypb.ListEntriesRequest{Filter: filter, PageSize: entriesPerPage, PageToken: token})
		if err != nil {
			return nil, err
		}
		out = append(out, resp.GetEntries()...)
		if token = resp.GetNextPageToken(); token == "" {
			return out, nil
		}
	}
}

func (a *app) printEntries(resp *entrypb.ListEntriesResponse) error {
	return a.print(answer{
		message: resp,
		pretty: func() error {
			fmt.Fprintf(a.stdout, "Found %s\n", count(len(resp.GetEntries()), "entry", "entries"))
			for _, e := range resp.GetEntries() {
				printEntry(a.stdout, e)
			}
			return nil
		},
		table: entryTable(resp.GetEntries()),
	})
}

func (a *app) entryCountCommand() *cobra.Command {
	var f filterFlags
	cmd := command("count", "Count registration entries", func(ctx context.Context) error {
		in, err := f.filter()
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := entrypb.NewEntryClient(conn).CountEntries(ctx, &entrypb.CountEntriesRequest{Filter: &entrypb.CountEntriesRequest_Filter{
				BySpiffeId: in.GetBySpiffeId(), ByParentId: in.GetByParentId(), BySelectors: in.GetBySelectors(),
				ByFederatesWith: in.GetByFederatesWith(), ByHint: in.GetByHint(), ByDownstream: in.GetByDownstream(),
			}})
			if err != nil {
				return err
			}
			return a.print(answer{message: resp, pretty: func() error {
				fmt.Fprintln(a.stdout, count(resp.GetCount(), "registration entry", "registration entries"))
				return nil
			}})
		})
	})
	f.register(cmd.Flags(), "count")
	return cmd
}
