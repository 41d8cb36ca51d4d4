package authoritytest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// timeout bounds every wait in the suite: an implementation that is slower than
// this has lost a wake-up.
const timeout = 30 * time.Second

// Harness is an implementation under test with the controls the contract
// cannot reach through authority.Authority.
type Harness struct {
	Authority   authority.Authority
	TrustDomain spiffeid.TrustDomain
	// Agent is the parent of the entries that the authority signs for.
	Agent spiffeid.ID
	// Register makes an entry known to the authority and returns it as stored.
	Register func(tb testing.TB, e *entry.Entry) *entry.Entry
	// Unregister removes it again.
	Unregister func(tb testing.TB, e *entry.Entry)
	// ChangeBundle changes the content of the own bundle, for example by
	// preparing a new CA; nil = cannot be done, and what needs it is skipped.
	ChangeBundle func(tb testing.TB)
	// Stop makes the authority answer ErrNotReady or ErrTryLater, for example
	// by closing it; nil = cannot be done.
	Stop func(tb testing.TB)
}

// suite is one test of the contract.
type suite struct {
	*testing.T
	Harness
}

// Run runs the suite. newHarness makes a fresh implementation for each test.
func Run(t *testing.T, newHarness func(t *testing.T) Harness) {
	t.Helper()
	for name, test := range map[string]func(suite){
		"X509Verifies":         suite.x509Verifies,
		"X509Profile":          suite.x509Profile,
		"X509IgnoresCSR":       suite.x509IgnoresCSR,
		"X509EntryTTL":         suite.x509EntryTTL,
		"X509Refused":          suite.x509Refused,
		"JWTVerifies":          suite.jwtVerifies,
		"JWTOptions":           suite.jwtOptions,
		"JWTRefused":           suite.jwtRefused,
		"BundlesFirst":         suite.bundlesFirst,
		"BundlesWait":          suite.bundlesWait,
		"BundlesStable":        suite.bundlesStable,
		"BundlesCancelled":     suite.bundlesCancelled,
		"Cancelled":            suite.cancelled,
		"SentinelsAreDistinct": suite.sentinels,
		"Concurrent":           suite.concurrent,
		"Stopped":              suite.stopped,
	} {
		t.Run(name, func(t *testing.T) { test(suite{t, newHarness(t)}) })
	}
}

func (h Harness) id(path string) spiffeid.ID { return spiffeid.RequireFromPath(h.TrustDomain, path) }

// register makes an entry of the agent's; edit may be nil.
func (h Harness) register(tb testing.TB, path string, edit func(*entry.Entry)) *entry.Entry {
	tb.Helper()
	e := &entry.Entry{
		SPIFFEID: h.id(path), ParentID: h.Agent,
		Selectors: attest.MustSelectors("unix:uid:0", "unix:path:"+path),
	}
	if edit != nil {
		edit(e)
	}
	return h.Register(tb, e)
}

func x509Request(e *entry.Entry, csr []byte) authority.X509Request {
	return authority.X509Request{EntryID: e.ID, SPIFFEID: e.SPIFFEID, CSR: csr, DNSNames: e.DNSNames, TTL: e.X509SVIDTTL}
}

func jwtRequest(e *entry.Entry, audience ...string) authority.JWTRequest {
	return authority.JWTRequest{
		EntryID: e.ID, SPIFFEID: e.SPIFFEID, Audience: audience, TTL: e.JWTSVIDTTL, IncludeJTI: e.JWTSVIDIncludeJTI,
	}
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func newCSR(tb testing.TB, key crypto.Signer, template x509.CertificateRequest) []byte {
	tb.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

func parseChain(tb testing.TB, chain [][]byte) []*x509.Certificate {
	tb.Helper()
	if len(chain) == 0 {
		tb.Fatal("empty chain")
	}
	out := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		var err error
		if out[i], err = x509.ParseCertificate(der); err != nil {
			tb.Fatalf("certificate %d: %v", i, err)
		}
	}
	return out
}

func bundles(tb testing.TB, h Harness) *authority.BundleSet {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	set, err := h.Authority.Bundles(ctx, 0)
	if err != nil {
		tb.Fatal(err)
	}
	return set
}
