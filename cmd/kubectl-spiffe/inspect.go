package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/spiffe-node/spiffe-node/internal/adminapi/inspectpb"
)

func (a *app) statusCommand() *cobra.Command {
	var everywhere bool
	cmd := command("status", "Shows the agents and who is connected to them", func(ctx context.Context) error {
		if a.inCluster() {
			return a.clusterStatus(ctx, everywhere)
		}
		return a.connect(func(conn grpc.ClientConnInterface) error {
			client := inspectpb.NewInspectClient(conn)
			st, err := client.Status(ctx, &inspectpb.StatusRequest{})
			if status.Code(err) == codes.Unimplemented {
				return a.authorityStatus(ctx, conn, err)
			}
			if err != nil {
				return err
			}
			list, err := client.ListConnections(ctx, &inspectpb.ListConnectionsRequest{})
			if err != nil {
				return err
			}
			keys, err := rotation(ctx, conn)
			if err != nil {
				return err
			}
			if a.output == formatJSON || a.output == formatYAML {
				both := map[string]any{}
				for name, x := range map[string]answer{"status": {message: st}, "connections": {message: list}} {
					v, err := plain(x)
					if err != nil {
						return err
					}
					both[name] = v
				}
				if keys != nil {
					v, err := plain(answer{message: keys})
					if err != nil {
						return err
					}
					if m, ok := v.(map[string]any); ok {
						both["rotations"] = m["rotations"]
					}
				}
				if m, ok := both["connections"].(map[string]any); ok {
					both["connections"] = m["connections"]
				}
				return a.print(answer{value: both})
			}
			now := time.Now()
			if a.output == formatPretty {
				printStatus(a.stdout, st, now)
				printTrust(a.stdout, st.GetTrust())
				printRotation(a.stdout, keys, now)
				fmt.Fprintln(a.stdout)
				if len(list.GetConnections()) == 0 {
					fmt.Fprintln(a.stdout, "Nobody is connected.")
					return nil
				}
			}
			t := &table{}
			connectionTable(t, list.GetConnections(), now, a.output == formatWide)
			return t.write(a.stdout)
		})
	})
	cmd.Flags().BoolVarP(&everywhere, "all-namespaces", "A", false, "Show callers of all namespaces")
	return cmd
}

// printStatus is the agent at a glance.
func printStatus(w io.Writer, st *inspectpb.StatusResponse, now time.Time) {
	line := func(label, format string, args ...any) {
		fmt.Fprintf(w, "%-16s %s\n", label, clean(fmt.Sprintf(format, args...)))
	}
	line("Agent", "%s", cmp.Or(st.GetAgentId(), "(not attested yet)"))
	line("Version", "%s, up %s", cmp.Or(st.GetVersion(), "unknown"), since(st.GetStartedAt(), now))
	line("Mode", "%s, callers identified by %s", st.GetMode(), st.GetPeerIdentification())
	auth := st.GetAuthority()
	state := auth.GetState()
	if auth.GetDetail() != "" {
		state += " (" + auth.GetDetail() + ")"
	}
	line("Authority", "%s, %s", auth.GetKind(), state)
	if auth.GetX509AuthorityExpiresAt() != nil {
		line("CA", "%s, expires in %s (%s)", shorten(auth.GetX509AuthorityId()), until(auth.GetX509AuthorityExpiresAt(), now), clock(auth.GetX509AuthorityExpiresAt()))
	}
	line("Entries", "%d", st.GetEntries())
	line("Connections", "%d with %s, %d parked", st.GetConnections(), count(st.GetStreams(), "stream", "streams"), st.GetParked())
	for i, l := range st.GetLimits() {
		label := ""
		if i == 0 {
			label = "Limits"
		}
		line(label, "%s: %d of %d", l.GetName(), l.GetUsed(), l.GetMax())
	}
	if len(st.GetSockets()) > 0 {
		line("Sockets", "%s", strings.Join(st.GetSockets(), ", "))
	}
	for _, warning := range st.GetWarnings() {
		line("Warning", "%s", warning)
	}
}

// connectionTable is one row per stream; a connection without streams has one.
func connectionTable(t *table, conns []*inspectpb.Connection, now time.Time, wide bool) {
	connectionColumns(t, wide)
	connectionRows(t, conns, now, wide)
}

