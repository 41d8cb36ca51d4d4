package embedded_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

func uris(ids ...string) []*url.URL {
	out := make([]*url.URL, len(ids))
	for i, id := range ids {
		out[i] = &url.URL{Scheme: "spiffe", Host: strings.Split(id, "/")[0], Path: id[strings.Index(id, "/"):]}
	}
	return out
}

func TestMintX509(t *testing.T) {
	a := start(t, testConfig(t))
	key := newKey(t)
	got, issued, err := a.MintX509(t.Context(), newCSR(t, key, x509.CertificateRequest{
		URIs: uris("example.org/minted"), DNSNames: []string{"b.example", "a.example"},
		Subject: pkix.Name{Organization: []string{"Mine"}, CommonName: "gone"},
	}), 10*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(issued.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	verifies(t, a, cert)
	if got != id("/minted") || cert.Subject.CommonName != "b.example" || !slices.Equal(cert.Subject.Organization, []string{"Mine"}) ||
		!slices.Equal(cert.DNSNames, []string{"b.example", "a.example"}) || !key.PublicKey.Equal(cert.PublicKey) {
		t.Errorf("%s %+v %q", got, cert.Subject, cert.DNSNames)
	}
	if left := time.Until(cert.NotAfter); left > 10*time.Minute || left < 9*time.Minute {
		t.Errorf("lives %s", left)
	}
	// Without a subject: the usual one. With a TTL beyond the CA: the CA's end.
	_, issued, err = a.MintX509(t.Context(), newCSR(t, key, x509.CertificateRequest{URIs: uris("example.org/minted")}), 1000*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(issued.Chain[0]); err != nil {
		t.Fatal(err)
	}
	if cert.Subject.String() != "O=SPIRE,C=US" || !cert.NotAfter.Equal(requireX509(t, a).Active.ExpiresAt) {
		t.Errorf("%s %s", cert.Subject, cert.NotAfter)
	}
}

func TestMintX509Refused(t *testing.T) {
	a := start(t, testConfig(t))
	key := newKey(t)
	csr := func(c x509.CertificateRequest) []byte { return newCSR(t, key, c) }
	tampered := csr(x509.CertificateRequest{URIs: uris("example.org/w")})
	tampered[len(tampered)-1] ^= 1
	for name, tt := range map[string]struct {
		csr  []byte
		text string // prefix
	}{
		"none":        {nil, "missing CSR"},
		"garbage":     {[]byte("x"), "malformed CSR: "},
		"huge":        {make([]byte, 1<<20), "malformed CSR: "},
		"tampered":    {tampered, "failed to verify CSR signature: "},
		"no URI":      {csr(x509.CertificateRequest{}), "CSR URI SAN is required"},
		"two URIs":    {csr(x509.CertificateRequest{URIs: uris("example.org/a", "example.org/b")}), "only one URI SAN is expected"},
		"foreign":     {csr(x509.CertificateRequest{URIs: uris("other.org/w")}), `CSR URI SAN is invalid: "spiffe://other.org/w" is not a member`},
		"reserved":    {csr(x509.CertificateRequest{URIs: uris("example.org/spire/server")}), "CSR URI SAN is invalid: "},
		"not SPIFFE":  {csr(x509.CertificateRequest{URIs: []*url.URL{{Scheme: "https", Host: "example.org"}}}), "CSR URI SAN is invalid: "},
		"bad DNS":     {csr(x509.CertificateRequest{URIs: uris("example.org/w"), DNSNames: []string{"a..b"}}), "CSR DNS name is invalid: "},
		"overlapping": {csr(x509.CertificateRequest{URIs: uris("example.org/w"), DNSNames: []string{"a.b.c", "*.b.c"}}), "CSR DNS name contains a wildcard that covers another non-wildcard name: "},
	} {
		_, issued, err := a.MintX509(t.Context(), tt.csr, 0)
		if issued != nil || !errors.Is(err, embedded.ErrInvalid) || !strings.HasPrefix(err.Error(), tt.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMintJWT(t *testing.T) {
	cfg := testConfig(t)
	cfg.JWTIssuer = "https://issuer.example"
	a := start(t, cfg)
	issued, err := a.MintJWT(t.Context(), id("/w"), []string{"", "a"}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := jwtsvid.ParseAndValidate(issued.Token, getBundles(t, a).Own.JWTBundle(), []string{"a"})
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID != id("/w") || svid.Claims["iss"] != cfg.JWTIssuer || issued.ExpiresAt.Sub(issued.IssuedAt) != time.Minute {
		t.Errorf("%+v", svid)
	}
	for text, try := range map[string]func() error{
		"at least one audience is required": func() error { _, err := a.MintJWT(t.Context(), id("/w"), []string{""}, 0); return err },
		"invalid SPIFFE ID: request must specify SPIFFE ID": func() error {
			_, err := a.MintJWT(t.Context(), spiffeid.ID{}, []string{"a"}, 0)
			return err
		},
		`invalid SPIFFE ID: "spiffe://example.org/spire/server" is not a workload in trust domain "example.org"; path is in the reserved namespace`: func() error {
			_, err := a.MintJWT(t.Context(), id("/spire/server"), []string{"a"}, 0)
			return err
		},
	} {
		if err := try(); !errors.Is(err, embedded.ErrInvalid) || err.Error() != text {
			t.Errorf("error %v, want %q", err, text)
		}
	}
}
