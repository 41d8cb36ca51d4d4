package spireserver

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// firstContact verifies the server of an attestation. With InsecureBootstrap
// and no bundle yet, only the SPIFFE ID is compared, and the bundle the server
// then gives must at least be one its own certificate stands up to.
type firstContact struct {
	client *Client
	mu     sync.Mutex
	seen   [][]byte // chain that was not verified
}

func (f *firstContact) verify(raw [][]byte) error {
	c := f.client
	if trust, _ := c.trusted(); trust != nil || !c.cfg.InsecureBootstrap {
		return c.verifyServer(raw)
	}
	if len(raw) == 0 {
		return errors.New("the server has no certificate")
	}
	leaf, err := x509.ParseCertificate(raw[0])
	if err != nil {
		return fmt.Errorf("the server's certificate: %w", err)
	}
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return fmt.Errorf("the server's certificate: %w", err)
	}
	if err := c.requireServer(id); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen = raw
	return nil
}

func (f *firstContact) confirm(trust *x509bundle.Bundle) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.seen == nil {
		return nil
	}
	if err := f.client.verifyWith(trust, f.seen); err != nil {
		return fmt.Errorf("the server does not stand up to the trust bundle it gave: %w", err)
	}
	f.client.log.Warn("trust bundle taken from a server that was not verified (insecure bootstrap)",
		slog.Int("x509_authorities", len(trust.X509Authorities())))
	return nil
}

func newAttestationData(kind string, payload []byte) *typespb.AttestationData {
	return &typespb.AttestationData{Type: kind, Payload: payload}
}

func isEOF(err error) bool { return errors.Is(err, io.EOF) }

// noEOF makes the early end of a stream an error that says so.
func noEOF(err error) error {
	if isEOF(err) {
		return fmt.Errorf("%w: it ended the stream early", errProtocol)
	}
	return err
}
