package main

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/peersock"
	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

type quiet struct{}

func (quiet) Update() *svid.Update { return new(svid.Update) }
func (quiet) Park(string) error    { return nil }
func (quiet) Unpark()              {}
func (quiet) Close()               {}

// Requests longer than the window arrive whole, read by gRPC and by the stream
// handler itself.
func TestLongRequests(t *testing.T) {
	listener, err := peersock.Listen(filepath.Join(t.TempDir(), "s"), peersock.Config{})
	if err != nil {
		t.Fatal(err)
	}
	server := newGRPC(10, slog.New(slog.DiscardHandler))
	healthpb.RegisterHealthServer(server, healthService{ready: func() error { return nil }})
	secrets, err := sds.New(sds.Config{
		Subscribe: func(context.Context, func()) (sds.Subscription, error) { return quiet{}, nil },
		Snapshot:  func(context.Context) (*svid.Update, error) { return new(svid.Update), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	secrets.Register(server)
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()
	conn, err := grpc.NewClient("unix:"+listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()

	_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: strings.Repeat("x", 12*window)})
	if status.Code(err) != codes.NotFound {
		t.Errorf("health of a service with a long name: %v, want NotFound", err)
	}
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	names := make([]string, sds.MaxNames+1)
	for i := range names {
		names[i] = strings.Repeat("x", 12*window/len(names))
	}
	if err := stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: names}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "resource names") {
		t.Errorf("stream with too many names: %v, want ResourceExhausted", err)
	}
}
