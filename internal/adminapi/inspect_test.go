package adminapi_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/adminapi/inspectpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/debugpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/loggerpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// fixedSource answers with what it holds.
type fixedSource struct {
	status       *adminapi.Status
	connections  []adminapi.Connection
	explanations map[adminapi.Target][]adminapi.Explanation
}

func (s *fixedSource) Status(context.Context) (*adminapi.Status, error) { return s.status, nil }

func (s *fixedSource) Connections(context.Context) ([]adminapi.Connection, error) {
	return s.connections, nil
}

func (s *fixedSource) Explain(_ context.Context, t adminapi.Target) ([]adminapi.Explanation, error) {
	x, ok := s.explanations[t]
	if !ok {
		return nil, fmt.Errorf("no process %d has connected: %w", t.PID, adminapi.ErrNotFound)
	}
	return x, nil
}

func someSource() *fixedSource {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	caller := adminapi.CallerInfo{
		PID: 77, UID: 1000, GID: 1000, PodUID: "u", PodNamespace: "ns", PodName: "web", ContainerID: "c",
		Witnesses: []string{"ledger"}, Selectors: attest.MustSelectors("k8s:ns:ns", "unix:uid:1000"),
	}
	conn := adminapi.Connection{ID: 3, Caller: caller, Since: at, Streams: []adminapi.Stream{{
		API: "sds", Since: at, Names: []string{"default"}, LastPush: at.Add(time.Second),
		Served: []adminapi.Served{{Name: "default", SPIFFEID: "spiffe://td/web", Serial: "9", ExpiresAt: at.Add(time.Hour)}},
	}}}
	return &fixedSource{
		status:      &adminapi.Status{TrustDomain: "td", AgentID: localID.String(), Limits: []adminapi.Limit{{Name: "connections", Used: 1, Max: 9}}},
		connections: []adminapi.Connection{conn},
		explanations: map[adminapi.Target][]adminapi.Explanation{
			{PID: 77}: {{
				Caller: caller, Verdict: adminapi.VerdictIssued, Phases: []adminapi.Phase{{Name: "connected", At: at}},
				Matches: []adminapi.Match{{EntryID: "e", SPIFFEID: "spiffe://td/web", Selectors: caller.Selectors, Default: true, Serial: "9", ExpiresAt: at.Add(time.Hour)}},
			}},
			{PodNamespace: "ns", PodName: "late"}: {{
				Verdict: adminapi.VerdictLate, NextStep: "create an entry",
				Nearest: []adminapi.Near{{EntryID: "n", SPIFFEID: "spiffe://td/n", Missing: []attest.Selector{attest.MustSelector("k8s:sa:x")}}},
			}},
		},
	}
}

func TestInspect(t *testing.T) {
	c := inspectpb.NewInspectClient(dial(t, start(t, adminapi.Config{Source: someSource()})))
	st, err := c.Status(t.Context(), &inspectpb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if st.GetAgentId() != localID.String() || st.GetLimits()[0].GetMax() != 9 || st.GetStartedAt() != nil {
		t.Errorf("status: %v", st)
	}
	list, err := c.ListConnections(t.Context(), &inspectpb.ListConnectionsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	stream := list.GetConnections()[0].GetStreams()[0]
	if stream.GetServed()[0].GetSerial() != "9" || stream.GetLastNack() != nil || stream.GetLastPush().AsTime().Second() != 6 {
		t.Errorf("stream: %v", stream)
	}
	byPID, err := c.Explain(t.Context(), &inspectpb.ExplainRequest{Target: &inspectpb.ExplainRequest_Pid{Pid: 77}})
	if err != nil {
		t.Fatal(err)
	}
	if m := byPID.GetExplanations()[0].GetMatches()[0]; !m.GetIsDefault() || strings.Join(m.GetSelectors(), " ") != "k8s:ns:ns unix:uid:1000" {
		t.Errorf("match: %v", m)
	}
	byPod, err := c.Explain(t.Context(), &inspectpb.ExplainRequest{Target: &inspectpb.ExplainRequest_Pod{Pod: &inspectpb.ExplainRequest_PodRef{Namespace: "ns", Name: "late"}}})
	if err != nil {
		t.Fatal(err)
	}
	if n := byPod.GetExplanations()[0].GetNearest()[0]; strings.Join(n.GetMissing(), " ") != "k8s:sa:x" {
		t.Errorf("nearest: %v", n)
	}
	for _, tc := range []struct {
		req  *inspectpb.ExplainRequest
		want want
	}{
		{&inspectpb.ExplainRequest{}, want{3, "name a PID or a pod"}},
		{&inspectpb.ExplainRequest{Target: &inspectpb.ExplainRequest_Pid{Pid: -1}}, want{3, "PID -1 is no process"}},
		{&inspectpb.ExplainRequest{Target: &inspectpb.ExplainRequest_Pod{}}, want{3, "a pod is named by namespace and name"}},
		{&inspectpb.ExplainRequest{Target: &inspectpb.ExplainRequest_Pid{Pid: 5}}, want{5, "no process 5 has connected"}},
	} {
		_, err := c.Explain(t.Context(), tc.req)
		tc.want.checkError(t, err)
	}
}

// Nothing in the answers of Inspect can hold a key: no bytes, and no field
// that is named like one.
func TestInspectHasNoPlaceForKeys(t *testing.T) {
	var check func(m protoreflect.MessageDescriptors)
	check = func(ms protoreflect.MessageDescriptors) {
		for i := range ms.Len() {
			m := ms.Get(i)
			for j := range m.Fields().Len() {
				f := m.Fields().Get(j)
				name := string(f.Name())
				if f.Kind() == protoreflect.BytesKind || strings.Contains(name, "key") || strings.Contains(name, "token") || strings.Contains(name, "pem") {
					t.Errorf("%s.%s", m.FullName(), name)
				}
			}
			check(m.Messages())
		}
	}
	check(inspectpb.File_internal_adminapi_inspectpb_inspect_proto.Messages())
}

// allMethods are the full names of everything the socket serves.
func allMethods() []string {
	var out []string
	for _, f := range []protoreflect.FileDescriptor{
		agentpb.File_internal_spirewire_agentpb_agent_proto, bundlepb.File_internal_spirewire_bundlepb_bundle_proto,
		debugpb.File_internal_spirewire_debugpb_debug_proto, entrypb.File_internal_spirewire_entrypb_entry_proto,
		loggerpb.File_internal_spirewire_loggerpb_logger_proto, svidpb.File_internal_spirewire_svidpb_svid_proto,
		inspectpb.File_internal_adminapi_inspectpb_inspect_proto,
	} {
		s := f.Services().Get(0)
		for i := range s.Methods().Len() {
			if m := s.Methods().Get(i); !m.IsStreamingClient() {
				out = append(out, fmt.Sprintf("/%s/%s", s.FullName(), m.Name()))
			}
		}
	}
	return out
}
