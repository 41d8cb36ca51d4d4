package embedded_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

var (
	td    = spiffeid.RequireTrustDomainFromString("example.org")
	other = spiffeid.RequireTrustDomainFromString("other.org")
	node  = spiffeid.RequireFromPath(td, "/spire/agent/local/n1")
)

var errDisk = errors.New("disk is full")

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func newEntry(path string, selectors ...string) *entry.Entry {
	if len(selectors) == 0 {
		selectors = []string{"unix:uid:0"}
	}
	return &entry.Entry{SPIFFEID: id(path), ParentID: node, Selectors: attest.MustSelectors(selectors...)}
}

// testConfig is for a state in a new directory.
func testConfig(tb testing.TB) embedded.Config {
	tb.Helper()
	return embedded.Config{
		TrustDomain: td,
		StatePath:   filepath.Join(tb.TempDir(), "state", "authority.db"),
		LockTimeout: 1,
		Logger:      slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// start opens an authority that is closed with the test.
func start(tb testing.TB, cfg embedded.Config) *embedded.Authority {
	tb.Helper()
	a, err := embedded.Open(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := a.Close(); err != nil {
			tb.Error(err)
		}
	})
	return a
}

func mustCreate(tb testing.TB, a *embedded.Authority, e *entry.Entry) *entry.Entry {
	tb.Helper()
	stored, err := a.CreateEntry(context.Background(), e)
	if err != nil {
		tb.Fatal(err)
	}
	return stored
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

// sign asks for an SVID as the node does.
func sign(tb testing.TB, a *embedded.Authority, e *entry.Entry) *x509.Certificate {
	tb.Helper()
	issued, err := a.SignX509(context.Background(), authority.X509Request{
		EntryID: e.ID, SPIFFEID: e.SPIFFEID, CSR: newCSR(tb, newKey(tb), x509.CertificateRequest{}), DNSNames: e.DNSNames,
	})
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(issued.Chain[0])
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}

func writePEM(tb testing.TB, path string, der []byte) {
	tb.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		tb.Fatal(err)
	}
}
