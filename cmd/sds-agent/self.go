package main

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
	"sync/atomic"
	"time"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// attestationType is what `agent list` shows for an agent whose authority is in
// the same process: nobody had to be convinced.
const attestationType = "local"

// self keeps the agent's own record in the embedded authority: an SVID, renewed
// at half of its life, so that `agent list` shows this agent as any other.
type self struct {
	node      *node
	selectors attest.Selectors
	renewAt   time.Time
	svid      atomic.Pointer[tls.Certificate]
}

// start registers the agent. A banned one must not serve; one whose record
// cannot be stored (a full or read-only disk) can.
func (s *self) start(ctx context.Context) error {
	err := s.register(ctx)
	if err == nil {
		return nil
	}
	if errors.Is(err, embedded.ErrPrecondition) {
		return fmt.Errorf("%w; lift the ban with: kubectl-spiffe agent evict -spiffeID %s", err, s.node.id)
	}
	s.retry(err)
	return nil
}

// retry notes a failure and when to try again.
func (s *self) retry(err error) {
	s.node.log.Error("the agent's own record could not be renewed; tried again in 30 s",
		slog.String("agent_id", s.node.id.String()), slog.Any("error", err))
	s.renewAt = time.Now().Add(30 * time.Second)
}

// register makes the agent known, with a fresh SVID.
func (s *self) register(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("agent key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}},
	}, key)
	if err != nil {
		return fmt.Errorf("agent CSR: %w", err)
	}
	issued, err := s.node.authority.SignAgent(ctx, s.node.id, csr)
	if err != nil {
		return fmt.Errorf("sign agent SVID: %w", err)
	}
	leaf, err := x509.ParseCertificate(issued.Chain[0])
	if err != nil {
		return fmt.Errorf("read agent SVID: %w", err)
	}
	_, err = s.node.authority.UpsertAgent(ctx, &embedded.Agent{
		ID:              s.node.id,
		AttestationType: attestationType,
		Serial:          leaf.SerialNumber.String(),
		ExpiresAt:       issued.NotAfter,
		Selectors:       s.selectors,
		CanReattest:     true,
		Version:         version,
	})
	if err != nil {
		return fmt.Errorf("record agent %s: %w", s.node.id, err)
	}
	s.svid.Store(&tls.Certificate{Certificate: issued.Chain, PrivateKey: key, Leaf: leaf})
	s.renewAt = time.Now().Add(time.Until(issued.NotAfter) / 2)
	return nil
}

// run renews until ctx ends. A failure is no reason to stop serving others.
func (s *self) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Until(s.renewAt)):
		}
		if err := s.register(ctx); err != nil && ctx.Err() == nil {
			s.retry(err)
		}
	}
}

// authorityStatus is what Inspect says of who signs.
func (n *node) authorityStatus() adminapi.AuthorityStatus {
	if n.server != nil {
		return n.serverStatus()
	}
	out := adminapi.AuthorityStatus{Kind: "embedded", State: "ready"}
	x, err := n.authority.X509Authorities()
	if err == nil {
		out.X509AuthorityID, out.X509AuthorityEnds = x.Active.ID, x.Active.ExpiresAt
	}
	j, jerr := n.authority.JWTAuthorities()
	if jerr == nil {
		out.JWTAuthorityID, out.JWTAuthorityEnds = j.Active.ID, j.Active.ExpiresAt
	}
	if err == nil {
		err = jerr
	}
	if err == nil {
		err = n.authority.Ready()
	}
	if err != nil {
		out.State, out.Detail = "degraded", err.Error()
	} else if s := n.authority.UpstreamStatus(); s != nil && s.Err != nil {
		out.Detail = s.Err.Error()
	}
	return out
}
