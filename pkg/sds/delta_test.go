package sds_test

import (
	"strings"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

type deltaStep struct {
	ask     *discoveryv3.DeltaDiscoveryRequest
	see     *svid.Update
	sends   string
	removes string
	check   string
	late    string
}

func sub(names ...string) *discoveryv3.DeltaDiscoveryRequest {
	return &discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: names, TypeUrl: sds.TypeURL}
}

func unsub(names ...string) *discoveryv3.DeltaDiscoveryRequest {
	return &discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: names}
}

func deltaAck() *discoveryv3.DeltaDiscoveryRequest {
	return &discoveryv3.DeltaDiscoveryRequest{ResponseNonce: last}
}

func deltaNames(r *discoveryv3.DeltaDiscoveryResponse) string {
	var out []string
	for _, res := range r.GetResources() {
		out = append(out, res.GetName())
	}
	return strings.Join(out, " ")
}

func TestDeltaEvents(t *testing.T) {
	w := newWorld(t)
	none, web, both, ren := w.has(), w.has(w.web), w.has(w.web, w.db), w.has(w.web2)
	version := func(name string, u *svid.Update) string {
		return sds.NewDelta(sds.DefaultNames(), false).Request(sub(name), u).Delta.GetResources()[0].GetVersion()
	}
	have := func(q *discoveryv3.DeltaDiscoveryRequest, versions map[string]string) *discoveryv3.DeltaDiscoveryRequest {
		q.InitialResourceVersions = versions
		return q
	}
	rejected := deltaAck()
	rejected.ErrorDetail = &rpcstatus.Status{Message: "no"}
	again := sub("default")
	again.ResponseNonce = "77"
	tests := map[string][]deltaStep{
		"subscribe, ack, rotate": {
			{ask: sub("default", "ROOTCA"), see: web, sends: "default ROOTCA"},
			{ask: deltaAck(), see: web, check: "ack"},
			{see: ren, sends: "default"},
			{see: ren},
		},
		"late": {
			{ask: sub("default", "ROOTCA", "file-root:system"), see: none, sends: "ROOTCA", late: "default"},
			{see: web, sends: "default"},
		},
		"withdrawn is removed, the stream stays": {
			{ask: sub("default", "ROOTCA"), see: web, sends: "default ROOTCA"},
			{see: none, removes: "default", late: "default"},
			{see: none, late: "default"},
			{see: web, sends: "default"},
		},
		"late is not removed": {
			{ask: sub("default"), see: web, sends: "default"},
			{see: late(none, w.web), late: "default"},
			{see: &svid.Update{}, late: "default"},
			{see: web},
		},
		"nack is not answered with the same": {
			{ask: sub("default"), see: web, sends: "default"},
			{ask: rejected, see: web, check: "nack"},
			{see: ren, sends: "default"},
		},
		"initial versions are honoured": {
			{ask: have(sub("default", "ROOTCA"), map[string]string{"default": version("default", web), "ROOTCA": "old"}), see: web, sends: "ROOTCA"},
			{see: ren, sends: "default"},
		},
		"what the client brought stays while it is late": {
			{ask: have(sub("default"), map[string]string{"default": "old"}), see: none, late: "default"},
			{see: web, sends: "default"},
			{see: none, removes: "default", late: "default"},
		},
		"what the client brought and still has can be withdrawn": {
			{ask: have(sub("default"), map[string]string{"default": version("default", web)}), see: web},
			{see: none, removes: "default", late: "default"},
		},
		"subscribing again sends again, whatever the nonce": {
			{ask: sub("default"), see: web, sends: "default"},
			{ask: again, see: web, sends: "default", check: "stale"},
		},
		"unsubscribe": {
			{ask: sub("default", "ROOTCA"), see: web, sends: "default ROOTCA"},
			{ask: unsub("default"), see: web},
			{see: ren},
			{see: none},
		},
		"everything by an empty first list": {
			{ask: sub(), see: web, sends: "spiffe://example.org spiffe://example.org/web"},
			{see: both, sends: "spiffe://example.org/db"},
			{see: w.has(w.db), removes: "spiffe://example.org/web"},
			{see: w.federated(w.has(w.db)), sends: "spiffe://another.test"},
			{see: w.has(w.db), removes: "spiffe://another.test"},
			{see: late(none, w.db)},
		},
		"everything by a star, and no more": {
			{ask: sub("*"), see: web, sends: "spiffe://example.org spiffe://example.org/web"},
			{ask: sub("default"), see: web, sends: "default"},
			{ask: unsub("*"), see: web},
			{see: ren, sends: "default"},
		},
		"what a returning client of everything lost meanwhile": {
			{ask: have(sub(), map[string]string{"spiffe://example.org/db": "v", "spiffe://example.org/web": version("spiffe://example.org/web", web)}), see: web, sends: "spiffe://example.org", removes: "spiffe://example.org/db"},
		},
		"nothing before the first request": {
			{see: web},
			{ask: sub("default"), see: web, sends: "default"},
		},
	}
	for name, steps := range tests {
		t.Run(name, func(t *testing.T) {
			m := sds.NewDelta(sds.DefaultNames(), false)
			lastNonce := ""
			for i, s := range steps {
				var got sds.Outcome
				if s.ask != nil {
					if s.ask.ResponseNonce == last {
						s.ask.ResponseNonce = lastNonce
					}
					got = m.Request(s.ask, s.see)
				} else {
					got = m.Update(s.see)
				}
				if got.End != nil {
					t.Fatalf("step %d: ended: %v", i+1, got.End)
				}
				if names := deltaNames(got.Delta); names != s.sends {
					t.Errorf("step %d: sent %q, want %q", i+1, names, s.sends)
				}
				if gone := strings.Join(got.Delta.GetRemovedResources(), " "); gone != s.removes {
					t.Errorf("step %d: removed %q, want %q", i+1, gone, s.removes)
				}
				if s.check != "" && got.Verdict != s.check {
					t.Errorf("step %d: verdict %q, want %q", i+1, got.Verdict, s.check)
				}
				if l := strings.Join(got.Late, " "); l != s.late {
					t.Errorf("step %d: late %q, want %q", i+1, l, s.late)
				}
				if got.Delta != nil {
					lastNonce = got.Delta.GetNonce()
				}
			}
		})
	}
}
