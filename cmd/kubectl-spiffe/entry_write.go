package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

func (a *app) entryCommand() *cobra.Command {
	return group("entry", "Manage registration entries",
		a.entryCountCommand(), a.entryCreateCommand(), a.entryDeleteCommand(), a.entryShowCommand(), a.entryUpdateCommand())
}

func (a *app) entryCreateCommand() *cobra.Command {
	var f entryFlags
	cmd := command("create", "Creates registration entries", func(ctx context.Context) error {
		entries, err := a.entriesOf(&f, false)
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := entrypb.NewEntryClient(conn).BatchCreateEntry(ctx, &entrypb.BatchCreateEntryRequest{Entries: entries})
			if err != nil {
				return err
			}
			var results []entryResult
			for i, r := range resp.GetResults() {
				if failed(r.GetStatus()) && i < len(entries) {
					// What was asked for, not the entry that is in the way.
					r.Entry = entries[i]
				}
				results = append(results, entryResult{r.GetStatus(), r.GetEntry()})
			}
			return a.printEntryResults(resp, results, "create")
		})
	})
	f.register(cmd.Flags(), false)
	return cmd
}

func (a *app) entryUpdateCommand() *cobra.Command {
	var f entryFlags
	var cmd *cobra.Command
	cmd = command("update", "Updates registration entries", func(ctx context.Context) error {
		entries, err := a.entriesOf(&f, true)
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			client := entrypb.NewEntryClient(conn)
			prefetch, jti := cmd.Flags().Changed("disableX509SVIDPrefetch"), cmd.Flags().Changed("jwtSVIDIncludeJTI")
			if f.data == "" && (prefetch || jti) {
				stored, err := client.GetEntry(ctx, &entrypb.GetEntryRequest{Id: f.entryID})
				if err != nil {
					return fmt.Errorf("failed to fetch existing entry to merge additional attributes: %w", err)
				}
				entries[0].AdditionalAttributes = mergeAttributes(stored.GetAdditionalAttributes(), &f, prefetch, jti)
			}
			resp, err := client.BatchUpdateEntry(ctx, &entrypb.BatchUpdateEntryRequest{Entries: entries})
			if err != nil {
				return err
			}
			var results []entryResult
			for i, r := range resp.GetResults() {
				if failed(r.GetStatus()) && i < len(entries) {
					r.Entry = entries[i]
				}
				results = append(results, entryResult{r.GetStatus(), r.GetEntry()})
			}
			return a.printEntryResults(resp, results, "update")
		})
	})
	f.register(cmd.Flags(), true)
	return cmd
}

// mergeAttributes changes only what a flag was given for.
func mergeAttributes(stored *typespb.Entry_AdditionalAttributes, f *entryFlags, prefetch, jti bool) *typespb.Entry_AdditionalAttributes {
	out := &typespb.Entry_AdditionalAttributes{
		DisableX509SvidPrefetch: stored.GetDisableX509SvidPrefetch(), JwtSvidIncludeJti: stored.GetJwtSvidIncludeJti(),
	}
	if prefetch {
		out.DisableX509SvidPrefetch = f.noPrefetch
	}
	if jti {
		out.JwtSvidIncludeJti = f.jti
	}
	return out
}

// entriesOf are the entries that flags or the file they name describe.
func (a *app) entriesOf(f *entryFlags, update bool) ([]*typespb.Entry, error) {
	if err := f.check(update); err != nil {
		return nil, err
	}
	if f.data == "" {
		e, err := f.entry()
		if err != nil {
			return nil, err
		}
		return []*typespb.Entry{e}, nil
	}
	data, err := a.readFile(f.data)
	if err != nil {
		return nil, err
	}
	return parseEntries(data)
}

type entryResult struct {
	status *typespb.Status
	entry  *typespb.Entry
}

func (a *app) printEntryResults(resp proto.Message, results []entryResult, verb string) error {
	var done []*typespb.Entry
	for _, r := range results {
		if !failed(r.status) {
			done = append(done, r.entry)
		}
	}
	failures := func() error {
		for _, r := range results {
			if failed(r.status) {
				fmt.Fprintf(a.stderr, "Failed to %s the following entry (code: %s, msg: %q):\n", verb, codeText(r.status), r.status.GetMessage())
				printEntry(a.stderr, r.entry)
			}
		}
		if len(done) < len(results) {
			return fmt.Errorf("failed to %s one or more entries", verb)
		}
		return nil
	}
	if a.output == formatTable || a.output == formatWide {
		if len(done) > 0 {
			if err := a.print(answer{table: entryTable(done)}); err != nil {
				return err
			}
		}
		return failures()
	}
	return a.print(answer{message: resp, pretty: func() error {
		for _, e := range done {
			printEntry(a.stdout, e)
		}
		return failures()
	}})
}

func (a *app) entryDeleteCommand() *cobra.Command {
	var entryID, file string
	cmd := command("delete", "Deletes registration entries", func(ctx context.Context) error {
		ids, err := a.idsToDelete(entryID, file)
		if err != nil {
			return err
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			resp, err := entrypb.NewEntryClient(conn).BatchDeleteEntry(ctx, &entrypb.BatchDeleteEntryRequest{Ids: ids})
			if err != nil {
				return err
			}
			return a.print(answer{message: resp, pretty: func() error { return a.printDeleted(resp.GetResults()) }})
		})
	})
	cmd.Flags().StringVar(&entryID, "entryID", "", "The Registration Entry ID of the record to delete.")
	cmd.Flags().StringVar(&file, "file", "", "Path to a file containing a JSON structure for batch deletion (optional). If set to '-', read from stdin.")
	return cmd
}

func (a *app) idsToDelete(entryID, file string) ([]string, error) {
	if file == "" {
		if entryID == "" {
			return nil, errors.New("an entry ID is required")
		}
		return []string{entryID}, nil
	}
	data, err := a.readFile(file)
	if err != nil {
		return nil, err
	}
	var doc struct {
		IDs []string `json:"ids"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	return doc.IDs, nil
}

// printDeleted is byte for byte what spire-server prints, blank lines and the
// missing end of the last line included.
func (a *app) printDeleted(results []*entrypb.BatchDeleteEntryResponse_Result) error {
	done, lost := 0, 0
	for _, r := range results {
		if !failed(r.GetStatus()) {
			fmt.Fprintln(a.stdout, "Deleted entry with ID:", r.GetId())
			done++
		}
	}
	if done > 0 {
		fmt.Fprint(a.stdout, "\n\n")
	}
	for _, r := range results {
		if failed(r.GetStatus()) {
			fmt.Fprintf(a.stderr, "Failed to delete entry with ID %s (code: %s, msg: %q)\n", r.GetId(), codeText(r.GetStatus()), r.GetStatus().GetMessage())
			lost++
		}
	}
	if lost > 0 {
		fmt.Fprint(a.stdout, "\n\n")
	}
	switch {
	case lost == 0:
		fmt.Fprintf(a.stdout, "Deleted %d entries successfully", done)
		return nil
	case done == 0:
		fmt.Fprintf(a.stdout, "Failed to delete %d entries", lost)
	default:
		fmt.Fprintf(a.stdout, "Deleted %d entries successfully, but failed to delete %d entries", done, lost)
	}
	return errors.New("failed to delete one or more entries")
}
