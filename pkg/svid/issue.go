package svid

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"runtime/debug"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// csrSubject is what SPIRE Agent asks for; the authority decides.
var csrSubject = pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}

// sign makes a key and has the authority sign it for an entry. What comes back
// is checked before anybody sees it.
func (m *Manager) sign(ctx context.Context, e *entry.Entry) (_ *X509SVID, err error) {
	defer m.recovered(&err)
	key, err := m.keys.make()
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: csrSubject,
		URIs:    []*url.URL{e.SPIFFEID.URL()},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("make CSR for %s: %w", e.SPIFFEID, err)
	}
	ctx, cancel := context.WithTimeout(ctx, m.cfg.SignTimeout)
	defer cancel()
	issued, err := m.cfg.Authority.SignX509(ctx, authority.X509Request{
		EntryID:  e.ID,
		SPIFFEID: e.SPIFFEID,
		CSR:      csr,
		DNSNames: e.DNSNames,
		TTL:      e.X509SVIDTTL,
	})
	if err != nil {
		return nil, err
	}
	if issued == nil {
		return nil, errors.New("the authority returned nothing")
	}
	return newX509SVID(e.SPIFFEID, issued.Chain, key)
}

// recovered turns a panic of an authority, which runs outside any handler, into
// the error of one request.
func (m *Manager) recovered(err *error) {
	if r := recover(); r != nil {
		m.log.Error("authority panicked", slog.Any("panic", r), slog.String("stack", string(debug.Stack())))
		*err = fmt.Errorf("panic: %v", r)
	}
}

// newX509SVID puts a chain and its key together. An error says in what the
// chain is not an SVID of this ID and key.
func newX509SVID(id spiffeid.ID, chain [][]byte, key crypto.Signer) (*X509SVID, error) {
	if len(chain) == 0 {
		return nil, errors.New("the chain is empty")
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", i, err)
		}
		certs[i] = c
	}
	leaf := certs[0]
	got, err := x509svid.IDFromCert(leaf)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the certificate is no X.509-SVID: %w", err)
	case got != id:
		return nil, fmt.Errorf("the certificate is for %s, not for %s", got, id)
	case leaf.IsCA:
		return nil, fmt.Errorf("the certificate for %s is a CA", id)
	case !leaf.NotAfter.After(leaf.NotBefore):
		return nil, fmt.Errorf("the certificate for %s ends (%s) before it starts (%s)", id, leaf.NotAfter, leaf.NotBefore)
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("the certificate for %s has another public key than was asked for", id)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key of %s: %w", id, err)
	}
	return &X509SVID{
		ID:           id,
		Certificates: certs,
		ChainDER:     chain,
		Key:          key,
		KeyDER:       keyDER,
		Serial:       leaf.SerialNumber.String(),
		NotBefore:    leaf.NotBefore,
		NotAfter:     leaf.NotAfter,
	}, nil
}
