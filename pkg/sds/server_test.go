package sds_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/google/go-cmp/cmp"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// envoy is a client with one SotW stream.
type envoy struct {
	tb     testing.TB
	stream secretv3.SecretDiscoveryService_StreamSecretsClient
}

func openStream(tb testing.TB, conn *grpc.ClientConn) *envoy {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	tb.Cleanup(cancel)
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		tb.Fatal(err)
	}
	return &envoy{tb: tb, stream: stream}
}

func (e *envoy) send(q *discoveryv3.DiscoveryRequest) {
	e.tb.Helper()
	if err := e.stream.Send(q); err != nil {
		e.tb.Fatal(err)
	}
}

func (e *envoy) recv() *discoveryv3.DiscoveryResponse {
	e.tb.Helper()
	r, err := e.stream.Recv()
	if err != nil {
		e.tb.Fatal(err)
	}
	return r
}

func (e *envoy) ack(r *discoveryv3.DiscoveryResponse, names ...string) {
	e.tb.Helper()
	e.send(nonce(ask(names...), r.GetNonce(), r.GetVersionInfo()))
}

// ends waits for the stream's end and returns its status.
func (e *envoy) ends() *status.Status {
	e.tb.Helper()
	for {
		if _, err := e.stream.Recv(); err != nil {
			return status.Convert(err)
		}
	}
}

// everyServer runs a test on a server as the agent builds it, and on one whose
// interceptors hide the transport.
func everyServer(t *testing.T, f func(t *testing.T, opts []grpc.ServerOption)) {
	t.Helper()
	t.Run("tuned", func(t *testing.T) { f(t, tuned()) })
	t.Run("intercepted", func(t *testing.T) {
		hide := func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			return h(srv, hidden{ss, grpc.NewContextWithServerTransportStream(ss.Context(), nil)})
		}
		pass := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			return h(ctx, req)
		}
		f(t, append(tuned(), grpc.StreamInterceptor(hide), grpc.UnaryInterceptor(pass)))
	})
}

type hidden struct {
	grpc.ServerStream
	ctx context.Context
}

func (h hidden) Context() context.Context { return h.ctx }

func TestStreamSecrets(t *testing.T) {
	everyServer(t, func(t *testing.T, opts []grpc.ServerOption) {
		t.Helper()
		w := newWorld(t)
		l := newLayer(w.has())
		srv, conn := serve(t, l, func(c *sds.Config) { c.PeerID = func(context.Context) uint64 { return 7 } }, opts...)
		e := openStream(t, conn)
		first := ask("default", "ROOTCA", "file-root:system")
		first.Node = &corev3.Node{Id: "sidecar~10.0.0.1~web.ns~ns.svc.cluster.local", Metadata: &structpb.Struct{}}
		e.send(first)
		r := e.recv()
		if got := secretNames(t, r); got != "ROOTCA" {
			t.Fatalf("first response has %q", got)
		}
		e.ack(r, "default", "ROOTCA", "file-root:system")
		eventually(t, "parked and acknowledged", func() bool {
			st := srv.Streams()
			return len(st) == 1 && ids(st[0].Late...) == "default" && !st[0].LateSince.IsZero() && st[0].AckedNonce == "1" && st[0].Peer == 7 &&
				ids(st[0].Unknown...) == "file-root:system"
		})
		if _, parked := l.counts(); parked != 1 {
			t.Errorf("parked %d times", parked)
		}

		l.set(w.has(w.web)) // the entry appears
		r = e.recv()
		if got := secretNames(t, r); got != "default ROOTCA" {
			t.Fatalf("second response has %q", got)
		}
		var s tlsv3.Secret
		if err := r.GetResources()[0].UnmarshalTo(&s); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tlsSecret("default", w.web.SVID).String(), s.String()); diff != "" {
			t.Errorf("secret (-want +got):\n%s", diff)
		}
		eventually(t, "unparked", func() bool { _, parked := l.counts(); return parked == 0 })

		l.set(w.has(w.web))  // nothing new
		l.set(w.has(w.web2)) // renewed
		r = e.recv()
		if r.GetNonce() != "3" {
			t.Errorf("nonce %q after the renewal: unchanged content was sent", r.GetNonce())
		}
		q := nonce(ask("default", "ROOTCA", "file-root:system"), r.GetNonce(), "")
		q.ErrorDetail = &rpcstatus.Status{Code: 3, Message: "bad key"}
		e.send(q)
		eventually(t, "rejection recorded", func() bool {
			st := srv.Streams()[0]
			return st.NackText == "bad key" && st.NackedNonce == "3" && st.Served[1].Serial == "" && st.Served[0].Name == "ROOTCA" &&
				st.Served[1].Name == "default" || st.NackText == "bad key" && len(st.Served) == 2
		})
		for _, s := range srv.Streams()[0].Served {
			if s.Name == "default" && s.Serial != w.web2.SVID.Serial {
				t.Errorf("status names serial %s", s.Serial)
			}
		}

		l.set(w.has()) // withdrawn
		if st := e.ends(); st.Code() != codes.PermissionDenied {
			t.Errorf("ended with %v", st)
		}
		eventually(t, "nothing left", func() bool { subs, parked := l.counts(); return subs == 0 && parked == 0 && len(srv.Streams()) == 0 })

		e = openStream(t, conn) // who comes back is late
		e.send(ask("default"))
		eventually(t, "parked again", func() bool { _, parked := l.counts(); return parked == 1 })
		l.set(w.has(w.web))
		if got := secretNames(t, e.recv()); got != "default" {
			t.Errorf("sent %q", got)
		}
	})
}

