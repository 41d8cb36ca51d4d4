package sds_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
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
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{Organization: []string{"SPIFFE"}},
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
	return &ca{td: spiffeid.RequireTrustDomainFromString(td), cert: cert, key: key}
}

func (c *ca) bundle() *spiffebundle.Bundle {
	return spiffebundle.FromX509Authorities(c.td, []*x509.Certificate{c.cert})
}

func (c *ca) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})
}

// identity is a fresh SVID for an entry called id with the SPIFFE path.
func (c *ca) identity(tb testing.TB, id, path string) *svid.Identity {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	sid := spiffeid.RequireFromPath(c.td, path)
	uri, _ := url.Parse(sid.String())
	serial := big.NewInt(1000 + c.serial.Add(1))
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{uri}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
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
		Entry: entryOf(id, sid.String()),
		SVID: &svid.X509SVID{
			ID: sid, Certificates: []*x509.Certificate{cert}, ChainDER: [][]byte{der}, Key: key, KeyDER: keyDER,
			Serial: serial.String(), NotBefore: cert.NotBefore, NotAfter: cert.NotAfter,
		},
	}
}

func entryOf(id, spiffeID string) *entry.Entry {
	return &entry.Entry{ID: id, SPIFFEID: spiffeid.RequireFromString(spiffeID)}
}

func chainPEM(s *svid.X509SVID) []byte {
	var out []byte
	for _, der := range s.ChainDER {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

func keyPEM(s *svid.X509SVID) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: s.KeyDER})
}

// layer plays the svid layer: one picture for all callers.
type layer struct {
	mu     sync.Mutex
	update *svid.Update
	subs   map[*subscription]struct{}
	refuse error // of Subscribe and Snapshot
	full   error // of Park
	parked int
	looked func() // called by Update
}

func newLayer(u *svid.Update) *layer {
	return &layer{update: u, subs: make(map[*subscription]struct{})}
}

type subscription struct {
	layer  *layer
	notify func()
}

func (l *layer) subscribe(_ context.Context, notify func()) (sds.Subscription, error) {
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

// set publishes a picture to all subscribers.
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
	if s.layer.looked != nil {
		s.layer.looked()
	}
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

// tuned are the options the agent's server has.
func tuned() []grpc.ServerOption { return []grpc.ServerOption{grpc.ForceServerCodecV2(sds.Codec())} }

// serve runs an SDS server on a unix socket and connects to it.
func serve(tb testing.TB, l *layer, change func(*sds.Config), opts ...grpc.ServerOption) (*sds.Server, *grpc.ClientConn) {
	tb.Helper()
	config := sds.Config{Subscribe: l.subscribe, Snapshot: l.snapshot, Names: sds.DefaultNames()}
	if change != nil {
		change(&config)
	}
	srv, err := sds.New(config)
	if err != nil {
		tb.Fatal(err)
	}
	if opts == nil {
		opts = tuned()
	}
	gs := grpc.NewServer(opts...)
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
	return srv, conn
}

// eventually waits for something that happens on another goroutine.
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

func ids(names ...string) string { return strings.Join(names, " ") }
