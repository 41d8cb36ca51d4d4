package federation

import (
	"context"
	"crypto/x509"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// MaxDocument is the bound on a bundle document.
const MaxDocument = maxDocument

// Fetch is one fetch over HTTPS.
func Fetch(ctx context.Context, r embedded.Relationship, roots *x509.CertPool, of map[spiffeid.TrustDomain]*x509bundle.Bundle) (*spiffebundle.Bundle, error) {
	f := &fetcher{roots: roots, bundle: func(td spiffeid.TrustDomain) *x509bundle.Bundle { return of[td] }}
	return f.fetch(ctx, r)
}

// ControlDial is the judgement on an address.
func ControlDial(address string) error { return controlDial(context.Background(), "tcp", address, nil) }

// OneLine is how errors are shown.
func OneLine(err error) string { return oneLine(err) }
