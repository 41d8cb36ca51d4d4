package inspecttls_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/adminapi/inspectpb"
	"github.com/spiffe-node/spiffe-node/internal/inspecttls"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// reviewer knows tokens of the form user:audience and what each user may.
type reviewer struct {
	mu    sync.Mutex
	asked []string
	away  bool
	wait  chan struct{}
}

func (r *reviewer) note(format string, args ...any) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked = append(r.asked, fmt.Sprintf(format, args...))
	if r.away {
		return errors.New("connection refused")
	}
	return nil
}

func (r *reviewer) count(prefix string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.asked {
		if strings.HasPrefix(a, prefix) {
			n++
		}
	}
	return n
}

func (r *reviewer) Token(_ context.Context, token, audience string) (inspecttls.User, error) {
	if err := r.note("token %s", token); err != nil {
		return inspecttls.User{}, err
	}
	if r.wait != nil {
		<-r.wait
	}
	name, aud, _ := strings.Cut(token, ":")
	if aud != audience {
		return inspecttls.User{}, fmt.Errorf("%w", inspecttls.ErrUnknownToken)
	}
	return inspecttls.User{Name: name}, nil
}

func (r *reviewer) Access(_ context.Context, u inspecttls.User, a inspecttls.Access) (bool, error) {
	if err := r.note("access %s %s", u.Name, a); err != nil {
		return false, err
	}
	switch u.Name {
	case "admin":
		return a == inspecttls.Access{Verb: "get", Group: "spiffe-node.io", Resource: "nodes", Subresource: "inspect", Name: "n1"}, nil
	case "shopkeeper":
		return a == inspecttls.Access{Verb: "get", Group: "spiffe-node.io", Resource: "pods", Subresource: "inspect", Namespace: "shop", Name: "web"}, nil
	}
	return false, nil
}

type source struct{}

func (source) Status(context.Context) (*adminapi.Status, error) {
	return &adminapi.Status{TrustDomain: "td"}, nil
}

func (source) Connections(context.Context) ([]adminapi.Connection, error) { panic("the secret") }

func (source) Explain(context.Context, adminapi.Target) ([]adminapi.Explanation, error) {
	return []adminapi.Explanation{{Verdict: "late", Nearest: []adminapi.Near{{EntryID: "others", Selectors: attest.MustSelectors("a:b")}}}}, nil
}

// pki is a certificate of an agent and who trusts it.
func pki(t *testing.T) (*tls.Config, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := &url.URL{Scheme: "spiffe", Host: "td", Path: "/spire/agent/n1"}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "agent"}, URIs: []*url.URL{id}, DNSNames: []string{"agent"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12}, pool
}

type endpoint struct {
	addr  string
	pool  *x509.CertPool
	log   *syncBuffer
	conns []*grpc.ClientConn
}