func connectionColumns(t *table, wide bool) {
	t.columns("PID", "UID", "POD", "STREAM", "STATE", "SPIFFE ID", "EXPIRES IN", "LAST PUSH", "AGE")
	if wide {
		t.columns("CONTAINER", "WITNESSES", "NAMES", "SERIAL", "LAST ACK", "LAST NACK", "CONNECTION")
	}
}

func connectionRows(t *table, conns []*inspectpb.Connection, now time.Time, wide bool) {
	for _, c := range conns {
		streams := c.GetStreams()
		if len(streams) == 0 {
			streams = []*inspectpb.Stream{nil}
		}
		for _, s := range streams {
			id, serial, expires := identityOf(s)
			cells := []string{
				fmt.Sprint(c.GetCaller().GetPid()), fmt.Sprint(c.GetCaller().GetUid()), podText(c.GetCaller()), s.GetApi(),
				streamState(c, s, now), id, until(expires, now), ago(s.GetLastPush(), now), since(cmp.Or(s.GetSince(), c.GetSince()), now),
			}
			if wide {
				cells = append(cells, shorten(c.GetCaller().GetContainerId()), strings.Join(c.GetCaller().GetWitnesses(), ","),
					namesText(s), serial, ago(s.GetLastAck(), now), ago(s.GetLastNack(), now), fmt.Sprint(c.GetId()))
			}
			t.row(cells...)
		}
	}
}

// streamState is one word, with what matters most behind it.
func streamState(c *inspectpb.Connection, s *inspectpb.Stream, now time.Time) string {
	switch {
	case c.GetCaller().GetDenied() != "":
		return "denied: " + c.GetCaller().GetDenied()
	case s == nil:
		return "idle"
	case s.GetLastNack() != nil && s.GetLastNack().AsTime().After(s.GetLastAck().AsTime()):
		return "rejected: " + s.GetNackText()
	case len(s.GetLate()) > 0:
		return fmt.Sprintf("late %s: %s", since(s.GetParkedSince(), now), strings.Join(s.GetLate(), ","))
	case s.GetParkedSince() != nil:
		return "late " + since(s.GetParkedSince(), now)
	case len(s.GetUnknown()) > 0:
		return "unknown: " + strings.Join(s.GetUnknown(), ",")
	case len(s.GetServed()) > 0:
		return "served"
	}
	return "open"
}

// identityOf is the identity a stream was given, or how many bundles.
func identityOf(s *inspectpb.Stream) (id, serial string, expires *timestamppb.Timestamp) {
	var bundles []string
	more := 0
	for _, v := range s.GetServed() {
		switch {
		case v.GetSerial() == "":
			bundles = append(bundles, cmp.Or(v.GetSpiffeId(), v.GetName()))
		case id == "":
			id, serial, expires = v.GetSpiffeId(), v.GetSerial(), v.GetExpiresAt()
		default:
			more++
		}
	}
	switch {
	case more > 0:
		id += fmt.Sprintf(" +%d", more)
	case id == "" && len(bundles) > 0:
		id = "bundle " + strings.Join(bundles, ",")
	}
	return id, serial, expires
}

func namesText(s *inspectpb.Stream) string {
	if s != nil && len(s.GetNames()) == 0 {
		return "(all)"
	}
	return strings.Join(s.GetNames(), ",")
}

func podText(c *inspectpb.Caller) string {
	switch {
	case c.GetPodName() != "":
		return c.GetPodNamespace() + "/" + c.GetPodName()
	case c.GetPodUid() != "":
		return "uid " + c.GetPodUid()
	}
	return ""
}

