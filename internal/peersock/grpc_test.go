package peersock_test

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/peersock"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// attesting is a Bind by a real attestor.
func attesting(tb testing.TB, cfg attest.Config) (*attest.Attestor, func(context.Context, attest.Caller) (attest.Subject, error)) {
	tb.Helper()
	a, err := attest.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	return a, func(ctx context.Context, c attest.Caller) (attest.Subject, error) {
		b, err := a.Bind(ctx, c)
		if err != nil {
			return nil, err
		}
		return b, nil
	}
}

// From a process to a gRPC handler that knows its selectors.
func TestGRPC(t *testing.T) {
	t.Parallel()
	_, bind := attesting(t, attest.Config{Mode: attest.ModeUnix, Unix: attest.UnixConfig{DiscoverPath: true}})
	s := unserved(t, peersock.Config{Bind: bind})
	seen := make(chan attest.Selectors, 10)
	srv := grpc.NewServer(grpc.Creds(peersock.Credentials()), grpc.UnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			p, ok := peersock.FromContext(ctx)
			if !ok {
				return nil, status.Error(codes.Internal, "no peer")
			}
			subject, err := p.Subject()
			if err != nil {
				return nil, status.Error(codes.PermissionDenied, err.Error())
			}
			seen <- subject.Selectors()
			return next(ctx, req)
		}))
	healthpb.RegisterHealthServer(srv, health.NewServer())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(s.Listener) }()
	defer func() {
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	client, err := grpc.NewClient("unix:"+s.path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := healthpb.NewHealthClient(client).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	exe, _ := os.Executable()
	got := <-seen
	if !got.Contains(attest.MustSelector("unix:path:"+exe)) || !got.Contains(attest.MustSelector("unix:uid:"+itoa(os.Getuid()))) ||
		!strings.Contains(strings.Join(got.Strings(), " "), "unix:sha256:") {
		t.Errorf("selectors %v", got.Strings())
	}
	if _, ok := peersock.FromContext(context.Background()); ok {
		t.Error("a peer out of nowhere")
	}
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	creds := peersock.Credentials().Clone()
	a, b := net.Pipe()
	defer b.Close()
	if _, _, err := creds.ServerHandshake(a); err == nil {
		t.Error("a stranger's connection was accepted")
	}
	if _, err := b.Read(make([]byte, 1)); err == nil {
		t.Error("a stranger's connection was left open")
	}
	if _, _, err := creds.ClientHandshake(context.Background(), "", b); err == nil {
		t.Error("client handshake succeeded")
	}
	if creds.Info().SecurityProtocol == "" {
		t.Error("no protocol")
	}
}

// The caller executes another program after it was bound: the connection stays
// with the process, and its selectors with what was executed when it connected.
func TestExecSwap(t *testing.T) {
	t.Parallel()
	_, bind := attesting(t, attest.Config{Mode: attest.ModeUnix, Unix: attest.UnixConfig{DiscoverPath: true}})
	s := serve(t, peersock.Config{Bind: bind})
	c := startChild(t, "exec "+s.path)
	conn := s.next(t)
	subject, err := conn.Peer().Subject()
	if err != nil {
		t.Fatal(err)
	}
	exe, _ := os.Executable()
	before := subject.Selectors()
	if !before.Contains(attest.MustSelector("unix:path:" + exe)) {
		t.Errorf("selectors %v", before.Strings())
	}
	_, _ = c.in.Write([]byte("x"))
	eventually(t, "the caller executes another program", func() bool {
		now, err := os.Readlink("/proc/" + itoa(c.Process.Pid) + "/exe")
		return err == nil && now != exe
	})
	wantOpen(t, conn)
	again, err := conn.Peer().Subject()
	if err != nil || again != subject || !again.Selectors().Equal(before) {
		t.Errorf("after exec: %v, %v", again, err)
	}
	c.end()
	wantClosed(t, conn)
}

// A caller that executes another program between its binding and the hash of
// what it was is refused.
func TestExecSwapWhileBound(t *testing.T) {
	t.Parallel()
	a, _ := attesting(t, attest.Config{Mode: attest.ModeUnix, Unix: attest.UnixConfig{DiscoverPath: true}})
	var c *child
	exe, _ := os.Executable()
	started := make(chan struct{})
	s := serve(t, peersock.Config{Bind: func(ctx context.Context, caller attest.Caller) (attest.Subject, error) {
		b, err := a.Bind(ctx, caller)
		if err != nil {
			return nil, err
		}
		<-started
		_, _ = c.in.Write([]byte("x"))
		eventually(t, "the caller executes another program", func() bool {
			now, err := os.Readlink("/proc/" + itoa(c.Process.Pid) + "/exe")
			return err == nil && now != exe
		})
		return b, nil
	}})
	c = startChild(t, "exec "+s.path)
	close(started)
	if subject, err := s.next(t).Peer().Subject(); !errors.Is(err, attest.ErrDenied) {
		t.Errorf("Subject = %v, %v; want ErrDenied", subject, err)
	}
}

// BenchmarkAccept is a connection from connect to close, both ends included.
func BenchmarkAccept(b *testing.B) {
	for _, mode := range []attest.Mode{attest.ModeUnix, attest.ModeBoth} {
		b.Run(string(mode), func(b *testing.B) {
			_, bind := attesting(b, attest.Config{Mode: mode})
			s := serve(b, peersock.Config{Bind: bind})
			b.ReportAllocs()
			for b.Loop() {
				c, err := net.Dial("unix", s.path)
				if err != nil {
					b.Fatal(err)
				}
				conn := <-s.conns
				conn.Close()
				c.Close()
			}
		})
	}
}

// BenchmarkMemory is the heap of one bound connection without gRPC.
func BenchmarkMemory(b *testing.B) {
	_, bind := attesting(b, attest.Config{Mode: attest.ModeBoth})
	s := serve(b, peersock.Config{Bind: bind})
	const n = 500
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		clients, conns := make([]net.Conn, n), make([]net.Conn, n)
		for i := range clients {
			c, err := net.Dial("unix", s.path)
			if err != nil {
				b.Fatal(err)
			}
			conn := <-s.conns
			subject, err := conn.Peer().Subject()
			if err != nil {
				b.Fatal(err)
			}
			subject.Selectors()
			clients[i], conns[i] = c, conn
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/conn")
		for i := range clients {
			conns[i].Close()
			clients[i].Close()
		}
	}
}
