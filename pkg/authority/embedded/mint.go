package embedded

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded/internal/issue"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// MintX509 signs a certificate for the SPIFFE ID, DNS names and subject of a
// CSR, without an entry: for administrators only. ttl 0 = the default; it ends
// with the CA at the latest. Errors about the CSR are ErrInvalid; the texts are
// SPIRE Server's.
func (a *Authority) MintX509(ctx context.Context, csrDER []byte, ttl time.Duration) (_ spiffeid.ID, _ *authority.X509Issued, err error) {
	defer func() { countSign(&a.count.x509, err) }()
	if err := a.ready(ctx); err != nil {
		return spiffeid.ID{}, nil, err
	}
	leaf, err := a.leafFromCSR(csrDER)
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	issued, err := a.signLeaf(leaf, ttl)
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("failed to sign X509-SVID: %w", err)
	}
	return leaf.ID, issued, nil
}

func (a *Authority) leafFromCSR(csrDER []byte) (leaf issue.Leaf, err error) {
	if len(csrDER) == 0 {
		return leaf, invalid("missing CSR", nil)
	}
	csr, err := issue.ParseCSR(csrDER)
	if err != nil {
		return leaf, invalid("malformed CSR", err)
	}
	if leaf.PublicKey, err = issue.VerifyCSR(csr); err != nil {
		return leaf, invalid("failed to verify CSR signature", err)
	}
	switch len(csr.URIs) {
	case 0:
		return leaf, invalid("CSR URI SAN is required", nil)
	case 1:
	default:
		return leaf, invalid("only one URI SAN is expected", nil)
	}
	if leaf.ID, err = spiffeid.FromURI(csr.URIs[0]); err == nil {
		err = entry.CheckWorkload(a.cfg.TrustDomain, leaf.ID)
	}
	if err != nil {
		return leaf, invalid("CSR URI SAN is invalid", err)
	}
	for _, name := range csr.DNSNames {
		if err := entry.CheckDNSName(name); err != nil {
			return leaf, invalid("CSR DNS name is invalid", err)
		}
	}
	if err := checkWildcards(csr.DNSNames); err != nil {
		return leaf, invalid("CSR DNS name contains a wildcard that covers another non-wildcard name", err)
	}
	leaf.DNSNames = csr.DNSNames
	leaf.Subject = subjectOf(csr)
	return leaf, nil
}

// subjectOf is nil for an empty subject.
func subjectOf(csr *x509.CertificateRequest) *pkix.Name {
	if len(csr.Subject.Names) == 0 {
		return nil
	}
	s := csr.Subject
	return &s
}

// checkWildcards refuses a name that a wildcard in the same list covers.
func checkWildcards(names []string) error {
	wild := make(map[string]bool)
	for _, name := range names {
		if strings.HasPrefix(name, "*.") {
			wild[name] = true
		}
	}
	for _, name := range names {
		if _, parent, ok := strings.Cut(name, "."); ok && !wild[name] && wild["*."+parent] {
			return fmt.Errorf("name %q overlaps with %q", name, "*."+parent)
		}
	}
	return nil
}

// NewDownstreamX509CA signs the CA certificate of a downstream server of this
// trust domain: for administrators and downstream entries only. ttl 0 = that of
// an own CA; it ends with the signing CA at the latest. Of the CSR only the key
// counts. roots are all authorities of the trust domain. Errors about the CSR
// are ErrInvalid; the texts are SPIRE Server's.
func (a *Authority) NewDownstreamX509CA(ctx context.Context, csrDER []byte, ttl time.Duration) (_ *authority.X509Issued, roots []*x509.Certificate, err error) {
	defer func() { countSign(&a.count.x509, err) }()
	if err := a.ready(ctx); err != nil {
		return nil, nil, err
	}
	csr, err := issue.ParseCSR(csrDER)
	if err != nil {
		return nil, nil, invalid("malformed CSR", err)
	}
	spki, err := issue.VerifyCSR(csr)
	if err != nil {
		return nil, nil, invalid("invalid CSR signature", err)
	}
	if ttl <= 0 {
		ttl = a.cfg.CATTL
	}
	issued, err := a.signWithin(ttl, func(ca *issue.Issuer, notBefore, notAfter time.Time) (*issue.Issued, error) {
		return ca.IssueIntermediate(issue.Intermediate{
			TrustDomain: a.cfg.TrustDomain, PublicKey: spki, NotBefore: notBefore, NotAfter: notAfter,
		})
	})
	if err != nil {
		return nil, nil, fmt.Errorf("failed to sign downstream X.509 CA: %w", err)
	}
	for _, r := range a.OwnBundle().X509 {
		roots = append(roots, r.Certificate)
	}
	return issued, roots, nil
}

// MintJWT signs a JWT-SVID for any workload ID of the trust domain, without an
// entry: for administrators only. ttl 0 = the default; it ends with the key at
// the latest. Errors about the request are ErrInvalid; the texts are SPIRE
// Server's.
func (a *Authority) MintJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (_ *authority.JWTIssued, err error) {
	defer func() { countSign(&a.count.jwt, err) }()
	if err := a.ready(ctx); err != nil {
		return nil, err
	}
	if id.IsZero() {
		return nil, invalid("invalid SPIFFE ID", errors.New("request must specify SPIFFE ID"))
	}
	if err := entry.CheckWorkload(a.cfg.TrustDomain, id); err != nil {
		return nil, invalid("invalid SPIFFE ID", err)
	}
	if audience = withoutEmpty(audience); len(audience) == 0 {
		return nil, invalid("at least one audience is required", nil)
	}
	issued, err := a.signJWT(id, audience, ttl, false)
	if err != nil {
		return nil, fmt.Errorf("failed to sign JWT-SVID: %w", err)
	}
	return issued, nil
}

func base64URL(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