// printExplanation goes from who it is over what it got to what to do next.
func printExplanation(w io.Writer, x *inspectpb.Explanation, now time.Time) error {
	c := x.GetCaller()
	who := fmt.Sprintf("Process %d (uid %d, gid %d)", c.GetPid(), c.GetUid(), c.GetGid())
	if c.GetPid() == 0 {
		who = "No process has called yet"
	}
	if pod := podText(c); pod != "" {
		who += " of pod " + pod
		if c.GetServiceAccount() != "" {
			who += ", service account " + c.GetServiceAccount()
		}
		if c.GetContainerId() != "" {
			who += ", container " + shorten(c.GetContainerId())
		}
	}
	fmt.Fprintln(w, clean(who))
	if len(c.GetWitnesses()) > 0 {
		fmt.Fprintln(w, "Known from:", strings.Join(c.GetWitnesses(), ", "))
	}
	fmt.Fprintf(w, "\nVerdict: %s\n", x.GetVerdict())
	if c.GetDenied() != "" {
		fmt.Fprintln(w, "Refused because:", clean(c.GetDenied()))
	}
	if x.GetNextStep() != "" {
		fmt.Fprintln(w, "Next step:", clean(x.GetNextStep()))
	}
	printList(w, "Selectors", c.GetSelectors())
	if err := printMatches(w, x.GetMatches(), now); err != nil {
		return err
	}
	printNearest(w, x.GetNearest())
	if err := printPhases(w, x.GetPhases()); err != nil {
		return err
	}
	if len(x.GetConnections()) == 0 {
		return nil
	}
	fmt.Fprint(w, "\nConnections:\n")
	t := &table{}
	connectionTable(t, x.GetConnections(), now, false)
	return t.write(w)
}

func printList(w io.Writer, title string, items []string) {
	if len(items) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%s:\n", title)
	for _, item := range items {
		fmt.Fprintln(w, "  "+clean(item))
	}
}

func printMatches(w io.Writer, matches []*inspectpb.Explanation_Match, now time.Time) error {
	if len(matches) == 0 {
		return nil
	}
	fmt.Fprint(w, "\nMatched entries, the default identity first:\n")
	t := &table{}
	t.columns("SPIFFE ID", "ENTRY ID", "SERIAL", "EXPIRES IN", "HINT", "LAST ERROR")
	for _, m := range matches {
		id, serial := m.GetSpiffeId(), m.GetSerial()
		if m.GetIsDefault() {
			id += " (default)"
		}
		if serial == "" {
			serial = "not signed yet"
		}
		t.row(id, m.GetEntryId(), serial, until(m.GetExpiresAt(), now), m.GetHint(), m.GetLastError())
	}
	return t.write(w)
}

func printNearest(w io.Writer, nearest []*inspectpb.Explanation_Near) {
	if len(nearest) == 0 {
		return
	}
	fmt.Fprint(w, "\nNo entry matches. The nearest, with what the caller lacks:\n")
	for _, n := range nearest {
		fmt.Fprintf(w, "  %s (entry %s)\n", n.GetSpiffeId(), n.GetEntryId())
		for _, m := range n.GetMissing() {
			fmt.Fprintln(w, "    lacks "+clean(m))
		}
	}
}

// printPhases shows how long each step took after the one before.
func printPhases(w io.Writer, phases []*inspectpb.Explanation_Phase) error {
	if len(phases) == 0 {
		return nil
	}
	fmt.Fprint(w, "\nWhat happened:\n")
	t := &table{}
	t.columns("AT", "AFTER", "PHASE", "DETAIL")
	// What has a time comes first, in the order given.
	phases = slices.SortedStableFunc(slices.Values(phases), func(a, b *inspectpb.Explanation_Phase) int {
		return cmp.Compare(untimed(a), untimed(b))
	})
	var before time.Time
	for _, p := range phases {
		at, after := "", ""
		if p.GetAt() != nil {
			this := p.GetAt().AsTime()
			if at = this.Local().Format("15:04:05.000"); before.IsZero() || this.Sub(before) > 12*time.Hour {
				at = this.Local().Format("2006-01-02 15:04:05.000")
			}
			if !before.IsZero() {
				after = "+" + fine(this.Sub(before))
			}
			before = this
		}
		t.row(at, after, p.GetName(), strings.TrimSpace(p.GetDetail()))
	}
	return t.write(w)
}

func untimed(p *inspectpb.Explanation_Phase) int {
	if p.GetAt() == nil {
		return 1
	}
	return 0
}

// fine is a duration with three significant digits.
func fine(d time.Duration) string {
	switch {
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	}
	return d.Round(time.Microsecond).String()
}

func since(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return ""
	}
	return short3(now.Sub(t.AsTime()))
}

func ago(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return ""
	}
	return since(t, now) + " ago"
}

func until(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return ""
	}
	if !t.AsTime().After(now) {
		return "expired"
	}
	return short3(t.AsTime().Sub(now))
}

func clock(t *timestamppb.Timestamp) string { return t.AsTime().UTC().Format(time.RFC3339) }

// shorten cuts long hexadecimal IDs to what people compare by eye.
func shorten(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}
