package svid_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.org")

// ca is one root.
type ca struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newCA() *ca {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	raw, err := key.PublicKey.Bytes()
	must(err)
	id := sha256.Sum256(raw)
	tmpl := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "root"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(10 * 365 * 24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SubjectKeyId:          id[:20],
		URIs:                  []*url.URL{td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	must(err)
	cert, err := x509.ParseCertificate(der)
	must(err)
	return &ca{key: key, cert: cert}
}

func (c *ca) id() string { return hex.EncodeToString(c.cert.SubjectKeyId) }

// fakeAuthority signs for real.
type fakeAuthority struct {
	ttl    time.Duration // of X.509-SVIDs whose entry names none
	jwtTTL time.Duration
	now    func() time.Time

	mu      sync.Mutex
	ca      *ca
	kid     string
	fail    func(entryID string) error // nil = never
	delay   time.Duration
	version uint64
	tainted map[string]bool
	jwtBad  map[string]bool
	feds    map[spiffeid.TrustDomain]*spiffebundle.Bundle
	own     *spiffebundle.Bundle
	silent  bool // Bundles does not answer
	changed chan struct{}
	serial  atomic.Int64
	asked   []string // entry IDs in order
	jwts    atomic.Int64
	running atomic.Int64
	most    atomic.Int64
}

func newAuthority() *fakeAuthority {
	a := &fakeAuthority{ttl: time.Hour, jwtTTL: 5 * time.Minute, now: time.Now, ca: newCA(), kid: "key-1", version: 1, changed: make(chan struct{})}
	a.own = spiffebundle.FromX509Authorities(td, []*x509.Certificate{a.ca.cert})
	return a
}

// change alters what Bundles answers.
func (a *fakeAuthority) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	a.version++
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *fakeAuthority) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

func (a *fakeAuthority) signs() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.asked)
}

func (a *fakeAuthority) Bundles(ctx context.Context, after uint64) (*authority.BundleSet, error) {
	for {
		a.mu.Lock()
		set := &authority.BundleSet{Version: a.version, Own: a.own, Federated: a.feds, TaintedX509: a.tainted, TaintedJWT: a.jwtBad}
		changed, silent := a.changed, a.silent
		a.mu.Unlock()
		if set.Version > after && !silent {
			return set, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (a *fakeAuthority) SignX509(ctx context.Context, req authority.X509Request) (*authority.X509Issued, error) {
	if n := a.running.Add(1); n > a.most.Load() {
		a.most.Store(n)
	}
	defer a.running.Add(-1)
	a.mu.Lock()
	a.asked = append(a.asked, req.EntryID)
	fail, delay, ca, clock := a.fail, a.delay, a.ca, a.now
	a.mu.Unlock()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if fail != nil {
		if err := fail(req.EntryID); err != nil {
			return nil, err
		}
	}
	csr, err := x509.ParseCertificateRequest(req.CSR)
	if err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, err
	}
	if got := csr.Subject.String(); got != "O=SPIRE,C=US" || len(csr.URIs) != 1 || csr.URIs[0].String() != req.SPIFFEID.String() {
		return nil, fmt.Errorf("CSR for %q %v", got, csr.URIs)
	}
	ttl := req.TTL
	if ttl == 0 {
		ttl = a.ttl
	}
	now := clock()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(a.serial.Add(1)),
		Subject:      pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}},
		NotBefore:    now.Add(-10 * time.Second),
		NotAfter:     now.Add(ttl),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:         []*url.URL{req.SPIFFEID.URL()},
		DNSNames:     req.DNSNames,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, csr.PublicKey, ca.key)
	if err != nil {
		return nil, err
	}
	return &authority.X509Issued{Chain: [][]byte{der}, NotBefore: tmpl.NotBefore, NotAfter: tmpl.NotAfter}, nil
}

func (a *fakeAuthority) SignJWT(ctx context.Context, req authority.JWTRequest) (*authority.JWTIssued, error) {
	a.jwts.Add(1)
	a.mu.Lock()
	fail, delay, ca, kid, clock := a.fail, a.delay, a.ca, a.kid, a.now
	a.mu.Unlock()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if fail != nil {
		if err := fail(req.EntryID); err != nil {
			return nil, err
		}
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: ca.key, KeyID: kid}}, nil)
	if err != nil {
		return nil, err
	}
	ttl := req.TTL
	if ttl == 0 {
		ttl = a.jwtTTL
	}
	now := clock()
	claims := jwt.Claims{Subject: req.SPIFFEID.String(), Audience: req.Audience, IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(ttl))}
	if req.IncludeJTI {
		claims.ID = rand.Text()
	}
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		return nil, err
	}
	return &authority.JWTIssued{Token: token, IssuedAt: now, ExpiresAt: now.Add(ttl)}, nil
}

