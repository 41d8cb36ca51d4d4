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
	Register func(t testing.TB, e *entry.Entry) *entry.Entry
	// Unregister removes it again.
	Unregister func(t testing.TB, e *entry.Entry)
	// ChangeBundle changes the content of the own bundle, for example by
	// preparing a new CA; nil = cannot be done, and what needs it is skipped.
	ChangeBundle func(t testing.TB)
	// Stop makes the authority answer ErrNotReady or ErrTryLater, for example
	// by closing it; nil = cannot be done.
	Stop func(t testing.TB)
}

// Run runs the suite. newHarness makes a fresh implementation for each test.
func Run(t *testing.T, newHarness func(t *testing.T) Harness) {
	for name, test := range map[string]func(*testing.T, Harness){
		"X509Verifies":         x509Verifies,
		"X509Profile":          x509Profile,
		"X509IgnoresCSR":       x509IgnoresCSR,
		"X509EntryTTL":         x509EntryTTL,
		"X509Refused":          x509Refused,
		"JWTVerifies":          jwtVerifies,
		"JWTOptions":           jwtOptions,
		"JWTRefused":           jwtRefused,
		"BundlesFirst":         bundlesFirst,
		"BundlesWait":          bundlesWait,
		"BundlesStable":        bundlesStable,
		"BundlesCancelled":     bundlesCancelled,
		"Cancelled":            cancelled,
		"SentinelsAreDistinct": sentinels,
		"Concurrent":           concurrent,
		"Stopped":              stopped,
	} {
		t.Run(name, func(t *testing.T) { test(t, newHarness(t)) })
	}
}

func (h Harness) id(path string) spiffeid.ID { return spiffeid.RequireFromPath(h.TrustDomain, path) }

// register makes an entry of the agent's; edit may be nil.
func (h Harness) register(t testing.TB, path string, edit func(*entry.Entry)) *entry.Entry {
	t.Helper()
	e := &entry.Entry{
		SPIFFEID: h.id(path), ParentID: h.Agent,
		Selectors: attest.MustSelectors("unix:uid:0", "unix:path:"+path),
	}
	if edit != nil {
		edit(e)
	}
	return h.Register(t, e)
}

func x509Request(e *entry.Entry, csr []byte) authority.X509Request {
	return authority.X509Request{EntryID: e.ID, SPIFFEID: e.SPIFFEID, CSR: csr, DNSNames: e.DNSNames, TTL: e.X509SVIDTTL}
}

func jwtRequest(e *entry.Entry, audience ...string) authority.JWTRequest {
	return authority.JWTRequest{
		EntryID: e.ID, SPIFFEID: e.SPIFFEID, Audience: audience, TTL: e.JWTSVIDTTL, IncludeJTI: e.JWTSVIDIncludeJTI,
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCSR(t testing.TB, key crypto.Signer, template x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func parseChain(t testing.TB, chain [][]byte) []*x509.Certificate {
	t.Helper()
	if len(chain) == 0 {
		t.Fatal("empty chain")
	}
	out := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		var err error
		if out[i], err = x509.ParseCertificate(der); err != nil {
			t.Fatalf("certificate %d: %v", i, err)
		}
	}
	return out
}

func bundles(t testing.TB, h Harness) *authority.BundleSet {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	set, err := h.Authority.Bundles(ctx, 0)
	if err != nil {
		t.Fatal(err)
	}
	return set
}
