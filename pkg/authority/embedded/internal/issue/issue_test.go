package issue_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded/internal/issue"
)

var (
	td  = spiffeid.RequireTrustDomainFromString("example.org")
	now = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
)

func newRoot(tb testing.TB, k issue.KeyType) *issue.Issuer {
	tb.Helper()
	ca, err := issue.NewRoot(k, issue.Root{
		TrustDomain: td, Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}},
		NotBefore: now, NotAfter: now.Add(24 * time.Hour),
	})
	if err != nil {
		tb.Fatal(err)
	}
	return ca
}

func newSPKI(tb testing.TB) []byte {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

func leaf(tb testing.TB) issue.Leaf {
	tb.Helper()
	return issue.Leaf{ID: spiffeid.RequireFromPath(td, "/w"), PublicKey: newSPKI(tb), NotBefore: now, NotAfter: now.Add(time.Hour)}
}

// TestRootProfile compares a CA certificate with SPIRE Server's.
func TestRootProfile(t *testing.T) {
	for k, alg := range map[issue.KeyType]x509.SignatureAlgorithm{
		issue.ECP256: x509.ECDSAWithSHA256, issue.ECP384: x509.ECDSAWithSHA384, issue.RSA2048: x509.SHA256WithRSA,
	} {
		cert := newRoot(t, k).Certificate()
		var spki struct {
			Algorithm asn1.RawValue
			Key       asn1.BitString
		}
		if _, err := asn1.Unmarshal(cert.RawSubjectPublicKeyInfo, &spki); err != nil {
			t.Fatal(err)
		}
		sum := sha1.Sum(spki.Key.Bytes)
		for what, ok := range map[string]bool{
			"algorithm":     cert.SignatureAlgorithm == alg,
			"subject":       cert.Subject.String() == "SERIALNUMBER="+cert.SerialNumber.String()+",O=SPIFFE,C=US",
			"SKI":           string(cert.SubjectKeyId) == string(sum[:]),
			"AKI":           len(cert.AuthorityKeyId) == 0,
			"URI":           len(cert.URIs) == 1 && cert.URIs[0].String() == "spiffe://example.org",
			"key usage":     cert.KeyUsage == x509.KeyUsageCertSign|x509.KeyUsageCRLSign,
			"ext key usage": len(cert.ExtKeyUsage) == 0,
			"CA":            cert.IsCA && cert.MaxPathLen == -1,
			"serial":        cert.SerialNumber.Sign() > 0 && cert.SerialNumber.BitLen() <= 128,
			"validity":      cert.NotBefore.Equal(now.Truncate(time.Second)) && cert.NotAfter.Equal(now.Truncate(time.Second).Add(24*time.Hour)),
			"self-signed":   cert.CheckSignatureFrom(cert) == nil,
		} {
			if !ok {
				t.Errorf("%s: %s: %+v", k, what, cert.Subject)
			}
		}
	}
}

// TestLeafBytes compares with a certificate made by hand from the same contents:
// the to-be-signed bytes must be equal.
func TestLeafBytes(t *testing.T) {
	for _, k := range []issue.KeyType{issue.ECP256, issue.ECP384, issue.RSA2048} {
		ca := newRoot(t, k)
		for name, edit := range map[string]func(*issue.Leaf){
			"plain":    func(*issue.Leaf) {},
			"DNS":      func(l *issue.Leaf) { l.DNSNames = []string{"w.example", "*.w.example"} },
			"wildcard": func(l *issue.Leaf) { l.DNSNames = []string{"*.w.example"} },
			"many": func(l *issue.Leaf) {
				l.DNSNames = slices.Repeat([]string{"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.example"}, 2000)
			},
			"long path": func(l *issue.Leaf) { l.ID = spiffeid.RequireFromPath(td, "/"+strings.Repeat("x", 300)) },
			"subject":   func(l *issue.Leaf) { l.Subject = &pkix.Name{Organization: []string{"Größe"}, CommonName: "x"} },
		} {
			l := leaf(t)
			edit(&l)
			issued, err := ca.IssueLeaf(l)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			got, err := x509.ParseCertificate(issued.DER)
			if err != nil {
				t.Fatal(err)
			}
			if err := got.CheckSignatureFrom(ca.Certificate()); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			subject := got.Subject
			subject.Names, subject.ExtraNames = nil, nil
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			parent := *ca.Certificate()
			parent.PublicKey = nil // signed with another key: only the bytes below the signature count
			want, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
				SerialNumber: got.SerialNumber, Subject: subject, NotBefore: l.NotBefore, NotAfter: l.NotAfter,
				KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement,
				ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
				SubjectKeyId: got.SubjectKeyId, DNSNames: l.DNSNames, URIs: got.URIs,
			}, &parent, got.PublicKey, key)
			if err != nil {
				t.Fatal(err)
			}
			library, err := x509.ParseCertificate(want)
			if err != nil {
				t.Fatal(err)
			}
			if k == issue.ECP256 && string(got.RawTBSCertificate) != string(library.RawTBSCertificate) {
				t.Errorf("%s: encoder differs from crypto/x509\n%x\n%x", name, got.RawTBSCertificate, library.RawTBSCertificate)
			}
		}
	}
}

