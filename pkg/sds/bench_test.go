package sds_test

import (
	"fmt"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/mem"

	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// BenchmarkEncode is the encoding of one SVID, paid once per SVID.
func BenchmarkEncode(b *testing.B) {
	w := newWorld(b)
	b.ReportAllocs()
	for b.Loop() {
		sds.EncodeSVID(w.web.SVID)
	}
}

// BenchmarkStreamFold is one renewal on one stream, encoding shared: from the
// picture to the bytes for the wire.
func BenchmarkStreamFold(b *testing.B) {
	w := newWorld(b)
	for _, names := range [][]string{{"default"}, {"ROOTCA"}, {"default", "ROOTCA"}} {
		b.Run(ids(names...), func(b *testing.B) {
			m := sds.NewSotW(sds.DefaultNames(), false)
			m.Request(ask(names...), w.has(w.web))
			pictures := []*svid.Update{w.has(w.web2), w.has(w.web)}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				m.FoldOnly(pictures[i%2])
			}
		})
	}
	b.Run("unchanged", func(b *testing.B) {
		m := sds.NewSotW(sds.DefaultNames(), false)
		u := w.has(w.web)
		m.Request(ask("default"), u)
		b.ReportAllocs()
		for b.Loop() {
			if m.FoldOnly(u) {
				b.Fatal("sent")
			}
		}
	})
}

// BenchmarkReadRequest is an Envoy's first request, read by hand and in full.
func BenchmarkReadRequest(b *testing.B) {
	q := ask("default")
	q.Node = nodeWith(nil, 1, 31)
	for i := range 600 {
		q.Node.Extensions = append(q.Node.Extensions, &corev3.Extension{Name: fmt.Sprintf("envoy.filters.http.number_%d", i), Category: "envoy.filters.http", TypeUrls: []string{fmt.Sprintf("envoy.extensions.filters.http.number_%d.v3.Config", i)}})
	}
	data := mustMarshal(b, q)
	codec := sds.Codec()
	in := mem.BufferSlice{mem.SliceBuffer(data)}
	b.Run("hand", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := codec.Unmarshal(in, sds.NewRequest()); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("full", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := codec.Unmarshal(in, new(discoveryv3.DiscoveryRequest)); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkFanout is one renewal pushed to many open streams, until the last
// client has it (clients included).
func BenchmarkFanout(b *testing.B) {
	for _, n := range []int{1, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWorld(b)
			l := newLayer(w.has(w.web))
			_, conn := serve(b, l, nil)
			got := make(chan struct{}, n)
			for range n {
				stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				if err := stream.Send(ask("default")); err != nil {
					b.Fatal(err)
				}
				go func() {
					for {
						if err := stream.RecvMsg(new(discoveryv3.DiscoveryResponse)); err != nil {
							return
						}
						got <- struct{}{}
					}
				}()
			}
			for range n {
				<-got
			}
			pictures := []*svid.Update{w.has(w.web2), w.has(w.web)}
			b.ResetTimer()
			for i := 0; b.Loop(); i++ {
				l.set(pictures[i%2])
				for range n {
					<-got
				}
			}
		})
	}
}

// BenchmarkFetch is FetchSecrets over a socket, client included.
func BenchmarkFetch(b *testing.B) {
	w := newWorld(b)
	_, conn := serve(b, newLayer(w.has(w.web)), nil)
	client := secretv3.NewSecretDiscoveryServiceClient(conn)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := client.FetchSecrets(b.Context(), ask("default")); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
