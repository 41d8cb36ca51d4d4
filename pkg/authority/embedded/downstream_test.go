package embedded_test

import (
	"crypto/rand"
	"crypto/x509"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// TestDownstreamCA: an SVID issued by a downstream server verifies against the
// bundle, through the CA certificate it was given.
func TestDownstreamCA(t *testing.T) {
	for _, keys := range []embedded.KeyType{embedded.ECP256, embedded.ECP384, embedded.RSA2048} {
		cfg := testConfig(t)
		cfg.CAKeyType = keys
		a := start(t, cfg)
		key := newKey(t)
		issued, roots, err := a.NewDownstreamX509CA(t.Context(), newCSR(t, key, x509.CertificateRequest{DNSNames: []string{"ignored"}}), 1000*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		ca, err := x509.ParseCertificate(issued.Chain[0])
		if err != nil {
			t.Fatal(err)
		}
		root := a.OwnBundle().X509[0].Certificate
		if len(roots) != 1 || roots[0] != root || len(issued.Chain) != 1 {
			t.Errorf("%d roots, %d certificates", len(roots), len(issued.Chain))
		}
		if want := "SERIALNUMBER=" + root.SerialNumber.String() + ",OU=DOWNSTREAM-1,O=SPIFFE,C=US"; ca.Subject.String() != want {
			t.Errorf("subject %s, want %s", ca.Subject, want)
		}
		if !ca.NotAfter.Equal(root.NotAfter) || len(ca.DNSNames) > 0 {
			t.Errorf("not after %s, DNS names %q", ca.NotAfter, ca.DNSNames)
		}
		workload := &x509.Certificate{
			SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Second), NotAfter: time.Now().Add(time.Minute),
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: uris("example.org/w"),
		}
		der, err := x509.CreateCertificate(rand.Reader, workload, ca, newKey(t).Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		if workload, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		if _, _, err := x509svid.Verify([]*x509.Certificate{workload, ca}, getBundles(t, a).Own.X509Bundle()); err != nil {
			t.Errorf("%s: %v", keys, err)
		}
		for name, csr := range map[string][]byte{"none": nil, "garbage": []byte("x")} {
			if _, _, err := a.NewDownstreamX509CA(t.Context(), csr, 0); !errors.Is(err, embedded.ErrInvalid) || !strings.HasPrefix(err.Error(), "malformed CSR: ") {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func TestSignAgent(t *testing.T) {
	a := start(t, testConfig(t))
	csr := newCSR(t, newKey(t), x509.CertificateRequest{})
	issued, err := a.SignAgent(t.Context(), node, csr)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(issued.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	verifies(t, a, cert)
	if len(cert.URIs) != 1 || cert.URIs[0].String() != node.String() || cert.Subject.String() != "O=SPIRE,C=US" {
		t.Errorf("%v %s", cert.URIs, cert.Subject)
	}
	for name, agent := range map[string]spiffeid.ID{
		"workload": id("/w"), "server": id("/spire/server"), "foreign": spiffeid.RequireFromPath(other, "/spire/agent/x"), "none": {},
	} {
		if _, err := a.SignAgent(t.Context(), agent, csr); !errors.Is(err, embedded.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := a.SignAgent(t.Context(), node, []byte("x")); !errors.Is(err, embedded.ErrInvalid) {
		t.Errorf("garbage: %v", err)
	}
}
