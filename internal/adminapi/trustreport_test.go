package adminapi_test

import (
	"context"
	"math"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// told is how the X.509 key that comes next stands.
func (s *server) told(t *testing.T) embedded.Progress {
	t.Helper()
	for _, r := range s.Rotations() {
		if r.Kind == "x509" {
			return r.Progress
		}
	}
	t.Fatal("no rotation of X.509 keys")
	return embedded.Progress{}
}

func report(t *testing.T, s *server, as identity, r *watchpb.TrustReport) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := watchpb.NewWatchClient(s.dial(t, as)).ReportTrust(ctx, r)
	return err
}

// TestReportTrust: a report counts for the agent whose certificate it came with.
func TestReportTrust(t *testing.T) {
	t.Parallel()
	s := serve(t)
	one, two := s.joined(t, "one"), s.joined(t, "two")
	prepared, err := s.PrepareX509(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if p := s.told(t); p.Lagging != 2 || p.Acknowledged != 0 {
		t.Fatalf("before any report: %+v", p)
	}
	has := &watchpb.TrustReport{X509: &watchpb.TrustProgress{Held: []string{prepared.ID}, Acknowledged: []string{prepared.ID}, Consumers: 3}}
	// What a newer agent says besides is skipped.
	has.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 999, protowire.BytesType), "later"))
	if err := report(t, s, one, has); err != nil {
		t.Fatal(err)
	}
	if p := s.told(t); p.Lagging != 1 || p.Acknowledged != 1 || p.Consumers != 3 || p.Laggards[0].ID != two.id {
		t.Errorf("after the first one's report: %+v", p)
	}
	lags := &watchpb.TrustReport{OutdatedSvids: 2, X509: &watchpb.TrustProgress{
		Held: []string{prepared.ID}, Consumers: 2, Lagging: 1,
		Laggards: []*watchpb.TrustProgress_Laggard{{Name: "ns/pod", Api: "sotw", Rejected: "bad root"}},
	}}
	if err := report(t, s, two, lags); err != nil {
		t.Fatal(err)
	}
	p := s.told(t)
	if p.Lagging != 1 || p.Consumers != 5 || p.LaggingConsumers != 1 || p.Outdated != 2 {
		t.Fatalf("after both: %+v", p)
	}
	l := p.Laggards[0]
	if l.ID != two.id || l.Why != embedded.LagConsumers || len(l.Laggards) != 1 || l.Laggards[0] != (authority.Laggard{Name: "ns/pod", API: "sotw", Rejected: "bad root"}) {
		t.Errorf("%+v", l)
	}
	if err := report(t, s, two, &watchpb.TrustReport{}); err != nil {
		t.Fatal(err)
	}
	if p := s.told(t); p.Lagging != 1 || p.Laggards[0].Why != embedded.LagNotHeld || p.Consumers != 3 {
		t.Errorf("an empty report: %+v", p)
	}
}

func TestReportTrustDenied(t *testing.T) {
	t.Parallel()
	s := serve(t)
	agent := s.joined(t, "one")
	if _, err := s.PrepareX509(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, as := range map[string]identity{
		"anonymous": {},
		"workload":  s.workload(t, s.entry(t, agent.id, "/web")),
	} {
		err := report(t, s, as, &watchpb.TrustReport{OutdatedSvids: 1})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", name, err)
		}
	}
	if p := s.told(t); p.Outdated != 0 {
		t.Errorf("heard of all the same: %+v", p)
	}
}

// TestHostileReports: what is kept of a report is bounded, whatever was sent.
func TestHostileReports(t *testing.T) {
	t.Parallel()
	s := serve(t)
	agent := s.joined(t, "one")
	if _, err := s.PrepareX509(t.Context()); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 4*authority.MaxReportedText)
	many := &watchpb.TrustProgress{Consumers: math.MaxInt64, Lagging: math.MaxInt64}
	for range 1000 {
		many.Held = append(many.Held, long)
		many.Laggards = append(many.Laggards, &watchpb.TrustProgress_Laggard{Name: long, Api: long, Rejected: long}, nil)
	}
	if err := report(t, s, agent, &watchpb.TrustReport{X509: many, OutdatedSvids: math.MaxInt64}); err != nil {
		t.Fatal(err)
	}
	p := s.told(t)
	if p.Consumers != math.MaxInt32 || p.Outdated != math.MaxInt32 || len(p.Laggards) != 1 || len(p.Names()) > 1000 {
		t.Errorf("%d consumers, %d outdated, %d laggards", p.Consumers, p.Outdated, len(p.Laggards))
	}
	many.Held = []string{s.prepared(t)}
	if err := report(t, s, agent, &watchpb.TrustReport{X509: many}); err != nil {
		t.Fatal(err)
	}
	p = s.told(t)
	if len(p.Laggards) != 1 || len(p.Laggards[0].Laggards) != authority.MaxReportedLaggards {
		t.Fatalf("%+v", p)
	}
	for _, l := range p.Laggards[0].Laggards {
		if max(len(l.Name), len(l.API), len(l.Rejected)) > authority.MaxReportedText {
			t.Errorf("%d, %d, %d bytes", len(l.Name), len(l.API), len(l.Rejected))
		}
	}
	negative := &watchpb.TrustProgress{Held: []string{s.prepared(t)}, Consumers: -5, Lagging: math.MinInt64}
	if err := report(t, s, agent, &watchpb.TrustReport{X509: negative, OutdatedSvids: -1}); err != nil {
		t.Fatal(err)
	}
	if p := s.told(t); p.Consumers != 0 || p.LaggingConsumers != 0 || p.Outdated != 0 {
		t.Errorf("negative numbers: %+v", p)
	}
	huge := &watchpb.TrustReport{X509: &watchpb.TrustProgress{Held: []string{strings.Repeat("x", 8<<20)}}}
	if err := report(t, s, agent, huge); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("8 MiB: %v", err)
	}
}

// prepared is the ID of the X.509 key that comes next.
func (s *server) prepared(t *testing.T) string {
	t.Helper()
	for _, r := range s.Rotations() {
		if r.Kind == "x509" && r.Authorities.Prepared != nil {
			return r.Authorities.Prepared.ID
		}
	}
	t.Fatal("no prepared key")
	return ""
}
