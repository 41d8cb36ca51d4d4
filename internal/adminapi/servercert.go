package adminapi

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
)

// Certificate is a tls.Config.GetCertificate that needs no ClientHelloInfo.
type Certificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error)

// ServerCertificate gives TLS listeners the server's own X509-SVID, renewed in
// time.
func ServerCertificate(signer ServerSigner, log *slog.Logger) (Certificate, error) {
	if signer == nil {
		return nil, errors.New("server SVID: authority is missing")
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	i := &serverIdentity{signer: signer, log: log}
	// Nobody should find out by a failed handshake that this cannot work.
	if _, err := i.certificate(nil); err != nil {
		return nil, fmt.Errorf("server SVID: %w", err)
	}
	return i.certificate, nil
}
