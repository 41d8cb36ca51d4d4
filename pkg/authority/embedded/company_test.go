package embedded_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// companyCA is a CA of a company.
type companyCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// newCompanyCA makes one below another; below nil it is a root. shape may
// change the certificate.
func newCompanyCA(tb testing.TB, name string, below *companyCA, life time.Duration, shape func(*x509.Certificate)) *companyCA {
	tb.Helper()
	c := &companyCA{key: newKey(tb)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
	if shape != nil {
		shape(template)
	}
	if below == nil {
		below = &companyCA{template, c.key}
	}
	c.cert = issueCert(tb, template, below, c.key.Public())
	return c
}

func issueCert(tb testing.TB, template *x509.Certificate, by *companyCA, pub crypto.PublicKey) *x509.Certificate {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, pub, by.key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}

// company is an upstream in memory.
type company struct {
	tb testing.TB

	mu     sync.Mutex
	issuer *companyCA
	chain  []*x509.Certificate // of the issuer, without root
	roots  []embedded.Root
	shape  func(*x509.Certificate)
	err    error
	signed int
	jwt    []embedded.JWTKey
	knows  bool // JWT keys
}

func newCompany(tb testing.TB, issuer *companyCA, roots ...*companyCA) *company {
	tb.Helper()
	c := &company{tb: tb, issuer: issuer}
	for _, r := range roots {
		c.roots = append(c.roots, embedded.Root{Certificate: r.cert})
	}
	if len(roots) > 0 {
		c.chain = []*x509.Certificate{issuer.cert}
	} else {
		c.roots = []embedded.Root{{Certificate: issuer.cert}}
	}
	return c
}

func (c *company) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

func (c *company) Name() string { return "the company" }

func (c *company) SignCA(_ context.Context, csrDER []byte, ttl time.Duration) (*embedded.UpstreamCA, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		return nil, err
	}
	c.signed++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(int64(c.signed)), RawSubject: csr.RawSubject, URIs: csr.URIs,
		NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(ttl),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
	if template.NotAfter.After(c.issuer.cert.NotAfter) {
		template.NotAfter = c.issuer.cert.NotAfter
	}
	if c.shape != nil {
		c.shape(template)
	}
	cert := issueCert(c.tb, template, c.issuer, csr.PublicKey)
	return &embedded.UpstreamCA{Chain: append([]*x509.Certificate{cert}, c.chain...), UpstreamBundle: c.bundle()}, nil
}

func (c *company) bundle() embedded.UpstreamBundle {
	return embedded.UpstreamBundle{X509: slices.Clone(c.roots), JWT: slices.Clone(c.jwt)}
}

func (c *company) Bundle(context.Context) (*embedded.UpstreamBundle, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.bundle()
	return &b, c.err
}

func (c *company) PublishJWTKey(_ context.Context, key embedded.JWTKey) ([]embedded.JWTKey, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.knows:
		return nil, errors.ErrUnsupported
	case c.err != nil:
		return nil, c.err
	}
	key.Upstream = nil
	c.jwt = append(c.jwt, key)
	return slices.Clone(c.jwt), nil
}

func (c *company) jwtKeys() []embedded.JWTKey {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.jwt)
}

var errAway = errors.New("nobody answers")
