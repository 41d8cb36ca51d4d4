package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"

	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

// material is what a probe's own TLS uses: the newest secrets it was sent. It
// may be used from any goroutine.
type material struct {
	mu    sync.Mutex
	cert  *tls.Certificate
	roots *x509.CertPool
}

// take keeps a secret; one it cannot use is left to the other end's complaint.
func (m *material) take(secret *tlsv3.Secret) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if own := secret.GetTlsCertificate(); own != nil {
		if cert, err := tls.X509KeyPair(own.GetCertificateChain().GetInlineBytes(), own.GetPrivateKey().GetInlineBytes()); err == nil {
			m.cert = &cert
		}
	}
	if ctx := secret.GetValidationContext(); ctx != nil {
		bundles := [][]byte{ctx.GetTrustedCa().GetInlineBytes()}
		var validator tlsv3.SPIFFECertValidatorConfig
		if custom := ctx.GetCustomValidatorConfig(); custom != nil && custom.GetTypedConfig().UnmarshalTo(&validator) == nil {
			for _, td := range validator.GetTrustDomains() {
				bundles = append(bundles, td.GetTrustBundle().GetInlineBytes())
			}
		}
		m.roots = x509.NewCertPool()
		for _, b := range bundles {
			m.roots.AppendCertsFromPEM(b)
		}
	}
}

// config makes a TLS configuration that presents the SVID and accepts every
// peer with one from a bundle; peer gets its ID.
func (m *material) config(peer *string) (*tls.Config, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cert == nil || m.roots == nil {
		return nil, errors.New("no identity or no bundle yet")
	}
	cert, roots := *m.cert, m.roots
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		Certificates:       []tls.Certificate{cert},
		ClientAuth:         tls.RequireAnyClientCert,
		InsecureSkipVerify: true, // names are not hosts here; VerifyPeerCertificate does the rest
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			leaf, err := x509.ParseCertificate(raw[0])
			if err != nil {
				return err
			}
			between := x509.NewCertPool()
			for _, r := range raw[1:] {
				between.AppendCertsFromPEM(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r}))
			}
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
				return err
			}
			if len(leaf.URIs) != 1 {
				return fmt.Errorf("peer has %d URI names, an SVID has one", len(leaf.URIs))
			}
			*peer = leaf.URIs[0].String()
			return nil
		},
	}, nil
}

// serve reports every peer that shakes hands at address.
func (m *material) serve(ctx context.Context, address string, out *reporter) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		conn, err := l.Accept()
		if err != nil {
			return nil // the listener ends with ctx
		}
		go func() {
			defer conn.Close()
			out.handshake(ctx, m, conn, tls.Server)
		}()
	}
}

// dial shakes hands with address, trying until it works: once, or for ever if
// again says so.
func (m *material) dial(ctx context.Context, address string, again bool, out *reporter) {
	for {
		if conn, err := new(net.Dialer).DialContext(ctx, "tcp", address); err == nil {
			done := out.handshake(ctx, m, conn, tls.Client)
			conn.Close()
			if done && !again {
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (r *reporter) handshake(ctx context.Context, m *material, conn net.Conn, side func(net.Conn, *tls.Config) *tls.Conn) bool {
	var peer string
	cfg, err := m.config(&peer)
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		secure := side(conn, cfg)
		if err = secure.HandshakeContext(ctx); err == nil {
			// With TLS 1.3 a client learns of a refusal only when it reads.
			err = exchange(secure)
		}
	}
	ev := probe.Event{Kind: probe.Peer, SPIFFEID: peer}
	if err != nil {
		ev.Message = err.Error()
	}
	r.report(ev)
	return err == nil
}

// exchange sends one byte and expects one.
func exchange(conn *tls.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	_, err := conn.Read(make([]byte, 1))
	return err
}
