package sds_test

import (
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

func mustMarshal(tb testing.TB, m proto.Message) []byte {
	tb.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func seedRequests() []*discoveryv3.DiscoveryRequest {
	first := ask("default", "ROOTCA")
	first.Node = nodeWith(structpb.NewBoolValue(true), 1, 17)
	first.Node.Id = "sidecar~10.0.0.1~web.ns~ns.svc.cluster.local"
	first.Node.Extensions = []*corev3.Extension{{Name: "envoy.x", Category: "y"}}
	no := nonce(ask("default"), "1", "v")
	no.ErrorDetail = &rpcstatus.Status{Code: 3, Message: strings.Repeat("é", 400)}
	return []*discoveryv3.DiscoveryRequest{
		{},
		first, no, ask("file-root:system", "kubernetes://x", "", "*", "spiffe://example.org/web"),
		{Node: &corev3.Node{Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{"disable_spiffe_cert_validation": {}}}}},
		{Node: &corev3.Node{UserAgentVersionType: &corev3.Node_UserAgentBuildVersion{}}},
		{TypeUrl: "x"},
		{ErrorDetail: &rpcstatus.Status{}},
	}
}

// FuzzReadRequest: whatever the full decoder accepts, the hand-written reader
// reads alike.
func FuzzReadRequest(f *testing.F) {
	for _, q := range seedRequests() {
		f.Add(mustMarshal(f, q))
	}
	f.Add([]byte{0x12, 0x02, 0x3a, 0x00, 0x12, 0x00})
	f.Fuzz(func(t *testing.T, b []byte) {
		hand, full, handErr, fullErr := sds.ReadRequest(b)
		if fullErr == nil && (handErr != nil || hand != full) {
			t.Errorf("request\n by hand %s, %v\n in full %s", hand, handErr, full)
		}
		hand, full, handErr, fullErr = sds.ReadDelta(b)
		if fullErr == nil && (handErr != nil || hand != full) {
			t.Errorf("delta request\n by hand %s, %v\n in full %s", hand, handErr, full)
		}
	})
}

// FuzzNode: the node alone, metadata included, against the full decoder.
func FuzzNode(f *testing.F) {
	for _, v := range []*structpb.Value{
		structpb.NewBoolValue(true), structpb.NewStringValue("T"), structpb.NewNullValue(), structpb.NewNumberValue(1),
		{},
		structpb.NewListValue(&structpb.ListValue{}), structpb.NewStructValue(&structpb.Struct{}),
	} {
		f.Add(mustMarshal(f, nodeWith(v, 1, 17)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		plain, ok := sds.ReadNode(b)
		var n corev3.Node
		if proto.Unmarshal(b, &n) != nil {
			return
		}
		q := mustMarshal(t, &discoveryv3.DiscoveryRequest{Node: &n})
		hand, full, _, _ := sds.ReadRequest(q)
		if !ok || hand != full {
			t.Errorf("plain %v, ok %v\n by hand %s\n in full %s", plain, ok, hand, full)
		}
	})
}

// FuzzName: any name is sorted into ours and not ours without fault.
func FuzzName(f *testing.F) {
	for _, s := range []string{"default", "ROOTCA", "ALL", "", "*", "null", "spiffe://", "spiffe://td", "spiffe://td/a/b", "spiffe://td/../x", "file-root:system", "file-cert:a~b", "kubernetes://x", "SPIFFE://td"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		ours := sds.Means(sds.DefaultNames(), name)
		if ours && name != "default" && name != "ROOTCA" && name != "ALL" && !strings.HasPrefix(name, "spiffe://") {
			t.Errorf("%q taken for one of ours", name)
		}
	})
}

// FuzzEvents feeds a stream any sequence of events: parts of the input are
// requests as raw bytes, well-formed requests, and pictures. What must hold
// after each: no fault, a fresh nonce, nothing sent twice without reason,
// nothing but what the picture allows.
func FuzzEvents(f *testing.F) {
	w := newWorld(f)
	pictures := []*svid.Update{
		{},
		w.has(), w.has(w.web), w.has(w.web2), w.has(w.web, w.db), late(w.has(), w.web), w.federated(w.has(w.web)),
		late(w.has(w.db), w.web),
		{Synced: true},
		{Synced: true, Identities: []*svid.Identity{w.web}},
	}
	names := []string{"default", "ROOTCA", "ALL", "spiffe://example.org/web", "spiffe://example.org/db", "spiffe://another.test", "file-root:system", "*", ""}
	f.Add([]byte{0, 2, 1, 1, 0, 3, 2, 1, 3, 3})
	f.Add([]byte{2, 1, 255, 0, 2, 1, 1, 1, 7, 2})
	for _, q := range seedRequests() {
		f.Add(append([]byte{3}, mustMarshal(f, q)...))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		m, d := sds.NewSotW(sds.DefaultNames(), false), sds.NewDelta(sds.DefaultNames(), false)
		u := pictures[0]
		lastNonce, lastVersion, lastDelta := "", "", ""
		for len(in) > 1 {
			op, arg := in[0], in[1]
			in = in[2:]
			var got, gotDelta sds.Outcome
			request := false
			switch op % 4 {
			case 0: // the picture changes
				u = pictures[int(arg)%len(pictures)]
				got, gotDelta = m.Update(u), d.Update(u)
			case 1: // ask for some names
				request = true
				var list []string
				for i, n := range names {
					if arg&(1<<(i%8)) != 0 {
						list = append(list, n)
					}
				}
				q, dq := ask(list...), sub(list...)
				if op&4 != 0 {
					q.ResponseNonce, q.VersionInfo, dq.ResponseNonce = lastNonce, lastVersion, lastDelta
				}
				if op&8 != 0 {
					q.ErrorDetail = &rpcstatus.Status{}
				}
				if op&16 != 0 {
					dq.ResourceNamesUnsubscribe = list
				}
				if op&32 != 0 {
					dq.InitialResourceVersions = map[string]string{"default": "x", "spiffe://example.org/web": "y", "?": ""}
				}
				if op&64 != 0 {
					q.Node = nodeWith(structpb.NewBoolValue(arg&1 != 0), 0, 0)
				}
				got, gotDelta = m.Request(q, u), d.Request(dq, u)
			case 2: // the same picture again: nothing may be sent
				got, gotDelta = m.Update(u), d.Update(u)
				again, againDelta := m.Update(u), d.Update(u)
				if again.SotW != nil || againDelta.Delta != nil {
					t.Fatal("unchanged picture sent again")
				}
			case 3: // raw bytes
				request = true
				n := min(int(arg), len(in))
				got, _ = m.RequestBytes(in[:n], u)
				gotDelta, _ = d.RequestBytes(in[:n], u)
				in = in[n:]
			}
			if r := got.SotW; r != nil {
				if r.GetNonce() == lastNonce || r.GetVersionInfo() == "" || len(r.GetResources()) == 0 {
					t.Fatalf("response with nonce %q after %q, version %q, %d resources", r.GetNonce(), lastNonce, r.GetVersionInfo(), len(r.GetResources()))
				}
				lastNonce, lastVersion = r.GetNonce(), r.GetVersionInfo()
				if len(u.Identities) == 0 && strings.Contains(r.String(), "PRIVATE KEY") {
					t.Fatal("key sent to a caller without identity")
				}
			}
			if r := gotDelta.Delta; r != nil {
				if r.GetNonce() == lastDelta || len(r.GetResources())+len(r.GetRemovedResources()) == 0 {
					t.Fatal("empty delta response, or nonce repeated")
				}
				lastDelta = r.GetNonce()
			}
			if got.End != nil && (request && lastNonce == "" || !u.Synced) {
				t.Fatalf("ended without cause: %v", got.End)
			}
			if got.End != nil {
				return
			}
		}
	})
}