func TestDeltaSecrets(t *testing.T) {
	everyServer(t, func(t *testing.T, opts []grpc.ServerOption) {
		t.Helper()
		w := newWorld(t)
		l := newLayer(w.has(w.web))
		srv, conn := serve(t, l, nil, opts...)
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).DeltaSecrets(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(sub("default", "ROOTCA")); err != nil {
			t.Fatal(err)
		}
		recv := func() *discoveryv3.DeltaDiscoveryResponse {
			t.Helper()
			r, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		r := recv()
		if got := deltaNames(r); got != "default ROOTCA" {
			t.Errorf("sent %q", got)
		}
		if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: r.GetNonce()}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "acknowledged", func() bool { return srv.Streams()[0].AckedNonce == "1" })
		l.set(w.has(w.web2))
		if got := deltaNames(recv()); got != "default" {
			t.Errorf("renewal sent %q", got)
		}
		l.set(w.has())
		if got := recv().GetRemovedResources(); ids(got...) != "default" {
			t.Errorf("removed %q", got)
		}
		if st := srv.Streams(); len(st) != 1 || st[0].Kind != "delta" || ids(st[0].Late...) != "default" {
			t.Errorf("status %+v", st)
		}
	})
}

func TestFetchSecrets(t *testing.T) {
	everyServer(t, func(t *testing.T, opts []grpc.ServerOption) {
		t.Helper()
		w := newWorld(t)
		l := newLayer(w.has())
		_, conn := serve(t, l, func(c *sds.Config) { c.FetchWait = 20 * time.Millisecond }, opts...)
		client := secretv3.NewSecretDiscoveryServiceClient(conn)
		fetch := func(names ...string) (string, error) {
			r, err := client.FetchSecrets(t.Context(), ask(names...))
			if err != nil {
				return "", err
			}
			if r.GetVersionInfo() == "" {
				t.Error("no version")
			}
			return secretNames(t, r), nil
		}
		if _, err := fetch("default"); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "late") {
			t.Errorf("late: %v", err)
		}
		if got, err := fetch("default", "ROOTCA"); err != nil || got != "ROOTCA" {
			t.Errorf("partly late: %q, %v", got, err)
		}
		if _, err := fetch("file-root:system"); status.Code(err) != codes.NotFound {
			t.Errorf("unknown: %v", err)
		}
		l.set(&svid.Update{})
		if _, err := fetch("default"); status.Code(err) != codes.Unavailable {
			t.Errorf("not synced: %v", err)
		}
		l.set(w.has(w.web))
		if got, err := fetch("default", "ROOTCA"); err != nil || got != "default ROOTCA" {
			t.Errorf("known: %q, %v", got, err)
		}
		if subs, parked := l.counts(); subs+parked != 0 {
			t.Errorf("%d subscriptions and %d parked left", subs, parked)
		}
	})
}

