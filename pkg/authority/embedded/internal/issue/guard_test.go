package issue

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestGuard: what crypto/x509 was told beyond the profile never gets a
// signature, whichever field it hides in.
func TestGuard(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	ca, err := NewRoot(ECP256, Root{TrustDomain: td, NotBefore: now, NotAfter: now.Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ECP256.Generate()
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	l := Leaf{ID: spiffeid.RequireFromPath(td, "/w"), PublicKey: spki, NotBefore: now, NotAfter: now.Add(time.Minute)}
	for name, edit := range map[string]func(*x509.Certificate, *profile){
		"as meant": nil,
		"a CA":     func(c *x509.Certificate, _ *profile) { c.IsCA = true },
		"signs":    func(c *x509.Certificate, _ *profile) { c.KeyUsage |= x509.KeyUsageCertSign },
		"other usage": func(c *x509.Certificate, _ *profile) {
			c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageCodeSigning)
		},
		"second ID": func(c *x509.Certificate, _ *profile) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/x"})
		},
		"other ID": func(c *x509.Certificate, _ *profile) { c.URIs[0].Path = "/x" },
		"DNS name": func(c *x509.Certificate, _ *profile) { c.DNSNames = []string{"x.example"} },
		"email":    func(c *x509.Certificate, _ *profile) { c.EmailAddresses = []string{"x@example.org"} },
		"extra extension": func(c *x509.Certificate, _ *profile) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Value: []byte{5, 0}}}
		},
		"too long": func(_ *x509.Certificate, p *profile) { p.notAfter = now.Add(2 * time.Hour) },
		"serial":   func(_ *x509.Certificate, p *profile) { p.serial = new(big.Int).Add(maxSerial, big.NewInt(1)) },
	} {
		p, err := newProfile(ca.cert.RawSubject, spki, l.NotBefore, l.NotAfter)
		if err != nil {
			t.Fatal(err)
		}
		if p.subject, err = plainSubject(); err != nil {
			t.Fatal(err)
		}
		p.extensions, p.further = leafExtensions, l.check
		template := &x509.Certificate{
			KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			URIs:        []*url.URL{l.ID.URL()},
		}
		if edit != nil {
			edit(template, &p)
		}
		if _, err := ca.issue(template, p); (err == nil) != (edit == nil) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := (guard{Signer: ca.key}).Sign(rand.Reader, make([]byte, 32), crypto.SHA256); err == nil {
		t.Error("a digest was signed unseen")
	}
	if _, err := (guard{Signer: ca.key}).SignMessage(rand.Reader, []byte("not a certificate"), crypto.SHA256); err == nil {
		t.Error("something else than a certificate was signed")
	}
}