func serve(t *testing.T, r inspecttls.Reviewer, keep time.Duration) *endpoint {
	t.Helper()
	config, pool := pki(t)
	log := &syncBuffer{}
	s, err := inspecttls.New(t.Context(), inspecttls.Config{
		Address: "127.0.0.1:0", TLS: config, Source: source{}, Reviewer: r, Node: "n1", Keep: keep,
		Logger: slog.New(slog.NewJSONHandler(log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	e := &endpoint{addr: s.Addr().String(), pool: pool, log: log}
	t.Cleanup(func() {
		for _, c := range e.conns {
			_ = c.Close()
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return e
}

func (e *endpoint) dial(t *testing.T, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(e.addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	e.conns = append(e.conns, conn)
	return conn
}

func (e *endpoint) client(t *testing.T) inspectpb.InspectClient {
	t.Helper()
	return inspectpb.NewInspectClient(e.dial(t, credentials.NewTLS(&tls.Config{RootCAs: e.pool, ServerName: "agent", MinVersion: tls.VersionTLS13})))
}

func with(t *testing.T, token string) context.Context {
	t.Helper()
	return metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token)
}

func podOf(namespace, name string) *inspectpb.ExplainRequest {
	return &inspectpb.ExplainRequest{Target: &inspectpb.ExplainRequest_Pod{Pod: &inspectpb.ExplainRequest_PodRef{Namespace: namespace, Name: name}}}
}

func TestWhoMayAskWhat(t *testing.T) {
	e := serve(t, &reviewer{}, 0)
	c := e.client(t)
	calls := map[string]func(context.Context) error{
		"status":    func(ctx context.Context) error { _, err := c.Status(ctx, &inspectpb.StatusRequest{}); return err },
		"own pod":   func(ctx context.Context) error { _, err := c.Explain(ctx, podOf("shop", "web")); return err },
		"other pod": func(ctx context.Context) error { _, err := c.Explain(ctx, podOf("bank", "web")); return err },
		"process": func(ctx context.Context) error {
			_, err := c.Explain(ctx, &inspectpb.ExplainRequest{Target: &inspectpb.ExplainRequest_Pid{Pid: 1}})
			return err
		},
		"no target": func(ctx context.Context) error { _, err := c.Explain(ctx, &inspectpb.ExplainRequest{}); return err },
	}
	for _, tc := range []struct {
		name string
		ctx  context.Context
		call string
		want codes.Code
	}{
		{"nobody", t.Context(), "status", codes.Unauthenticated},
		{"no scheme", metadata.AppendToOutgoingContext(t.Context(), "authorization", "admin:spiffe-node-inspect"), "status", codes.Unauthenticated},
		{"basic", metadata.AppendToOutgoingContext(t.Context(), "authorization", "Basic admin:spiffe-node-inspect"), "status", codes.Unauthenticated},
		{"two tokens", metadata.AppendToOutgoingContext(with(t, "admin:spiffe-node-inspect"), "authorization", "Bearer x"), "status", codes.Unauthenticated},
		{"empty token", with(t, ""), "status", codes.Unauthenticated},
		{"unknown", with(t, "who"), "status", codes.Unauthenticated},
		{"token for the API server", with(t, "admin:kubernetes"), "status", codes.Unauthenticated},
		{"no rights", with(t, "guest:spiffe-node-inspect"), "status", codes.PermissionDenied},
		{"admin", with(t, "admin:spiffe-node-inspect"), "status", codes.OK},
		{"admin", with(t, "admin:spiffe-node-inspect"), "process", codes.OK},
		{"admin", with(t, "admin:spiffe-node-inspect"), "other pod", codes.OK},
		{"admin", with(t, "admin:spiffe-node-inspect"), "no target", codes.InvalidArgument},
		{"shopkeeper", with(t, "shopkeeper:spiffe-node-inspect"), "own pod", codes.OK},
		{"shopkeeper", with(t, "shopkeeper:spiffe-node-inspect"), "other pod", codes.PermissionDenied},
		{"shopkeeper", with(t, "shopkeeper:spiffe-node-inspect"), "status", codes.PermissionDenied},
		{"shopkeeper", with(t, "shopkeeper:spiffe-node-inspect"), "process", codes.PermissionDenied},
		{"shopkeeper", with(t, "shopkeeper:spiffe-node-inspect"), "no target", codes.PermissionDenied},
	} {
		t.Run(tc.name+" "+tc.call, func(t *testing.T) {
			if err := calls[tc.call](tc.ctx); status.Code(err) != tc.want {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
	if log := e.log.String(); !strings.Contains(log, `"audit":true,"method":"spiffe.node.inspect.v1.Inspect/Explain","user":"shopkeeper","code":"PermissionDenied"`) {
		t.Errorf("no record of a refused call in\n%s", log)
	} else if strings.Contains(log, ":spiffe-node-inspect") {
		t.Errorf("a token in the log:\n%s", log)
	}
}

// Who may ask about a pod is not told of the entries of others.
func TestNearestEntriesAreForAdministrators(t *testing.T) {
	c := serve(t, &reviewer{}, 0).client(t)
	for token, want := range map[string]int{"admin": 1, "shopkeeper": 0} {
		resp, err := c.Explain(with(t, token+":spiffe-node-inspect"), podOf("shop", "web"))
		if err != nil || len(resp.GetExplanations()) != 1 || len(resp.GetExplanations()[0].GetNearest()) != want {
			t.Errorf("%s: %v, %v", token, resp, err)
		}
	}
}

func TestOnlyInspectOverTLS(t *testing.T) {
	e := serve(t, &reviewer{}, 0)
	ctx := with(t, "admin:spiffe-node-inspect")
	conn := e.dial(t, credentials.NewTLS(&tls.Config{RootCAs: e.pool, ServerName: "agent", MinVersion: tls.VersionTLS13}))
	if _, err := entrypb.NewEntryClient(conn).ListEntries(ctx, &entrypb.ListEntriesRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("entries: %v", err)
	}
	if _, err := inspectpb.NewInspectClient(e.dial(t, insecure.NewCredentials())).Status(ctx, &inspectpb.StatusRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("in the clear: %v", err)
	}
	old := credentials.NewTLS(&tls.Config{RootCAs: e.pool, ServerName: "agent", MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12})
	if _, err := inspectpb.NewInspectClient(e.dial(t, old)).Status(ctx, &inspectpb.StatusRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("TLS 1.2: %v", err)
	}
}

func TestPanicStaysInItsCall(t *testing.T) {
	e := serve(t, &reviewer{}, 0)
	c := e.client(t)
	ctx := with(t, "admin:spiffe-node-inspect")
	if _, err := c.ListConnections(ctx, &inspectpb.ListConnectionsRequest{}); status.Code(err) != codes.Internal || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
	if _, err := c.Status(ctx, &inspectpb.StatusRequest{}); err != nil {
		t.Error(err)
	}
}

func TestReviewsAreKeptForAWhile(t *testing.T) {
	r := &reviewer{}
	c := serve(t, r, 300*time.Millisecond).client(t)
	ctx := with(t, "admin:spiffe-node-inspect")
	call := func() {
		t.Helper()
		if _, err := c.Status(ctx, &inspectpb.StatusRequest{}); err != nil {
			t.Error(err)
		}
	}
	for range 5 {
		call()
	}
	if n, m := r.count("token"), r.count("access"); n != 1 || m != 1 {
		t.Errorf("%d token and %d access reviews for five calls", n, m)
	}
	for range 3 { // a token that is nobody's is kept as well
		_, _ = c.Status(with(t, "who"), &inspectpb.StatusRequest{})
	}
	if n := r.count("token who"); n != 1 {
		t.Errorf("%d reviews of a bad token", n)
	}
	for deadline := time.Now().Add(10 * time.Second); r.count("token admin") < 2 && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		call()
	}
	if r.count("token admin") < 2 {
		t.Error("a review is kept for ever")
	}
}

// With the API server away nobody is let in, and what it could not say is
// asked again.
func TestAPIServerAway(t *testing.T) {
	r := &reviewer{away: true}
	c := serve(t, r, time.Hour).client(t)
	ctx := with(t, "admin:spiffe-node-inspect")
	if _, err := c.Status(ctx, &inspectpb.StatusRequest{}); status.Code(err) != codes.Unavailable || strings.Contains(err.Error(), "refused") {
		t.Errorf("got %v", err)
	}
	r.mu.Lock()
	r.away = false
	r.mu.Unlock()
	if _, err := c.Status(ctx, &inspectpb.StatusRequest{}); err != nil {
		t.Errorf("back again: %v", err)
	}
}

func TestReviewsAndCallsAreLimited(t *testing.T) {
	r := &reviewer{}
	c := serve(t, r, time.Hour).client(t)
	limited := 0
	for i := range 60 {
		_, err := c.Status(with(t, fmt.Sprintf("made-up-%d", i)), &inspectpb.StatusRequest{})
		if status.Code(err) == codes.ResourceExhausted {
			limited++
		}
	}
	if limited == 0 || r.count("token") > 40 {
		t.Errorf("%d reviews for 60 made-up tokens, %d refused before one", r.count("token"), limited)
	}
	c = serve(t, &reviewer{}, time.Hour).client(t)
	limited = 0
	for range 100 {
		if _, err := c.Status(with(t, "admin:spiffe-node-inspect"), &inspectpb.StatusRequest{}); status.Code(err) == codes.ResourceExhausted {
			limited++
		}
	}
	if limited == 0 {
		t.Error("100 calls at once are not limited")
	}
}

// Callers with the same token wait for one review.
func TestSameTokenIsAskedForOnce(t *testing.T) {
	r := &reviewer{wait: make(chan struct{})}
	c := serve(t, r, time.Hour).client(t)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if _, err := c.Status(with(t, "admin:spiffe-node-inspect"), &inspectpb.StatusRequest{}); err != nil {
				t.Error(err)
			}
		})
	}
	for r.count("token") == 0 {
		time.Sleep(time.Millisecond)
	}
	close(r.wait)
	wg.Wait()
	if n := r.count("token"); n != 1 {
		t.Errorf("%d reviews", n)
	}
}

func TestConfig(t *testing.T) {
	config, _ := pki(t)
	good := inspecttls.Config{Address: "127.0.0.1:0", TLS: config, Source: source{}, Reviewer: &reviewer{}, Node: "n1"}
	for name, spoil := range map[string]func(*inspecttls.Config){
		"no TLS":      func(c *inspecttls.Config) { c.TLS = nil },
		"no source":   func(c *inspecttls.Config) { c.Source = nil },
		"no reviewer": func(c *inspecttls.Config) { c.Reviewer = nil },
		"no node":     func(c *inspecttls.Config) { c.Node = "" },
		"bad address": func(c *inspecttls.Config) { c.Address = "nowhere" },
	} {
		c := good
		spoil(&c)
		if s, err := inspecttls.New(t.Context(), c); err == nil {
			_ = s.Close()
			t.Errorf("%s is taken", name)
		}
	}
	s, err := inspecttls.New(t.Context(), good)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// No message of the service has a place for a key: keys are bytes, and nothing
// here is.
func TestNoPlaceForKeys(t *testing.T) {
	seen := map[protoreflect.FullName]bool{}
	var walk func(protoreflect.MessageDescriptor)
	walk = func(m protoreflect.MessageDescriptor) {
		if seen[m.FullName()] {
			return
		}
		seen[m.FullName()] = true
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			if name := string(f.Name()); f.Kind() == protoreflect.BytesKind || strings.Contains(name, "private") || strings.Contains(name, "token") {
				t.Errorf("%s could hold a secret", f.FullName())
			}
			if f.Kind() == protoreflect.MessageKind {
				walk(f.Message())
			}
		}
	}
	methods := inspectpb.File_internal_adminapi_inspectpb_inspect_proto.Services().Get(0).Methods()
	for i := range methods.Len() {
		walk(methods.Get(i).Output())
	}
	if len(seen) < 5 {
		t.Errorf("only %v looked at", seen)
	}
}

type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
