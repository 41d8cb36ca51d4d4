package workloadapi_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spiffeapi "github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
	"github.com/spiffe-node/spiffe-node/pkg/workloadapi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ca is a trust domain's authority.
type ca struct {
	td     spiffeid.TrustDomain
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial atomic.Int64
}

func newCA(tb testing.TB, td string) *ca {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	name := spiffeid.RequireTrustDomainFromString(td)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{Organization: []string{"SPIFFE"}}, URIs: []*url.URL{name.ID().URL()},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return &ca{td: name, cert: cert, key: key}
}

// bundle has the CA's key for tokens as well.
func (c *ca) bundle() *spiffebundle.Bundle {
	b := spiffebundle.FromX509Authorities(c.td, []*x509.Certificate{c.cert})
	b.SetJWTAuthorities(map[string]crypto.PublicKey{"key-" + c.td.Name(): c.key.Public()})
	return b
}

func (c *ca) identity(tb testing.TB, id, path, hint string, age time.Duration) *svid.Identity {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	sid := spiffeid.RequireFromPath(c.td, path)
	serial := big.NewInt(1000 + c.serial.Add(1))
	tmpl := &x509.Certificate{
		SerialNumber: serial, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{sid.URL()}, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.cert, key.Public(), c.key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatal(err)
	}
	return &svid.Identity{
		Entry: &entry.Entry{ID: id, SPIFFEID: sid, Hint: hint, CreatedAt: time.Now().Add(-age)},
		SVID: &svid.X509SVID{
			ID: sid, Certificates: []*x509.Certificate{cert}, ChainDER: [][]byte{der}, Key: key, KeyDER: keyDER,
			Serial: serial.String(), NotBefore: cert.NotBefore, NotAfter: cert.NotAfter,
		},
	}
}

// token signs claims with the CA's key.
func (c *ca) token(tb testing.TB, claims any) string {
	tb.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: c.key, KeyID: "key-" + c.td.Name()}}, nil)
	if err != nil {
		tb.Fatal(err)
	}
	s, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// layer plays the svid layer: one picture for all callers.
type layer struct {
	mu     sync.Mutex
	update *svid.Update
	subs   map[*subscription]struct{}
	refuse error // of Subscribe
	full   error // of Park
	parked int
	jwt    func(e *entry.Entry, audience []string) (string, error)
}

func newLayer(u *svid.Update) *layer {
	return &layer{update: u, subs: make(map[*subscription]struct{})}
}

type subscription struct {
	layer  *layer
	notify func()
}

func (l *layer) subscribe(_ context.Context, notify func()) (workloadapi.Subscription, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refuse != nil {
		return nil, l.refuse
	}
	s := &subscription{layer: l, notify: notify}
	l.subs[s] = struct{}{}
	return s, nil
}

func (l *layer) snapshot(context.Context) (*svid.Update, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.update, l.refuse
}

func (l *layer) issue(_ context.Context, e *entry.Entry, audience []string) (string, error) {
	if l.jwt == nil {
		return "", errors.New("no keys")
	}
	return l.jwt(e, audience)
}

func (l *layer) set(u *svid.Update) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.update = u
	for s := range l.subs {
		s.notify()
	}
}

func (l *layer) counts() (subs, parked int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.subs), l.parked
}

func (s *subscription) Update() *svid.Update {
	s.layer.mu.Lock()
	defer s.layer.mu.Unlock()
	return s.layer.update
}

func (s *subscription) Park(string) error {
	s.layer.mu.Lock()
	defer s.layer.mu.Unlock()
	if s.layer.full != nil {
		return s.layer.full
	}
	s.layer.parked++
	return nil
}

func (s *subscription) Unpark() {
	s.layer.mu.Lock()
	defer s.layer.mu.Unlock()
	s.layer.parked--
}

func (s *subscription) Close() {
	s.layer.mu.Lock()
	defer s.layer.mu.Unlock()
	delete(s.layer.subs, s)
}

// node is a Workload API on a unix socket.
type node struct {
	server *workloadapi.Server
	addr   string
	raw    workload.SpiffeWorkloadAPIClient
}

func serve(tb testing.TB, l *layer, change func(*workloadapi.Config)) *node {
	tb.Helper()
	config := workloadapi.Config{Subscribe: l.subscribe, Snapshot: l.snapshot, JWT: l.issue, FetchWait: 50 * time.Millisecond}
	if change != nil {
		change(&config)
	}
	srv, err := workloadapi.New(config)
	if err != nil {
		tb.Fatal(err)
	}
	gs := grpc.NewServer()
	srv.Register(gs)
	path := filepath.Join(tb.TempDir(), "s")
	lis, err := net.Listen("unix", path)
	if err != nil {
		tb.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- gs.Serve(lis) }()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		conn.Close()
		gs.Stop()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	})
	return &node{server: srv, addr: "unix://" + path, raw: workload.NewSpiffeWorkloadAPIClient(conn)}
}

func (n *node) client(tb testing.TB) *spiffeapi.Client {
	tb.Helper()
	c, err := spiffeapi.New(tb.Context(), spiffeapi.WithAddr(n.addr))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

// withHeader is a context with the security header.
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func eventually(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			tb.Fatalf("not within 5 s: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}
