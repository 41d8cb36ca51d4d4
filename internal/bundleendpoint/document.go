package bundleendpoint

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// document is a SPIFFE bundle. Keys are in the order of the bundle, so that
// equal bundles give equal documents.
type document struct {
	jose.JSONWebKeySet
	Sequence    uint64 `json:"spiffe_sequence,omitempty"`
	RefreshHint int64  `json:"spiffe_refresh_hint,omitempty"`
}

// Marshal is a bundle as it is served. Tainted authorities are in it: they
// count until they are revoked.
func Marshal(b *embedded.Bundle, hint time.Duration) ([]byte, error) {
	doc := document{Sequence: b.Sequence, RefreshHint: int64(hint / time.Second)}
	doc.Keys = make([]jose.JSONWebKey, 0, len(b.X509)+len(b.JWT))
	for _, r := range b.X509 {
		doc.Keys = append(doc.Keys, jose.JSONWebKey{Key: r.Certificate.PublicKey, Certificates: []*x509.Certificate{r.Certificate}, Use: "x509-svid"})
	}
	for _, k := range b.JWT {
		pub, err := x509.ParsePKIXPublicKey(k.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("JWT authority %q: %w", k.ID, err)
		}
		doc.Keys = append(doc.Keys, jose.JSONWebKey{Key: pub, KeyID: k.ID, Use: "jwt-svid"})
	}
	return json.MarshalIndent(doc, "", "    ")
}

// documents remembers the last document, as a bundle keeps its pointer until it
// changes. Safe for concurrent use.
type documents struct {
	hint time.Duration

	mu   sync.Mutex
	of   *embedded.Bundle
	text []byte
}

func (d *documents) get(b *embedded.Bundle) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.of == b {
		return d.text, nil
	}
	text, err := Marshal(b, d.hint)
	if err != nil {
		return nil, err
	}
	d.of, d.text = b, text
	return text, nil
}
