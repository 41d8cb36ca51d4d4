package bundleendpoint_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/spiffe-node/spiffe-node/internal/bundleendpoint"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.org")

// newCertificate is self-signed for 127.0.0.1.
func newCertificate(t *testing.T, serial int64) (certPEM, keyPEM []byte, cert tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true, SubjectKeyId: []byte{1},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	if cert, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		t.Fatal(err)
	}
	return certPEM, keyPEM, cert
}

func newBundle(t *testing.T, sequence uint64) *embedded.Bundle {
	t.Helper()
	_, _, cert := newCertificate(t, 1)
	der, err := x509.MarshalPKIXPublicKey(cert.PrivateKey.(*ecdsa.PrivateKey).Public())
	if err != nil {
		t.Fatal(err)
	}
	return &embedded.Bundle{TrustDomain: td, X509: []embedded.Root{{Certificate: cert.Leaf, Tainted: true}}, JWT: []embedded.JWTKey{{ID: "k", PublicKey: der}}, Sequence: sequence}
}

// serve runs an endpoint until the test ends, and returns its URL and a client.
func serve(t *testing.T, cfg bundleendpoint.Config) (string, *http.Client) {
	t.Helper()
	cfg.Address = "127.0.0.1:0"
	if cfg.Certificate.Get == nil {
		_, _, cert := newCertificate(t, 1)
		cfg.Certificate.Get = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &cert, nil }
	}
	s, err := bundleendpoint.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "https://" + s.Addr().String(), &http.Client{Transport: transport}
}