// fakeEntries is a registry in memory.
type fakeEntries struct {
	mu      sync.Mutex
	set     *entry.Set
	silent  bool
	changed chan struct{}
}

func newEntries(entries ...*entry.Entry) *fakeEntries {
	return &fakeEntries{set: entry.NewSet(entries...), changed: make(chan struct{})}
}

func (f *fakeEntries) with(changed []*entry.Entry, removed ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.set = f.set.With(changed, removed)
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeEntries) put(e ...*entry.Entry) { f.with(e) }
func (f *fakeEntries) speak()                { f.mu.Lock(); f.silent = false; f.mu.Unlock(); f.with(nil) }

func (f *fakeEntries) Entries(ctx context.Context, after uint64) (*entry.Set, error) {
	for {
		f.mu.Lock()
		set, changed, silent := f.set, f.changed, f.silent
		f.mu.Unlock()
		if set.Version() > after && !silent {
			return set, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// caller is a subject whose selectors a test can change.
type caller struct {
	name string
	mu   sync.Mutex
	sel  attest.Selectors
	next int
	to   map[int]func()
}

func newCaller(name string, selectors ...string) *caller {
	return &caller{name: name, sel: attest.MustSelectors(selectors...), to: make(map[int]func())}
}

func (c *caller) Selectors() attest.Selectors {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sel
}

func (c *caller) become(selectors ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sel = attest.MustSelectors(selectors...)
	for _, f := range c.to {
		f()
	}
}

func (c *caller) Watch(notify func()) func() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.next++
	id := c.next
	c.to[id] = notify
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.to, id)
	}
}

func (c *caller) watchers() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.to)
}

func (c *caller) LimitKey() string { return "pod-" + c.name }

func (c *caller) LogAttrs() []slog.Attr { return []slog.Attr{slog.String("pod", c.name)} }

// workload is an entry with one selector, unix:user:<name>, and more if named.
func workload(name string, selectors ...string) *entry.Entry {
	return &entry.Entry{
		ID:        "entry-" + name,
		SPIFFEID:  spiffeid.RequireFromPath(td, "/"+name),
		ParentID:  spiffeid.RequireFromPath(td, "/node"),
		Selectors: attest.MustSelectors(append([]string{"unix:user:" + name}, selectors...)...),
		CreatedAt: time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC),
	}
}

func edited(e *entry.Entry, f func(*entry.Entry)) *entry.Entry {
	c := e.Clone()
	c.Revision++
	f(c)
	return c
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// world is a running manager and what is around it.
type world struct {
	t       testing.TB
	m       *svid.Manager
	ca      *fakeAuthority
	entries *fakeEntries
	stop    func()
}

// run starts a manager; edit changes its configuration first.
func run(tb testing.TB, ca *fakeAuthority, entries *fakeEntries, edit ...func(*svid.Config)) *world {
	tb.Helper()
	cfg := svid.Config{Authority: ca, Entries: entries}
	for _, f := range edit {
		f(&cfg)
	}
	m, err := svid.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	w := &world{t: tb, m: m, ca: ca, entries: entries}
	w.start()
	return w
}

func (w *world) start() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := w.m.Run(ctx); err != nil {
			w.t.Error(err)
		}
	}()
	w.stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	w.t.Cleanup(w.stop)
}

// stream is a subscription that counts what it is told.
type stream struct {
	*svid.Subscription
	told atomic.Int64
}

func (w *world) subscribe(c *caller) *stream {
	w.t.Helper()
	s := &stream{}
	sub, err := w.m.Subscribe(c, func() { s.told.Add(1) })
	if err != nil {
		w.t.Fatal(err)
	}
	s.Subscription = sub
	w.t.Cleanup(sub.Close)
	return s
}

// serial is the serial of the default identity, empty without one.
func serial(u *svid.Update) string {
	if len(u.Identities) == 0 {
		return ""
	}
	return u.Identities[0].SVID.Serial
}

// advance lets a bubble's time pass and everything settle.
func advance(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func newFederation(tds ...spiffeid.TrustDomain) map[spiffeid.TrustDomain]*spiffebundle.Bundle {
	out := make(map[spiffeid.TrustDomain]*spiffebundle.Bundle)
	for _, td := range tds {
		out[td] = spiffebundle.FromX509Authorities(td, []*x509.Certificate{newCA().cert})
	}
	return out
}

func isTmpfs(t *testing.T, dir string) bool {
	t.Helper()
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.TMPFS_MAGIC
}
