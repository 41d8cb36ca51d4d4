package sds_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/google/go-cmp/cmp"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// generations are pictures of the same identities with two contents of the own
// bundle, and renewed ones with the second.
type generations struct{ one, two, ren, other *svid.Update }

func newGenerations(tb testing.TB) (g generations) {
	tb.Helper()
	w := newWorld(tb)
	grown := w.own.bundle()
	grown.AddX509Authority(newCA(tb, "example.org").cert)
	g.one, g.two, g.ren = w.has(w.web), w.has(w.web), w.has(w.web2)
	g.one.Roots, g.two.Roots, g.ren.Roots = 1, 2, 2
	g.two.Own, g.ren.Own = grown, grown
	g.other = w.federated(g.one)
	g.other.Roots = 1
	return g
}

// book shows the bookkeeping: generation sent, generation acknowledged.
func book(sent, acked uint32, rejected bool) string {
	s := fmt.Sprint(sent, " ", acked)
	if rejected {
		s += " rejected"
	}
	return s
}

func TestStreamTrust(t *testing.T) {
	g := newGenerations(t)
	type step struct {
		ask  *discoveryv3.DiscoveryRequest // nil = the picture changes
		see  *svid.Update
		book string
	}
	kept := ack("ROOTCA")
	kept.VersionInfo = "another"
	for name, steps := range map[string][]step{
		"pushed, acknowledged, pushed again": {
			{ask("default", "ROOTCA"), g.one, "1 0"},
			{ack("default", "ROOTCA"), g.one, "1 1"},
			{nil, g.two, "2 1"},
			{ack("default", "ROOTCA"), g.two, "2 2"},
			{nil, g.ren, "2 2"},
			{ack("default", "ROOTCA"), g.ren, "2 2"},
		},
		"a stream for the bundle alone": {
			{ask("ROOTCA"), g.one, "1 0"},
			{ack("ROOTCA"), g.one, "1 1"},
			{nil, g.two, "2 1"},
			{nil, g.ren, "2 1"},
			{ack("ROOTCA"), g.ren, "2 2"},
		},
		"never asked for a bundle": {
			{ask("default"), g.one, "0 0"},
			{ack("default"), g.one, "0 0"},
			{nil, g.two, "0 0"},
			{nil, g.ren, "0 0"},
			{ack("default"), g.ren, "0 0"},
		},
		"bundle of another trust domain": {
			{ask("spiffe://another.test"), g.other, "0 0"},
			{ack("spiffe://another.test"), g.other, "0 0"},
		},
		"several validation contexts": {
			{ask("ROOTCA", "ALL", "spiffe://example.org"), g.one, "1 0"},
			{ack("ROOTCA", "ALL", "spiffe://example.org"), g.one, "1 1"},
			{nil, g.two, "2 1"},
			{ack("ROOTCA", "ALL", "spiffe://example.org"), g.two, "2 2"},
		},
		"everything": {
			{ask(), g.one, "1 0"},
			{ack(), g.one, "1 1"},
			{nil, g.two, "2 1"},
		},
		"turned down, then taken with the renewed identity": {
			{ask("default", "ROOTCA"), g.one, "1 0"},
			{ack("default", "ROOTCA"), g.one, "1 1"},
			{nil, g.two, "2 1"},
			{nack("default", "ROOTCA"), g.two, "2 1 rejected"},
			{nil, g.ren, "2 1 rejected"},
			{ack("default", "ROOTCA"), g.ren, "2 2"},
		},
		"turned down, then another content": {
			{ask("ROOTCA"), g.one, "1 0"},
			{nack("ROOTCA"), g.one, "1 0 rejected"},
			{nil, g.two, "2 0"},
		},
		"the right nonce with another version is no acknowledgement": {
			{ask("ROOTCA"), g.one, "1 0"},
			{kept, g.one, "1 0 rejected"},
		},
		"stale nonce": {
			{ask("default", "ROOTCA"), g.one, "1 0"},
			{nil, g.two, "2 0"},
			{nonce(ask("default", "ROOTCA"), "1", "v"), g.two, "2 0"},
			{nonce(ask("default", "ROOTCA"), "-2", "v"), g.two, "2 0"},
			{nonce(ask("default", "ROOTCA"), "", ""), g.two, "2 0"},
			{ack("default", "ROOTCA"), g.two, "2 2"},
		},
		"a nonce of a stream before": {
			{nonce(ask("ROOTCA"), "1", "v"), g.one, "1 0"},
		},
		"asks no more for the bundle": {
			{ask("default", "ROOTCA"), g.one, "1 0"},
			{ack("default", "ROOTCA"), g.one, "1 1"},
			{ack("default"), g.one, "0 0"},
			{nil, g.two, "0 0"},
			{ack("default", "ROOTCA"), g.two, "2 0"},
			{ack("default", "ROOTCA"), g.two, "2 2"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := sds.NewSotW(sds.DefaultNames(), false)
			var lastNonce, lastVersion string
			for i, s := range steps {
				var got sds.Outcome
				if s.ask != nil {
					if s.ask.ResponseNonce == last {
						s.ask.ResponseNonce = lastNonce
					}
					if s.ask.VersionInfo == last {
						s.ask.VersionInfo = lastVersion
					}
					got = m.Request(s.ask, s.see)
				} else {
					got = m.Update(s.see)
				}
				if b := book(m.Trust()); b != s.book {
					t.Errorf("step %d: %q, want %q (sent %q)", i+1, b, s.book, secretNames(t, got.SotW))
				}
				if got.SotW != nil {
					lastNonce, lastVersion = got.SotW.GetNonce(), got.SotW.GetVersionInfo()
				}
			}
		})
	}
}

