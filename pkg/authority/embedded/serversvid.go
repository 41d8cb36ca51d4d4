package embedded

import (
	"context"
	"crypto/x509"
	"encoding/hex"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded/internal/issue"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// SignServer signs the X.509-SVID that the authority itself presents to its
// clients, for the public key of a CSR; the ID is spiffe://TD/spire/server.
// Errors about the request are ErrInvalid.
func (a *Authority) SignServer(ctx context.Context, csrDER []byte) (_ *authority.X509Issued, err error) {
	defer func() { countSign(&a.count.x509, err) }()
	if err := a.ready(ctx); err != nil {
		return nil, err
	}
	spki, _, err := issue.PublicKeyFromCSR(csrDER)
	if err != nil {
		return nil, invalid("malformed CSR", err)
	}
	return a.signLeaf(issue.Leaf{ID: entry.ServerID(a.cfg.TrustDomain), PublicKey: spki}, 0)
}

// Trusts says whether a certificate was signed by an authority whose root is in
// the own bundle and not tainted: one that was not should be replaced.
func (a *Authority) Trusts(cert *x509.Certificate) bool {
	root := hex.EncodeToString(cert.AuthorityKeyId)
	j := a.journal.Load()
	for _, s := range []*slot{j.x509.current, j.x509.next} {
		if s != nil && s.id == root {
			root = s.rootID()
			break
		}
	}
	tainted := a.OwnBundle().find(kindX509, root)
	return tainted != nil && !*tainted
}
