package authoritytest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// x509Verifies: the chain verifies against the bundle of the same moment, as
// any SPIFFE peer does it, and carries the key of the request.
func (s suite) x509Verifies() {
	t, h := s.T, s.Harness
	e := h.register(t, "/w", nil)
	key := newKey(t)
	issued, err := h.Authority.SignX509(t.Context(), x509Request(e, newCSR(t, key, x509.CertificateRequest{})))
	if err != nil {
		t.Fatal(err)
	}
	chain := parseChain(t, issued.Chain)
	own := bundles(t, h).Own
	got, _, err := x509svid.Verify(chain, own.X509Bundle())
	if err != nil {
		t.Fatal(err)
	}
	if got != e.SPIFFEID {
		t.Errorf("SPIFFE ID %s, want %s", got, e.SPIFFEID)
	}
	if !key.PublicKey.Equal(chain[0].PublicKey) {
		t.Error("the certificate is for another key")
	}
	if !chain[0].NotBefore.Equal(issued.NotBefore) || !chain[0].NotAfter.Equal(issued.NotAfter) {
		t.Errorf("answer says %s to %s, certificate %s to %s", issued.NotBefore, issued.NotAfter, chain[0].NotBefore, chain[0].NotAfter)
	}
	for _, cert := range chain {
		if bytes.Equal(cert.RawIssuer, cert.RawSubject) && cert.CheckSignatureFrom(cert) == nil {
			t.Error("the chain holds a self-signed root")
		}
	}
}

// x509Profile: every attribute is as SPIRE Server issues it.
func (s suite) x509Profile() {
	t, h := s.T, s.Harness
	dns := []string{"b.example", "a.example", "*.c.example"}
	e := h.register(t, "/w", func(e *entry.Entry) { e.DNSNames = dns })
	before := time.Now()
	issued, err := h.Authority.SignX509(t.Context(), x509Request(e, newCSR(t, newKey(t), x509.CertificateRequest{})))
	if err != nil {
		t.Fatal(err)
	}
	cert := parseChain(t, issued.Chain)[0]
	check := func(ok bool, what string, got any) {
		t.Helper()
		if !ok {
			t.Errorf("%s: %v", what, got)
		}
	}
	check(cert.Version == 3, "version", cert.Version)
	check(slices.Equal(cert.DNSNames, dns), "DNS names", cert.DNSNames)
	check(cert.Subject.CommonName == dns[0], "common name", cert.Subject)
	check(slices.Equal(cert.Subject.Country, []string{"US"}), "country", cert.Subject)
	check(slices.Equal(cert.Subject.Organization, []string{"SPIRE"}), "organization", cert.Subject)
	check(len(cert.URIs) == 1 && cert.URIs[0].String() == e.SPIFFEID.String(), "URIs", cert.URIs)
	check(cert.KeyUsage == x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment|x509.KeyUsageKeyAgreement, "key usage", cert.KeyUsage)
	check(slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}), "extended key usage", cert.ExtKeyUsage)
	check(cert.BasicConstraintsValid && !cert.IsCA, "basic constraints", cert.IsCA)
	check(len(cert.SubjectKeyId) > 0 && len(cert.AuthorityKeyId) > 0, "key IDs", cert.SubjectKeyId)
	check(cert.SerialNumber.Sign() > 0 && cert.SerialNumber.BitLen() <= 128, "serial", cert.SerialNumber)
	check(cert.NotBefore.Before(before) && cert.NotBefore.After(before.Add(-time.Minute)), "not before", cert.NotBefore)
	check(cert.NotAfter.After(before), "not after", cert.NotAfter)
	for _, ext := range cert.Extensions {
		switch id := ext.Id.String(); id {
		case "2.5.29.15", "2.5.29.19":
			check(ext.Critical, "not critical", id)
		default:
			check(!ext.Critical, "critical", id)
		}
	}
}