func TestDeltaTrust(t *testing.T) {
	g := newGenerations(t)
	type step struct {
		ask  *discoveryv3.DeltaDiscoveryRequest
		see  *svid.Update
		book string
	}
	about := func(nonce string, rejects bool) *discoveryv3.DeltaDiscoveryRequest {
		q := &discoveryv3.DeltaDiscoveryRequest{ResponseNonce: nonce}
		if rejects {
			q.ErrorDetail = &rpcstatus.Status{Message: "no"}
		}
		return q
	}
	have := func(u *svid.Update) *discoveryv3.DeltaDiscoveryRequest {
		q := sub("ROOTCA")
		v := sds.NewDelta(sds.DefaultNames(), false).Request(sub("ROOTCA"), u).Delta.GetResources()[0].GetVersion()
		q.InitialResourceVersions = map[string]string{"ROOTCA": v}
		return q
	}
	for name, steps := range map[string][]step{
		"pushed, acknowledged, pushed again": {
			{sub("default", "ROOTCA"), g.one, "1 0"},
			{about("1", false), g.one, "1 1"},
			{nil, g.two, "2 1"},
			{about("2", false), g.two, "2 2"},
		},
		"an identity in between: the response with the bundle counts": {
			{sub("default", "ROOTCA"), g.one, "1 0"},
			{about("1", false), g.one, "1 1"},
			{nil, g.two, "2 1"},
			{nil, g.ren, "2 1"},
			{about("2", false), g.ren, "2 2"},
			{about("3", true), g.ren, "2 2"}, // about the identity
		},
		"the identity's response is no word on the bundle": {
			{sub("ROOTCA", "default"), g.one, "1 0"},
			{nil, g.two, "2 0"},
			{nil, g.ren, "2 0"},
			{about("3", false), g.ren, "2 0"},
			{about("2", true), g.ren, "2 0 rejected"},
		},
		"stale nonce": {
			{sub("ROOTCA"), g.one, "1 0"},
			{nil, g.two, "2 0"},
			{about("1", false), g.two, "2 0"},
			{about("x", false), g.two, "2 0"},
			{about("2", false), g.two, "2 2"},
		},
		"a stream for the bundle alone": {
			{sub("ROOTCA"), g.one, "1 0"},
			{about("1", false), g.one, "1 1"},
			{nil, g.two, "2 1"},
			{nil, g.ren, "2 1"},
			{about("2", true), g.ren, "2 1 rejected"},
		},
		"never asked for a bundle": {
			{sub("default"), g.one, "0 0"},
			{about("1", false), g.one, "0 0"},
			{nil, g.ren, "0 0"},
		},
		"several validation contexts": {
			{sub("ROOTCA", "ALL"), g.one, "1 0"},
			{about("1", false), g.one, "1 1"},
			{sub("spiffe://example.org"), g.one, "1 1"},
			{about("2", false), g.one, "1 1"},
			{nil, g.two, "2 1"},
			{about("3", false), g.two, "2 2"},
		},
		"brought from the stream before": {
			{have(g.two), g.two, "2 2"},
		},
		"brought an older one": {
			{have(g.one), g.two, "2 0"},
			{about("1", false), g.two, "2 2"},
		},
		"asks no more for the bundle": {
			{sub("default", "ROOTCA"), g.one, "1 0"},
			{about("1", false), g.one, "1 1"},
			{unsub("ROOTCA"), g.one, "0 0"},
			{nil, g.two, "0 0"},
			{sub("ROOTCA"), g.two, "2 0"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := sds.NewDelta(sds.DefaultNames(), false)
			for i, s := range steps {
				var got sds.Outcome
				if s.ask != nil {
					got = m.Request(s.ask, s.see)
				} else {
					got = m.Update(s.see)
				}
				if b := book(m.Trust()); b != s.book {
					t.Errorf("step %d: %q, want %q (sent %q)", i+1, b, s.book, deltaNames(got.Delta))
				}
			}
		})
	}
}

