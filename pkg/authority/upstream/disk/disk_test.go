package disk_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/authority/upstream/disk"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

type ca struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCA(t *testing.T, name string, below *ca, key crypto.Signer, shape func(*x509.Certificate)) *ca {
	t.Helper()
	c := &ca{key: key}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	if shape != nil {
		shape(template)
	}
	parent, by := template, key
	if below != nil {
		parent, by = below.cert, below.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	if c.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return c
}

func certPEM(cas ...*ca) string {
	var out strings.Builder
	for _, c := range cas {
		out.WriteString("subject=" + c.cert.Subject.String() + "\n")
		out.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw}))
	}
	return out.String()
}

func keyPEM(t *testing.T, kind string, key crypto.Signer) string {
	t.Helper()
	var der []byte
	var err error
	switch kind {
	case "EC PRIVATE KEY":
		der, err = x509.MarshalECPrivateKey(key.(*ecdsa.PrivateKey))
	case "RSA PRIVATE KEY":
		der = x509.MarshalPKCS1PrivateKey(key.(*rsa.PrivateKey))
	default:
		der, err = x509.MarshalPKCS8PrivateKey(key)
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// write makes the three files; an empty text makes none.
func write(t *testing.T, cert, key, bundle string) disk.Config {
	t.Helper()
	dir := t.TempDir()
	cfg := disk.Config{TrustDomain: td, CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"), Logger: slog.New(slog.DiscardHandler)}
	if bundle != "" {
		cfg.BundleFile = filepath.Join(dir, "bundle.crt")
	}
	for path, text := range map[string]string{cfg.CertFile: cert, cfg.KeyFile: key, cfg.BundleFile: bundle} {
		if text == "" {
			continue
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cfg
}

func open(t *testing.T, cfg disk.Config) *disk.Upstream {
	t.Helper()
	u, err := disk.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func newCSR(t *testing.T, id string) ([]byte, crypto.Signer) {
	t.Helper()
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Organization: []string{"SPIFFE"}}, URIs: []*url.URL{u}, DNSNames: []string{"ignored"},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr, key
}

func TestSignCA(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for kind, key := range map[string]crypto.Signer{"PRIVATE KEY": newKey(t), "EC PRIVATE KEY": newKey(t), "RSA PRIVATE KEY": rsaKey, "PRIVATE KEY ": edKey} {
		root := newCA(t, "Root", nil, newKey(t), nil)
		middle := newCA(t, "Middle", root, newKey(t), nil)
		issuing := newCA(t, "Issuing", middle, key, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Hour) })
		text := keyPEM(t, strings.TrimSpace(kind), key)
		if kind == "EC PRIVATE KEY" {
			text = "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n" + text
		}
		u := open(t, write(t, certPEM(issuing, middle), text, certPEM(root)))
		csr, want := newCSR(t, "spiffe://example.org")
		got, err := u.SignCA(t.Context(), csr, 24*time.Hour)
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		c := got.Chain[0]
		if len(got.Chain) != 3 || len(got.X509) != 1 || !c.IsCA || c.MaxPathLen != -1 || len(c.DNSNames) > 0 || len(c.SubjectKeyId) == 0 ||
			c.Subject.String() != "O=SPIFFE" || !c.NotAfter.Equal(issuing.cert.NotAfter) || c.URIs[0].String() != "spiffe://example.org" {
			t.Errorf("%s: %+v", kind, c)
		}
		if !want.Public().(*ecdsa.PublicKey).Equal(c.PublicKey) {
			t.Errorf("%s: another key", kind)
		}
		if _, err := u.PublishJWTKey(t.Context(), embedded.JWTKey{}); !errors.Is(err, errors.ErrUnsupported) {
			t.Error(err)
		}
	}
}

func TestFilesAreReadAnew(t *testing.T) {
	root := newCA(t, "Root", nil, newKey(t), nil)
	cfg := write(t, certPEM(root), keyPEM(t, "PRIVATE KEY", root.key), "")
	u := open(t, cfg)
	csr, _ := newCSR(t, "spiffe://example.org")
	if got, err := u.SignCA(t.Context(), csr, time.Hour); err != nil || len(got.X509) != 1 {
		t.Fatalf("%v", err)
	}
	next := newCA(t, "Root 2", nil, newKey(t), nil)
	for path, text := range map[string]string{cfg.CertFile: certPEM(next), cfg.KeyFile: keyPEM(t, "PRIVATE KEY", next.key)} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := u.SignCA(t.Context(), csr, time.Hour); err != nil || got.Chain[0].CheckSignatureFrom(next.cert) != nil {
		t.Errorf("%v", err)
	}
	if b, err := u.Bundle(t.Context()); err != nil || !b.X509[0].Certificate.Equal(next.cert) {
		t.Errorf("%v", err)
	}
}

func TestRefusals(t *testing.T) {
	root := newCA(t, "Root", nil, newKey(t), nil)
	issuing := newCA(t, "Issuing", root, newKey(t), nil)
	other := newCA(t, "Other", nil, newKey(t), nil)
	key := keyPEM(t, "PRIVATE KEY", issuing.key)
	shaped := func(f func(*x509.Certificate)) string {
		return certPEM(newCA(t, "Issuing", root, issuing.key, f))
	}
	for name, tc := range map[string]struct{ cert, key, bundle, want string }{
		"no certificate":  {"", key, certPEM(root), "tls.crt: no such file"},
		"no key":          {certPEM(issuing), "", certPEM(root), "tls.key: no such file"},
		"garbage":         {"garbage", key, certPEM(root), "tls.crt: holds no certificate in PEM"},
		"key in it":       {certPEM(issuing) + key, key, certPEM(root), `tls.crt: holds a PEM block of type "PRIVATE KEY"`},
		"broken":          {"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", key, certPEM(root), "tls.crt: certificate 1:"},
		"too much":        {strings.Repeat("#", 1<<20+1), key, certPEM(root), "tls.crt: larger than"},
		"no key in it":    {certPEM(issuing), "garbage", certPEM(root), "tls.key: holds no private key in PEM"},
		"certificate":     {certPEM(issuing), certPEM(issuing), certPEM(root), `tls.key: holds a PEM block of type "CERTIFICATE", not a private key`},
		"broken key":      {certPEM(issuing), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", certPEM(root), "tls.key: its private key cannot be read"},
		"encrypted key":   {certPEM(issuing), "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n", certPEM(root), "tls.key: its private key is encrypted"},
		"another's key":   {certPEM(issuing), keyPEM(t, "PRIVATE KEY", other.key), certPEM(root), "tls.key: the key is not that of the first certificate"},
		"another's root":  {certPEM(issuing), key, certPEM(other), "does not verify with the roots in"},
		"no roots":        {certPEM(issuing), key, "", "without a bundle file it must hold one self-signed root"},
		"order":           {certPEM(issuing, other, root), key, certPEM(root), `tls.crt: certificate 1, "CN=Issuing", is not signed by the one after it, "CN=Other"`},
		"expired":         {shaped(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), key, certPEM(root), `tls.crt: certificate 1, "CN=Issuing": it expired at`},
		"not yet":         {shaped(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), key, certPEM(root), "it is not valid before"},
		"no CA":           {shaped(func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, 0 }), key, certPEM(root), "it is no CA's"},
		"key usage":       {shaped(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), key, certPEM(root), "does not allow signing certificates"},
		"expired root":    {certPEM(issuing), key, certPEM(newCA(t, "Root", nil, root.key, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })), `bundle.crt: root "CN=Root": it expired`},
		"garbage as root": {certPEM(issuing), key, "garbage", "bundle.crt: holds no certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			u := open(t, write(t, tc.cert, tc.key, tc.bundle))
			csr, _ := newCSR(t, "spiffe://example.org")
			_, err := u.SignCA(t.Context(), csr, time.Hour)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v\nwant %s", err, tc.want)
			}
			if _, again := u.Bundle(t.Context()); again == nil || err == nil || again.Error() != err.Error() {
				t.Errorf("the bundle says %v", again)
			}
		})
	}
	u := open(t, write(t, certPEM(issuing), key, certPEM(root)))
	for name, csr := range map[string]func() []byte{
		"garbage": func() []byte { return []byte("x") },
		"foreign": func() []byte { c, _ := newCSR(t, "spiffe://other.org"); return c },
	} {
		if _, err := u.SignCA(t.Context(), csr(), time.Hour); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
	for name, cfg := range map[string]disk.Config{"nothing": {}, "no key": {TrustDomain: td, CertFile: "x"}} {
		if _, err := disk.New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzFiles(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Add([]byte("-----BEGIN EC PRIVATE KEY-----\nDEK-Info: x\n\nAAAA\n-----END EC PRIVATE KEY-----\n"))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if certs, err := disk.ParseCertificates(data); (len(certs) == 0) == (err == nil) {
			t.Error("neither or both of certificates and error")
		}
		if key, err := disk.ParseKey(data); (key == nil) == (err == nil) {
			t.Error("neither or both of key and error")
		}
	})
}
