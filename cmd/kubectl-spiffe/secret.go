package main

import (
	"cmp"
	"context"
	"fmt"
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

// What istioctl calls the kinds and states of secrets.
const (
	kindChain, kindCA     = "Cert Chain", "CA"
	secretActive          = "ACTIVE"
	secretWarming         = "WARMING"
	secretRejected        = "REJECTED"
	secretUnknown         = "UNKNOWN NAME"
	secretTimes           = "2006-01-02T15:04:05Z07:00"
	secretCommandLongText = "Shows what SDS and the Workload API have given to the processes of a pod: names, serials and times, never a key.\n\n" +
		"The columns are those of istioctl proxy-config secret, told by the agent instead of by Envoy."
)

// secretRow is one secret that a process was given, or waits for.
type secretRow struct {
	Name        string                 `json:"name"`
	Type        string                 `json:"type"`
	Status      string                 `json:"status"`
	Serial      string                 `json:"serial,omitempty"`
	NotBefore   string                 `json:"not_before,omitempty"`
	NotAfter    string                 `json:"not_after,omitempty"`
	TrustDomain string                 `json:"trust_domain,omitempty"`
	SPIFFEID    string                 `json:"spiffe_id,omitempty"`
	API         string                 `json:"api"`
	PID         int32                  `json:"pid"`
	Container   string                 `json:"container,omitempty"`
	until       *timestamppb.Timestamp // NotAfter
}

func (a *app) secretCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "secret pod/NAME",
		Aliases:           []string{"secrets"},
		Short:             "Shows which secrets a pod was given, without keys",
		Long:              secretCommandLongText,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completePods,
		RunE:              func(cmd *cobra.Command, args []string) error { return a.secrets(cmd.Context(), args[0]) },
	}
}

func (a *app) secrets(ctx context.Context, arg string) error {
	v := &podView{}
	if a.inCluster() {
		cluster, err := a.openCluster()
		if err != nil {
			return err
		}
		ref, err := podArgument(arg, cluster.Namespace)
		if err != nil {
			return err
		}
		if err := a.viewPod(ctx, cluster, ref, v); err != nil {
			return err
		}
		if len(v.explanations) == 0 {
			word, next := v.verdict()
			return fmt.Errorf("pod %s was given no secret (%s): %s", ref, word, next)
		}
	} else {
		ref, err := podArgument(arg, a.place.kube.Namespace)
		if err != nil {
			return err
		}
		err = a.connect(func(conn grpc.ClientConnInterface) error {
			client := inspectpb.NewInspectClient(conn)
			resp, err := client.Explain(ctx, podRequest(ref))
			if err != nil {
				return err
			}
			v.explanations = resp.GetExplanations()
			if v.status, err = client.Status(ctx, &inspectpb.StatusRequest{}); status.Code(err) == codes.PermissionDenied {
				return nil
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	rows := secretRows(v.explanations, v.status)
	return a.print(answer{value: map[string]any{"secrets": rows}, table: func(t *table, wide bool) { secretTable(t, rows, wide) }})
}

// secretRows joins what streams were given with what is known of the
// certificates.
func secretRows(all []*inspectpb.Explanation, st *inspectpb.StatusResponse) []secretRow {
	rows := []secretRow{}
	for _, x := range all {
		chains := map[string]*inspectpb.Explanation_Match{}
		for _, m := range x.GetMatches() {
			if m.GetSerial() != "" {
				chains[m.GetSerial()] = m
			}
		}
		for _, c := range x.GetConnections() {
			for _, s := range c.GetStreams() {
				for _, r := range streamSecrets(s, chains, st) {
					r.PID, r.Container = c.GetCaller().GetPid(), c.GetCaller().GetContainerId()
					rows = append(rows, r)
				}
			}
		}
	}
	slices.SortStableFunc(rows, func(x, y secretRow) int {
		return cmp.Or(cmp.Compare(x.PID, y.PID), -strings.Compare(x.Type, y.Type), strings.Compare(x.Name, y.Name), strings.Compare(x.TrustDomain, y.TrustDomain))
	})
	return slices.CompactFunc(rows, func(x, y secretRow) bool {
		x.until, y.until = nil, nil
		return x == y
	})
}

func streamSecrets(s *inspectpb.Stream, chains map[string]*inspectpb.Explanation_Match, st *inspectpb.StatusResponse) []secretRow {
	state := secretActive
	if s.GetLastNack() != nil && s.GetLastNack().AsTime().After(s.GetLastAck().AsTime()) {
		state = secretRejected
	}
	var out []secretRow
	for _, v := range s.GetServed() {
		r := secretRow{Name: v.GetName(), Type: kindCA, Status: state, API: s.GetApi(), SPIFFEID: v.GetSpiffeId()}
		if v.GetSerial() == "" {
			r.TrustDomain = cmp.Or(domainOf(v.GetSpiffeId()), domainOf(v.GetName()), st.GetTrustDomain())
			if r.TrustDomain == st.GetTrustDomain() {
				r.times(nil, st.GetAuthority().GetX509AuthorityExpiresAt())
			}
		} else {
			m := chains[v.GetSerial()]
			r.Name = cmp.Or(r.Name, "(x509-svid)")
			r.Type, r.Serial, r.TrustDomain = kindChain, v.GetSerial(), domainOf(v.GetSpiffeId())
			r.times(m.GetNotBefore(), cmp.Or(v.GetExpiresAt(), m.GetExpiresAt()))
		}
		out = append(out, r)
	}
	for _, name := range s.GetLate() {
		out = append(out, secretRow{Name: name, Type: kindChain, Status: secretWarming, API: s.GetApi()})
	}
	for _, name := range s.GetUnknown() {
		out = append(out, secretRow{Name: name, Status: secretUnknown, API: s.GetApi()})
	}
	return out
}

func (r *secretRow) times(from, to *timestamppb.Timestamp) {
	if from != nil {
		r.NotBefore = from.AsTime().UTC().Format(secretTimes)
	}
	if r.until = to; to != nil {
		r.NotAfter = to.AsTime().UTC().Format(secretTimes)
	}
}

// domainOf is the trust domain of a SPIFFE ID, "" for other names.
func domainOf(id string) string {
	rest, ok := strings.CutPrefix(id, "spiffe://")
	if !ok {
		return ""
	}
	td, _, _ := strings.Cut(rest, "/")
	return td
}

func secretTable(t *table, rows []secretRow, wide bool) {
	t.columns("RESOURCE NAME", "TYPE", "STATUS", "VALID CERT", "SERIAL NUMBER", "NOT AFTER", "NOT BEFORE", "TRUST DOMAIN")
	if wide {
		t.columns("SPIFFE ID", "API", "PID", "CONTAINER")
	}
	for _, r := range rows {
		valid := ""
		if r.until != nil {
			valid = fmt.Sprint(r.until.AsTime().After(time.Now()))
		}
		cells := []string{r.Name, r.Type, r.Status, valid, r.Serial, r.NotAfter, r.NotBefore, r.TrustDomain}
		if wide {
			cells = append(cells, r.SPIFFEID, r.API, fmt.Sprint(r.PID), shorten(r.Container))
		}
		t.row(cells...)
	}
}