// TestRootsOfStreams: every open stream with the bundle is visited, with what its
// client said, and one that is closed no more.
func TestRootsOfStreams(t *testing.T) {
	everyServer(t, func(t *testing.T, opts []grpc.ServerOption) {
		t.Helper()
		g := newGenerations(t)
		l := newLayer(g.one)
		srv, conn := serve(t, l, func(c *sds.Config) { c.PeerID = func(context.Context) uint64 { return 7 } }, opts...)
		roots := func() map[string]sds.RootsStatus {
			out := map[string]sds.RootsStatus{}
			srv.Roots(func(s sds.RootsStatus) { out[s.Kind] = s })
			return out
		}
		wants := func(what string, want ...sds.RootsStatus) {
			t.Helper()
			all := map[string]sds.RootsStatus{}
			for _, s := range want {
				all[s.Kind] = s
			}
			eventually(t, what, func() bool { return cmp.Equal(all, roots()) })
		}
		without := openStream(t, conn)
		without.send(ask("default"))
		without.recv()
		e := openStream(t, conn)
		e.send(ask("ROOTCA"))
		r := e.recv()
		wants("pushed", sds.RootsStatus{Peer: 7, Kind: "sotw", Sent: 1})
		e.ack(r, "ROOTCA")
		wants("acknowledged", sds.RootsStatus{Peer: 7, Kind: "sotw", Sent: 1, Acked: 1})

		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		d, err := secretv3.NewSecretDiscoveryServiceClient(conn).DeltaSecrets(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Send(sub("ROOTCA")); err != nil {
			t.Fatal(err)
		}
		dr, err := d.Recv()
		if err != nil {
			t.Fatal(err)
		}
		no := &discoveryv3.DeltaDiscoveryRequest{ResponseNonce: dr.GetNonce(), ErrorDetail: &rpcstatus.Status{Message: "bad root"}}
		if err := d.Send(no); err != nil {
			t.Fatal(err)
		}
		l.set(g.two)
		e.recv()
		if _, err := d.Recv(); err != nil {
			t.Fatal(err)
		}
		wants("a new content", sds.RootsStatus{Peer: 7, Kind: "sotw", Sent: 2, Acked: 1}, sds.RootsStatus{Peer: 7, Kind: "delta", Sent: 2})
		no.ResponseNonce = "2"
		if err := d.Send(no); err != nil {
			t.Fatal(err)
		}
		down := sds.RootsStatus{Peer: 7, Kind: "delta", Sent: 2, Rejected: true, Text: "bad root"}
		wants("turned down", sds.RootsStatus{Peer: 7, Kind: "sotw", Sent: 2, Acked: 1}, down)
		if err := e.stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		e.ends()
		wants("closed", down)
	})
}
