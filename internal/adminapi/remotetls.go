package adminapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// ServerSigner signs the certificate that TLS listeners present;
// *embedded.Authority is one.
type ServerSigner interface {
	SignServer(ctx context.Context, csr []byte) (*authority.X509Issued, error)
	// Trusts says whether a certificate's root is in the bundle and not
	// tainted.
	Trusts(cert *x509.Certificate) bool
}

// serverIdentity is the server's own X509-SVID, asked for at every handshake. A
// new one is signed at half of its life, or when its root is tainted. Safe for
// concurrent use.
type serverIdentity struct {
	signer ServerSigner
	log    *slog.Logger

	mu      sync.Mutex
	current *tls.Certificate
	renewAt time.Time
}

func (i *serverIdentity) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := time.Now()
	if i.current != nil && now.Before(i.renewAt) && i.signer.Trusts(i.current.Leaf) {
		return i.current, nil
	}
	cert, err := i.renew(now)
	switch {
	case err == nil:
		i.current = cert
		return cert, nil
	case i.current != nil && now.Before(i.current.Leaf.NotAfter):
		i.log.Error("the server's own SVID could not be renewed; the old one is used on", slog.Time("expires_at", i.current.Leaf.NotAfter), slog.Any("error", err))
		i.renewAt = now.Add(10 * time.Second)
		return i.current, nil
	}
	return nil, err
}

func (i *serverIdentity) renew(now time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("server key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("server CSR: %w", err)
	}
	// A handshake has no context, and signing does not wait.
	issued, err := i.signer.SignServer(context.Background(), csr)
	if err != nil {
		return nil, fmt.Errorf("sign the server's own SVID: %w", err)
	}
	leaf, err := x509.ParseCertificate(issued.Chain[0])
	if err != nil {
		return nil, fmt.Errorf("read the server's own SVID: %w", err)
	}
	i.renewAt = now.Add(leaf.NotAfter.Sub(now) / 2)
	return &tls.Certificate{Certificate: issued.Chain, PrivateKey: key, Leaf: leaf}, nil
}

var errForeignClient = errors.New("client is of another trust domain and not an administrator here")

// verifyPeer judges the chain of a client that shows one; the others are
// anonymous.
func (r *Remote) verifyPeer(raw [][]byte, _ [][]*x509.Certificate) error {
	if len(raw) == 0 {
		return nil
	}
	id, _, err := x509svid.ParseAndVerify(raw, r)
	switch {
	case err != nil:
		return err
	case !id.MemberOf(r.cfg.TrustDomain) && !slices.Contains(r.cfg.AdminIDs, id):
		return errForeignClient
	}
	return nil
}

// GetX509BundleForTrustDomain makes the authority's bundles a source for
// verification. Tainted roots count until they are revoked.
func (r *Remote) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	set, err := r.cfg.Authority.Bundles(context.Background(), 0)
	if err != nil {
		return nil, err
	}
	if td == r.cfg.TrustDomain {
		return set.Own.X509Bundle(), nil
	}
	b, ok := set.Federated[td]
	if !ok {
		return nil, fmt.Errorf("no bundle for trust domain %q", td)
	}
	return b.X509Bundle(), nil
}
