package sds_test

import (
	"runtime"
	"strings"
	"testing"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
)

// A quiet stream waits without gRPC's RecvMsg on its stack. When this fails
// after an update of gRPC, every stream costs 4 KiB more.
func TestQuietStreamsWaitShallow(t *testing.T) {
	w := newWorld(t)
	_, conn := serve(t, newLayer(w.has(w.web)), nil)
	e := openStream(t, conn)
	e.send(ask("default"))
	e.recv()
	eventually(t, "one handler, waiting for a header", func() bool {
		buf := make([]byte, 1<<20)
		handlers, shallow := 0, 0
		for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if !strings.Contains(g, "pkg/sds.handleStream") {
				continue
			}
			handlers++
			if strings.Contains(g, "ReadMessageHeader") && !strings.Contains(g, "RecvMsg") {
				shallow++
			}
		}
		return handlers == 1 && shallow == 1
	})
}

// Compressed streams are read by gRPC.
func TestCompressedRequests(t *testing.T) {
	w := newWorld(t)
	_, conn := serve(t, newLayer(w.has(w.web)), nil)
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(t.Context(), grpc.UseCompressor(gzip.Name))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := stream.Send(ask("default")); err != nil {
			t.Fatal(err)
		}
	}
	got, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if names := secretNames(t, got); names != "default" {
		t.Errorf("got %q", names)
	}
}

// framed sends bytes as one message.
type framed struct{}

func (framed) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}
func (framed) Unmarshal(mem.BufferSlice, any) error { return nil }
func (framed) Name() string                         { return "proto" }

func TestRequestTooLong(t *testing.T) {
	w := newWorld(t)
	_, conn := serve(t, newLayer(w.has(w.web)), nil)
	for _, tt := range []struct {
		name string
		size int
		want codes.Code
	}{
		{"empty", 0, codes.OK},
		{"too long", 1<<20 + 1, codes.ResourceExhausted},
	} {
		stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true},
			"/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets", grpc.ForceCodecV2(framed{}))
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.SendMsg(make([]byte, tt.size)); err != nil {
			t.Fatal(err)
		}
		if err := stream.RecvMsg(nil); status.Code(err) != tt.want {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}