func get(t *testing.T, client *http.Client, method, url string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// The bundle of the moment is served, in the form of the specification.
func TestDocument(t *testing.T) {
	var bundle atomic.Pointer[embedded.Bundle]
	bundle.Store(newBundle(t, 7))
	url, client := serve(t, bundleendpoint.Config{Bundle: bundle.Load, RefreshHint: 90 * time.Second})
	resp, body := get(t, client, http.MethodGet, url)
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/json" || resp.ProtoMajor != 2 {
		t.Errorf("%s %s, %s", resp.Proto, resp.Status, resp.Header)
	}
	got, err := spiffebundle.Parse(td, []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	hint, _ := got.RefreshHint()
	if n, _ := got.SequenceNumber(); n != 7 || hint != 90*time.Second || !got.HasX509Authority(bundle.Load().X509[0].Certificate) || !got.HasJWTAuthority("k") {
		t.Errorf("%s", body)
	}
	var doc struct {
		Keys []struct {
			Use, Kid string
			X5c      []string
		}
	}
	if err := json.Unmarshal([]byte(body), &doc); err != nil || len(doc.Keys) != 2 || doc.Keys[0].Use != "x509-svid" || len(doc.Keys[0].X5c) != 1 || doc.Keys[0].Kid != "" || doc.Keys[1].Use != "jwt-svid" {
		t.Errorf("%v, %+v", err, doc)
	}
	if !strings.HasPrefix(body, "{\n    \"keys\": [") {
		t.Errorf("not indented as SPIRE Server does: %.40s", body)
	}
	bundle.Store(newBundle(t, 8))
	if _, body := get(t, client, http.MethodGet, url+"/"); !strings.Contains(body, `"spiffe_sequence": 8`) {
		t.Errorf("the old bundle is served on: %s", body)
	}
	bundle.Store(&embedded.Bundle{TrustDomain: td})
	if resp, body := get(t, client, http.MethodGet, url); resp.StatusCode != http.StatusServiceUnavailable || strings.Contains(body, "keys") {
		t.Errorf("an empty bundle is served: %s, %s", resp.Status, body)
	}
}

func TestOtherRequests(t *testing.T) {
	url, client := serve(t, bundleendpoint.Config{Bundle: func() *embedded.Bundle {
		return &embedded.Bundle{TrustDomain: td, JWT: []embedded.JWTKey{{ID: "broken"}}}
	}})
	for request, code := range map[string]int{
		"POST /": http.StatusMethodNotAllowed, "DELETE /": http.StatusMethodNotAllowed, "GET /x": http.StatusNotFound, "GET /../": http.StatusNotFound,
		"GET /": http.StatusInternalServerError,
	} {
		method, path, _ := strings.Cut(request, " ")
		resp, body := get(t, client, method, url+path)
		if resp.StatusCode != code || strings.Contains(body, "broken") {
			t.Errorf("%s: %s, %s", request, resp.Status, body)
		}
	}
}

// Files that change are read anew; damage does not end the service.
func TestFilesAreReloaded(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	write := func(certPEM, keyPEM []byte) {
		for path, text := range map[string][]byte{cert: certPEM, key: keyPEM} {
			if err := os.WriteFile(path, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := bundleendpoint.Files(cert, key, nil); err == nil {
		t.Error("missing files are taken")
	}
	certPEM, keyPEM, _ := newCertificate(t, 1)
	write(certPEM, keyPEM)
	var log bytes.Buffer
	c, err := bundleendpoint.Files(cert, key, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	serial := func() int64 {
		t.Helper()
		bundleendpoint.LookAgain(&c)
		got, err := c.Get(nil)
		if err != nil {
			t.Fatal(err)
		}
		return got.Leaf.SerialNumber.Int64()
	}
	if n := serial(); n != 1 || log.Len() != 0 {
		t.Errorf("serial %d, %s", n, &log)
	}
	write([]byte("damage"), keyPEM)
	if n := serial(); n != 1 || !strings.Contains(log.String(), "the old one is used on") {
		t.Errorf("serial %d, %s", n, &log)
	}
	certPEM, keyPEM, _ = newCertificate(t, 22)
	write(certPEM, keyPEM)
	if n := serial(); n != 22 || strings.Contains(log.String(), "PRIVATE") {
		t.Errorf("serial %d, %s", n, &log)
	}
	if err := os.Remove(cert); err != nil {
		t.Fatal(err)
	}
	if n := serial(); n != 22 {
		t.Errorf("serial %d", n)
	}
}

func TestRefusals(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "acme")
	good := bundleendpoint.ACMEConfig{Domain: "x.org", CacheDir: dir, AcceptTOS: true}
	c, err := bundleendpoint.ACME(good)
	if err != nil {
		t.Fatal(err)
	}
	// Nobody gets a certificate for a name that is not ours.
	if _, err := c.Get(&tls.ClientHelloInfo{ServerName: "other.org"}); err == nil || !strings.Contains(err.Error(), "not configured") {
		t.Errorf("another name: %v", err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	for want, edit := range map[string]func(*bundleendpoint.ACMEConfig){
		"terms":       func(c *bundleendpoint.ACMEConfig) { c.AcceptTOS = false },
		"no domain":   func(c *bundleendpoint.ACMEConfig) { c.Domain = "" },
		"not private": func(c *bundleendpoint.ACMEConfig) { c.CacheDir = os.TempDir() },
	} {
		bad := good
		edit(&bad)
		if _, err := bundleendpoint.ACME(bad); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	if _, err := bundleendpoint.New(t.Context(), bundleendpoint.Config{Address: "127.0.0.1:0"}); err == nil {
		t.Error("an endpoint without a bundle")
	}
	cert := bundleendpoint.Certificate{Get: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, io.EOF }}
	if _, err := bundleendpoint.New(t.Context(), bundleendpoint.Config{Address: "nowhere", Certificate: cert, Bundle: func() *embedded.Bundle { return nil }}); err == nil {
		t.Error("an endpoint without an address")
	}
	s, err := bundleendpoint.New(t.Context(), bundleendpoint.Config{Address: "127.0.0.1:0", Certificate: cert, Bundle: func() *embedded.Bundle { return nil }})
	if err != nil || s.Close() != nil {
		t.Error(err)
	}
}