// TestIssueRefuses: contents outside the profile are never signed.
func TestIssueRefuses(t *testing.T) {
	ca := newRoot(t, issue.ECP256)
	for name, edit := range map[string]func(*issue.Leaf){
		"outlives the CA": func(l *issue.Leaf) { l.NotAfter = now.Add(25 * time.Hour) },
		"ends before":     func(l *issue.Leaf) { l.NotAfter = l.NotBefore },
		"no ID":           func(l *issue.Leaf) { l.ID = spiffeid.ID{} },
		"no key":          func(l *issue.Leaf) { l.PublicKey = nil },
		"broken key":      func(l *issue.Leaf) { l.PublicKey = l.PublicKey[:len(l.PublicKey)-1] },
		"two keys":        func(l *issue.Leaf) { l.PublicKey = slices.Concat(l.PublicKey, l.PublicKey) },
		"odd DNS name":    func(l *issue.Leaf) { l.DNSNames = []string{"ä.example"} },
		"bad string":      func(l *issue.Leaf) { l.Subject = &pkix.Name{CommonName: "\xff"} },
	} {
		l := leaf(t)
		edit(&l)
		if _, err := ca.IssueLeaf(l); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestIssuerRefuses: a key and a certificate that do not belong together, or a
// certificate that is no CA of the trust domain, make no issuer.
func TestIssuerRefuses(t *testing.T) {
	a, b := newRoot(t, issue.ECP256), newRoot(t, issue.ECP256)
	keyOf := func(i *issue.Issuer) []byte {
		der, err := i.MarshalKey()
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	key, err := issue.ParseKey(keyOf(a))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := issue.NewIssuer(td, a.Certificate().Raw, key); err != nil {
		t.Error(err)
	}
	if _, err := issue.NewIssuer(td, b.Certificate().Raw, key); err == nil {
		t.Error("accepted another CA's certificate")
	}
	if _, err := issue.NewIssuer(spiffeid.RequireTrustDomainFromString("other.org"), a.Certificate().Raw, key); err == nil {
		t.Error("accepted a foreign CA")
	}
	if _, err := issue.NewIssuer(td, []byte("x"), key); err == nil {
		t.Error("accepted garbage")
	}
	self := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now, NotAfter: now.Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, self, self, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := issue.NewIssuer(td, der, key); err == nil {
		t.Error("accepted a certificate that is no CA")
	}
	if _, err := issue.NewRoot("ec-p521", issue.Root{TrustDomain: td}); err == nil {
		t.Error("accepted an unknown key type")
	}
}

func TestJWTKey(t *testing.T) {
	seen := make(map[string]bool)
	for range 20 {
		k, err := issue.GenerateJWTKey(issue.ECP256, now.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		if len(k.ID()) != 32 || seen[k.ID()] || strings.Trim(k.ID(), "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789") != "" {
			t.Errorf("key ID %q", k.ID())
		}
		seen[k.ID()] = true
	}
	k, err := issue.GenerateJWTKey(issue.ECP384, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromPath(td, "/w")
	good := issue.JWTClaims{Subject: id.String(), Audience: []string{"a"}, IssuedAt: now.Unix(), ExpiresAt: now.Unix() + 60}
	if _, err := k.Sign(id, good); err != nil {
		t.Error(err)
	}
	for name, edit := range map[string]func(*issue.JWTClaims){
		"subject":          func(c *issue.JWTClaims) { c.Subject = "spiffe://example.org/x" },
		"audience":         func(c *issue.JWTClaims) { c.Audience = nil },
		"expiry":           func(c *issue.JWTClaims) { c.ExpiresAt = c.IssuedAt },
		"outlives the key": func(c *issue.JWTClaims) { c.ExpiresAt = now.Unix() + 3601 },
	} {
		c := good
		edit(&c)
		if _, err := k.Sign(id, c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// FuzzCSR feeds requests as callers may send them.
func FuzzCSR(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"a"}}, key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Add([]byte{0x30, 0x80})
	ca := newRoot(f, issue.ECP256)
	f.Fuzz(func(t *testing.T, der []byte) {
		spki, _, err := issue.PublicKeyFromCSR(der)
		if err != nil {
			return
		}
		l := leaf(t)
		l.PublicKey = spki
		if _, err := ca.IssueLeaf(l); err != nil {
			t.Errorf("accepted the key, but not for a certificate: %v", err)
		}
	})
}