// A fetch that comes early is answered when the identity exists, and never
// held past 80 % of its deadline.
func TestFetchWaits(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has())
	_, conn := serve(t, l, func(c *sds.Config) { c.FetchWait = time.Minute })
	client := secretv3.NewSecretDiscoveryServiceClient(conn)
	go func() {
		for {
			if _, parked := l.counts(); parked == 1 {
				l.set(w.has(w.web))
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	r, err := client.FetchSecrets(t.Context(), ask("default"))
	if err != nil || secretNames(t, r) != "default" {
		t.Fatalf("%v, %v", r, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := client.FetchSecrets(ctx, ask("spiffe://example.org/none")); status.Code(err) != codes.PermissionDenied {
		t.Errorf("short deadline: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	long := strings.Repeat("x", 5000)
	many := make([]string, sds.MaxNames+1)
	for i := range many {
		many[i] = fmt.Sprint("n", i)
	}
	tests := []struct {
		name string
		q    *discoveryv3.DiscoveryRequest
		set  func(*layer)
		want codes.Code
		text string
	}{
		{"wrong type", &discoveryv3.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"}, nil, codes.InvalidArgument, "type_url"},
		{"too many names", ask(many...), nil, codes.ResourceExhausted, "over limit"},
		{"too many bytes", ask(slices.Repeat([]string{long[:1000]}, 300)...), nil, codes.ResourceExhausted, "over limit"},
		{"long name", ask(long), nil, codes.InvalidArgument, "longer than"},
		{"denied", ask("default"), func(l *layer) { l.refuse = fmt.Errorf("cgroup lies: %w", attest.ErrDenied) }, codes.PermissionDenied, "denied"},
		{"over limit", ask("default"), func(l *layer) { l.full = svid.ErrOverLimit }, codes.ResourceExhausted, "over limit"},
		{"over limit at once", ask("default"), func(l *layer) { l.refuse = svid.ErrOverLimit }, codes.ResourceExhausted, "over limit"},
		{"passing", ask("default"), func(l *layer) { l.refuse = errors.New("secret inner detail") }, codes.Unavailable, "try again"},
		{"inner status stays inside", ask("default"), func(l *layer) { l.refuse = status.Error(codes.DataLoss, "secret inner detail") }, codes.Unavailable, "try again"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			l := newLayer(w.has())
			if tt.set != nil {
				tt.set(l)
			}
			var logged bytes.Buffer
			_, conn := serve(t, l, func(c *sds.Config) { c.Logger = slog.New(slog.NewJSONHandler(&syncWriter{w: &logged}, nil)) })
			e := openStream(t, conn)
			_ = e.stream.Send(tt.q) // the refusal may be faster
			st := e.ends()
			if st.Code() != tt.want || !strings.Contains(st.Message(), tt.text) || strings.Contains(st.Message(), "inner detail") || strings.Contains(st.Message(), "cgroup") {
				t.Errorf("stream: %v", st)
			}
			_, err := secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(t.Context(), tt.q)
			if got := status.Convert(err); got.Code() != tt.want || strings.Contains(got.Message(), "inner detail") {
				t.Errorf("fetch: %v", got)
			}
			if subs, parked := l.counts(); subs+parked != 0 {
				t.Errorf("%d subscriptions and %d parked left", subs, parked)
			}
		})
	}
}

type syncWriter struct {
	mu sync.Mutex
	w  *bytes.Buffer
}

func (s *syncWriter) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(p)
}

func (s *syncWriter) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.String()
}

// A panic below ends the call it happened in.
func TestPanicsAreContained(t *testing.T) {
	everyServer(t, func(t *testing.T, opts []grpc.ServerOption) {
		t.Helper()
		w := newWorld(t)
		l := newLayer(w.has(w.web))
		_, conn := serve(t, l, nil, opts...)
		well, ill := openStream(t, conn), openStream(t, conn)
		well.send(ask("ROOTCA"))
		well.recv()
		broken := w.has(&svid.Identity{}) // no entry, no SVID: a bug below
		ill.send(ask("default"))
		ill.recv()
		l.mu.Lock()
		l.update = broken
		for s := range l.subs {
			s.notify()
		}
		l.mu.Unlock()
		if st := ill.ends(); st.Code() != codes.Unavailable {
			t.Errorf("pushed: %v", st)
		}
		again := openStream(t, conn)
		again.send(ask("default"))
		if st := again.ends(); st.Code() != codes.Unavailable {
			t.Errorf("asked: %v", st)
		}
		if _, err := secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(t.Context(), ask("default")); status.Code(err) != codes.Unavailable {
			t.Errorf("fetched: %v", err)
		}
		l.set(w.has(w.web))
		well.send(ask("default"))
		if got := secretNames(t, well.recv()); got != "default" {
			t.Errorf("the other stream got %q", got)
		}
	})
}

// Unknown names are logged once per stream, with their own word.
func TestUnknownNamesAreLoggedOnce(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has(w.web))
	logged := &syncWriter{w: new(bytes.Buffer)}
	_, conn := serve(t, l, func(c *sds.Config) { c.Logger = slog.New(slog.NewJSONHandler(logged, nil)) })
	e := openStream(t, conn)
	e.send(ask("file-root:system", "default"))
	r := e.recv()
	e.ack(r, "file-cert:a~b", "default")
	e.recv()
	if n := strings.Count(logged.String(), "unknown secret names ignored"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, logged)
	}
}

// A server without Codec says so on every call instead of hanging.
func TestWithoutCodec(t *testing.T) {
	w := newWorld(t)
	_, conn := serve(t, newLayer(w.has(w.web)), nil, grpc.MaxConcurrentStreams(10))
	e := openStream(t, conn)
	e.send(ask("default"))
	if st := e.ends(); st.Code() != codes.Internal {
		t.Errorf("stream: %v", st)
	}
	if _, err := fetchOnce(t, conn, "default"); status.Code(err) != codes.Internal {
		t.Errorf("fetch: %v", err)
	}
}

// A delta stream's names add up.
func TestDeltaNamesAddUp(t *testing.T) {
	_, conn := serve(t, newLayer(newWorld(t).has()), nil)
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		names := make([]string, 600)
		for j := range names {
			names[j] = fmt.Sprint(i, "-", j)
		}
		if err := stream.Send(sub(names...)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := stream.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
}

// Bytes that are no request end their own stream.
func TestGarbage(t *testing.T) {
	everyServer(t, func(t *testing.T, opts []grpc.ServerOption) {
		t.Helper()
		w := newWorld(t)
		srv, conn := serve(t, newLayer(w.has(w.web)), nil, opts...)
		well := openStream(t, conn)
		well.send(ask("default"))
		well.recv()
		for _, b := range [][]byte{{0x0a}, {0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f}, {0x1a, 0x01, 0xff}, bytes.Repeat([]byte{0x12, 0x02, 0x1a}, 1000)} {
			stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true},
				"/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets", grpc.ForceCodecV2(rawCodec{}))
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.SendMsg(b); err != nil {
				t.Fatal(err)
			}
			var got []byte
			if err := stream.RecvMsg(&got); status.Code(err) != codes.Internal {
				t.Errorf("%x: %v", b[:1], err)
			}
		}
		well.send(ask("ROOTCA"))
		well.recv()
		eventually(t, "one stream left", func() bool { return len(srv.Streams()) == 1 })
	})
}

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// One goroutine per idle stream, the handler's own.
func TestGoroutinesPerStream(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has(w.web))
	_, conn := serve(t, l, nil)
	for range 10 {
		e := openStream(t, conn)
		e.send(ask("default"))
		e.recv()
	}
	l.set(w.has(w.web2))
	eventually(t, "one goroutine per stream", func() bool {
		buf := make([]byte, 1<<20)
		ours := 0
		for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if strings.Contains(g, "pkg/sds.") {
				ours++
			}
		}
		return ours == 10
	})
}

// Encoded keys go with their SVIDs.
func TestCacheDiesWithTheSVID(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has(w.own.identity(t, "e1", "/one")))
	srv, conn := serve(t, l, nil)
	e := openStream(t, conn)
	e.send(ask("default", "ROOTCA"))
	e.recv()
	if svids, bundles := srv.Cached(); svids != 1 || bundles != 1 {
		t.Fatalf("cached %d SVIDs and %d bundles", svids, bundles)
	}
	l.set(w.has(w.own.identity(t, "e1", "/one")))
	e.recv()
	eventually(t, "old SVID forgotten", func() bool {
		runtime.GC()
		svids, bundles := srv.Cached()
		return svids == 1 && bundles == 1
	})
}

func fetchOnce(tb testing.TB, conn *grpc.ClientConn, names ...string) (*discoveryv3.DiscoveryResponse, error) {
	tb.Helper()
	return secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(tb.Context(), ask(names...))
}
