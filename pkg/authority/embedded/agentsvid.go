package embedded

import (
	"context"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded/internal/issue"
)

// SignAgent signs an agent's own X.509-SVID for the public key of a CSR. Who
// calls it has attested the agent; recording it is UpsertAgent's part. Errors
// about the request are ErrInvalid.
func (a *Authority) SignAgent(ctx context.Context, id spiffeid.ID, csrDER []byte) (_ *authority.X509Issued, err error) {
	defer func() { countSign(&a.count.x509, err) }()
	if err := a.ready(ctx); err != nil {
		return nil, err
	}
	if !id.MemberOf(a.cfg.TrustDomain) || !strings.HasPrefix(id.Path(), "/spire/agent/") {
		return nil, invalid(fmt.Sprintf("%q is not an agent in trust domain %q; path is not in the agent namespace", id, a.cfg.TrustDomain), nil)
	}
	csr, err := issue.ParseCSR(csrDER)
	if err != nil {
		return nil, invalid("failed to parse CSR", err)
	}
	key, err := issue.VerifyCSR(csr)
	if err != nil {
		return nil, invalid("failed to verify CSR signature", err)
	}
	return a.signLeaf(issue.Leaf{ID: id, PublicKey: key}, 0)
}