// x509IgnoresCSR: nothing of the request but its key gets into the certificate.
func (s suite) x509IgnoresCSR() {
	t, h := s.T, s.Harness
	e := h.register(t, "/w", nil)
	evil, err := url.Parse("spiffe://" + h.TrustDomain.Name() + "/admin")
	if err != nil {
		t.Fatal(err)
	}
	csr := newCSR(t, newKey(t), x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "evil", Organization: []string{"Evil"}},
		URIs:    []*url.URL{evil}, DNSNames: []string{"evil.example"}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)},
		EmailAddresses: []string{"evil@example.org"},
	})
	issued, err := h.Authority.SignX509(t.Context(), x509Request(e, csr))
	if err != nil {
		t.Fatal(err)
	}
	cert := parseChain(t, issued.Chain)[0]
	if len(cert.URIs) != 1 || cert.URIs[0].String() != e.SPIFFEID.String() {
		t.Errorf("URIs %v", cert.URIs)
	}
	if len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) > 0 || cert.Subject.CommonName != "" {
		t.Errorf("smuggled in: %v %v %v %v", cert.DNSNames, cert.IPAddresses, cert.EmailAddresses, cert.Subject)
	}
}

// x509EntryTTL: the entry's TTL decides.
func (s suite) x509EntryTTL() {
	t, h := s.T, s.Harness
	const ttl = 7 * time.Minute
	e := h.register(t, "/w", func(e *entry.Entry) { e.X509SVIDTTL = ttl })
	issued, err := h.Authority.SignX509(t.Context(), x509Request(e, newCSR(t, newKey(t), x509.CertificateRequest{})))
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(issued.NotAfter); left > ttl || left < ttl-time.Minute {
		t.Errorf("lives %s, want %s", left, ttl)
	}
}

// x509Refused: what will never be signed is ErrRefused and nothing else.
func (s suite) x509Refused() {
	t, h := s.T, s.Harness
	e := h.register(t, "/w", nil)
	gone := h.register(t, "/gone", nil)
	h.Unregister(t, gone)
	good := newCSR(t, newKey(t), x509.CertificateRequest{})
	tampered := slices.Clone(good)
	tampered[len(tampered)-1] ^= 1
	weak, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	short, err := rsa.GenerateKey(rand.Reader, 1024) //nolint:gosec // weak on purpose
	if err != nil {
		t.Fatal(err)
	}
	for name, req := range map[string]authority.X509Request{
		"no entry":        {SPIFFEID: e.SPIFFEID, CSR: good},
		"unknown entry":   {EntryID: "nobody", SPIFFEID: e.SPIFFEID, CSR: good},
		"deleted entry":   x509Request(gone, good),
		"other SPIFFE ID": {EntryID: e.ID, SPIFFEID: h.id("/admin"), CSR: good},
		"no CSR":          x509Request(e, nil),
		"garbage CSR":     x509Request(e, []byte("garbage")),
		"tampered CSR":    x509Request(e, tampered),
		"P-224":           x509Request(e, newCSR(t, weak, x509.CertificateRequest{})),
		"RSA-1024":        x509Request(e, newCSR(t, short, x509.CertificateRequest{})),
	} {
		issued, err := h.Authority.SignX509(t.Context(), req)
		wantRefused(t, name, issued != nil, err)
	}
}

func wantRefused(t *testing.T, name string, answered bool, err error) {
	t.Helper()
	if !errors.Is(err, authority.ErrRefused) || errors.Is(err, authority.ErrTryLater) || errors.Is(err, authority.ErrNotReady) {
		t.Errorf("%s: error %v, want ErrRefused", name, err)
	}
	if answered {
		t.Errorf("%s: an answer beside the error", name)
	}
}

// cancelled: a call whose context has ended does nothing.
func (s suite) cancelled() {
	t, h := s.T, s.Harness
	e := h.register(t, "/w", nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.Authority.SignX509(ctx, x509Request(e, newCSR(t, newKey(t), x509.CertificateRequest{}))); err == nil {
		t.Error("SignX509 ignores its context")
	}
	if _, err := h.Authority.SignJWT(ctx, jwtRequest(e, "a")); err == nil {
		t.Error("SignJWT ignores its context")
	}
}
